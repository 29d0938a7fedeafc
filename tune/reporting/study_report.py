"""A study's report: its description, warnings, tables and plots, selections, failures and runs."""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.records.runs import Run
from train.reporting import page as shell
from train.reporting.markup import Content, Html, count, element, note, number, table
from train.reporting.page import PageSection, read_style
from train.reporting.run_view import RunView
from train.reporting.sections import run_warnings
from tune.execution.study_state import StudyResult
from tune.reporting.formatting import report_link
from tune.reporting.html_tables import left, table_html
from tune.reporting.table_data import ResultTable
from tune.reporting.table_notes import SMOKE
from tune.study.schema import PRETRAINING_METRICS, Study


def page(study: Study, outcome: StudyResult, tables: Sequence[ResultTable], folder: Path) -> str:
    """The whole HTML file. folder: where it will lie, for its links to the runs' reports.

    Raises ValueError where a run's folder is damaged.
    """
    runs = list({run.folder: run for run in outcome.runs.values()}.values())
    warnings = run_warnings.show([RunView(run, place, run.result, run.record, []) for place, run in enumerate(runs)])
    found = [
        PageSection("warnings", "Read this first", warnings),
        *(PageSection(f"table-{i}", one.title, table_html(one, folder)) for i, one in enumerate(tables, 1)),
        PageSection("selections", "What was selected", _selections(outcome, folder)),
        PageSection("failed", "Failed or not run", _failures(study, outcome)),
        PageSection("records", "What was run", _records(outcome, runs, folder)),
    ]
    about = [note(_subtitle(study, runs)), *_banner(study), *_description(study)]
    return shell.page(f"Study {study.name}", about, found, style=read_style(Path(__file__).with_name("style.css")))


def _subtitle(study: Study, runs: Sequence[Run]) -> str:
    parts = ["PatchCLR study", count(len(study.trials), "trial"), count(len(runs), "run")]
    days = sorted({run.record["started"][:10] for run in runs})
    return " · ".join([*parts, *([" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else [])])


def _banner(study: Study) -> Iterator[Html]:
    if study.smoke:
        yield element("p", SMOKE, class_="banner", role="note")


def _description(study: Study) -> Iterator[Html]:
    """The paragraphs of its comment. Indented lines, which are small tables, keep their layout."""
    for paragraph in re.split(r"\n\s*\n", study.about):
        for indented, lines in itertools.groupby(paragraph.splitlines(), key=lambda line: line.startswith("  ")):
            if indented:
                yield element("pre", textwrap.dedent("\n".join(lines)))
            elif text := " ".join(" ".join(lines).split()):
                yield element("p", text)


def _linked(name: str, run: Run | None, folder: Path) -> Content:
    address = run and report_link(run, folder)
    return element("a", name, href=address) if address else name


def _selections(outcome: StudyResult, folder: Path) -> list[Html]:
    if not outcome.selected:
        return []
    lines: list[list[Content]] = []
    apart = 0
    for name, found in outcome.selected.items():
        chosen = {found["by"]: found["chosen"], **found["otherwise"]}
        cells: list[Content] = []
        for rule in PRETRAINING_METRICS:
            other = chosen.get(rule)
            linked = _linked(other, outcome.runs.get(other), folder) if other else "–"
            cells.append(element("td", linked, class_="text other" if other not in (None, found["chosen"]) else "text"))
        apart += any(other != found["chosen"] for other in chosen.values())
        lines.append(
            [
                element("th", name, scope="row"),
                str(len(found["values"])),
                element("td", PRETRAINING_METRICS[found["by"]].short_title),
                *cells,
            ]
        )
    summary = f"In {apart} of {count(len(lines), 'selection')} another rule would have chosen differently (bold)."
    titles: list[Content] = [
        "selection",
        "among",
        "chosen by",
        *(left(f"by {each.short_title}") for each in PRETRAINING_METRICS.values()),
    ]
    return [
        note(summary if apart else "All rules would have chosen the same pretrainings."),
        table("What each rule chooses", titles, lines, kind="study"),
        note("A dash: some candidates lack the metric, or their losses are not comparable."),
        *(_candidates(name, found, outcome, folder) for name, found in outcome.selected.items()),
    ]


def _candidates(name, found, outcome, folder) -> Html:
    lines: list[list[Content]] = []
    for name_of_trial, values in found["values"].items():
        numbers = [number(values[rule]) for rule in PRETRAINING_METRICS]
        marked = "chosen" if name_of_trial == found["chosen"] else ""
        lines.append(
            [element("th", _linked(name_of_trial, outcome.runs.get(name_of_trial), folder), scope="row"), *numbers, marked]
        )
    shown = table(
        f"Candidates of {name}",
        ["pretraining", *(each.short_title for each in PRETRAINING_METRICS.values()), ""],
        lines,
        kind="study",
    )
    return element("details", element("summary", f"Candidates of {name}"), shown)


def _failures(study: Study, outcome: StudyResult) -> list[Html]:
    failed = dict(outcome.failed)
    missing = {node.name: "not run" for node in study.nodes if node.name not in outcome.runs and node.name not in failed}
    lines: list[list[Content]] = [[name, element("td", error, class_="text")] for name, error in (failed | missing).items()]
    return [table("Trials that failed or were not run", ["trial", left("why")], lines, kind="study")] if lines else []


def _records(outcome: StudyResult, runs: Sequence[Run], folder: Path) -> list[Html]:
    if not runs:
        return []
    names: dict[Path, list[str]] = {}
    for name, run in outcome.runs.items():
        names.setdefault(run.folder, []).append(name)
    lines: list[list[Content]] = []
    records = [(run, run.record) for run in runs]
    for run, record in records:
        named = ", ".join(name for name in names[run.folder] if name != run.name)
        lines.append(
            [
                _linked(run.name, run, folder),
                element("td", named, class_="text"),
                record["stage"]["kind"],
                number(record["wall_seconds"], 0),
                record["device"],
                record["started"][:16].replace("T", " "),
                record["commit"][:9],
            ]
        )
    spent = sum(record["wall_seconds"] for _, record in records)
    devices = ", ".join(dict.fromkeys(record["device"] for _, record in records))
    titles: list[Content] = ["run", left("also used as"), "kind", "seconds", "device", "started", "commit"]
    shown = table("Runs, each with its own report", titles, lines, kind="study")
    return [
        note(f"The runs took {_duration(spent)} in total, on {devices}."),
        element("p", "The list of runs is in the HTML file of this report.", class_="note on-paper"),
        element("details", element("summary", count(len(runs), "run")), shown),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
