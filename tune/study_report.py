"""A study's report: what it is about, what to beware of, its tables and figures, what was selected, what failed, what was run."""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.records.runs import Run
from train.reporting import page as shell
from train.reporting.markup import Content, Html, count, element, note, number, table
from train.reporting.page import Filled
from train.reporting.run_view import Shown
from train.reporting.sections import run_warnings
from tune.formatting import report_address
from tune.html_tables import left, show_table
from tune.schema import BY, Study
from tune.study_state import Outcome
from tune.table_data import FilledTable
from tune.table_notes import SMOKE

_STYLE = """
.banner {
  background: var(--warn); color: var(--warn-ink); border: 2px solid var(--warn-line); border-radius: 8px;
  padding: .7rem 1rem; margin: 1rem 0; font-weight: 600;
}
.study th[scope=row], .study thead th:has(.axis) { text-align: left; padding-left: 0; padding-right: 1.1rem }
.study th[scope=row] { font-weight: 400; max-width: 16rem; overflow-wrap: normal }
.study td.best a, .study td.best .mean { font-weight: 700 } .study td.best .mean { color: var(--accent) }
.study td.none { color: var(--soft) } .study td.text { text-align: left; white-space: normal; max-width: 34rem }
.study a { color: inherit; text-decoration: underline dotted from-font; text-underline-offset: .2em }
.study a:hover, .study a:focus { color: var(--accent); text-decoration: underline }
.study .other { font-weight: 700 }
"""
_RULES = {"loss": "loss", "top1": "contrastive top-1", "probe": "probe"}


def page(study: Study, outcome: Outcome, tables: Sequence[FilledTable], folder: Path) -> str:
    """The whole HTML file. folder: where it will lie, for its links to the runs' reports.

    Raises ValueError where a run's folder is damaged.
    """
    runs = list({run.folder: run for run in outcome.runs.values()}.values())
    warnings = run_warnings.show([Shown(run, place, run.result, run.record, []) for place, run in enumerate(runs)])
    found = [
        Filled("warnings", "Read this first", warnings),
        *(Filled(f"table-{i}", one.title, show_table(one, folder)) for i, one in enumerate(tables, 1)),
        Filled("selections", "What was selected", _selections(outcome, folder)),
        Filled("failed", "What is not there", _not_there(study, outcome)),
        Filled("records", "What was run", _records(outcome, runs, folder)),
    ]
    about = [note(_said(study, runs)), *_banner(study), *_about(study)]
    return shell.page(f"Study {study.name}", about, found, style=_STYLE)


def _said(study: Study, runs: Sequence[Run]) -> str:
    parts = ["PatchCLR study", count(len(study.cells), "cell"), count(len(runs), "run")]
    days = sorted({run.record["started"][:10] for run in runs})
    return " · ".join([*parts, *([" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else [])])


def _banner(study: Study) -> Iterator[Html]:
    if study.smoke:
        yield element("p", SMOKE, class_="banner", role="note")


def _about(study: Study) -> Iterator[Html]:
    """Its paragraphs; indented lines, which are small tables, stay as they are."""
    for paragraph in re.split(r"\n\s*\n", study.about):
        for indented, lines in itertools.groupby(paragraph.splitlines(), key=lambda line: line.startswith("  ")):
            if indented:
                yield element("pre", textwrap.dedent("\n".join(lines)))
            elif text := " ".join(" ".join(lines).split()):
                yield element("p", text)


def _linked(name: str, run: Run | None, folder: Path) -> Content:
    address = run and report_address(run, folder)
    return element("a", name, href=address) if address else name


def _selections(outcome: Outcome, folder: Path) -> list[Html]:
    if not outcome.selected:
        return []
    lines: list[list[Content]] = []
    apart = 0
    for name, found in outcome.selected.items():
        chosen = {found["by"]: found["chosen"], **found["otherwise"]}
        cells: list[Content] = []
        for rule in BY:
            other = chosen.get(rule)
            linked = _linked(other, outcome.runs.get(other), folder) if other else "–"
            cells.append(element("td", linked, class_="text other" if other not in (None, found["chosen"]) else "text"))
        apart += any(other != found["chosen"] for other in chosen.values())
        lines.append([element("th", name, scope="row"), str(len(found["values"])), element("td", _RULES[found["by"]]), *cells])
    said = f"In {apart} of {count(len(lines), 'selection')} another rule would have chosen otherwise: these are bold."
    titles: list[Content] = ["selection", "among", "chosen by", *(left(f"by {_RULES[rule]}") for rule in BY)]
    return [
        note(said if apart else "Whatever the rule, the same pretrainings would have been chosen."),
        table("What each rule chooses", titles, lines, kind="study"),
        note("A dash: some of the candidates lack the figure, or their losses do not compare."),
        *(_candidates(name, found, outcome, folder) for name, found in outcome.selected.items()),
    ]


def _candidates(name, found, outcome, folder) -> Html:
    lines: list[list[Content]] = []
    for cell, values in found["values"].items():
        figures = [number(values[rule]) for rule in BY]
        marked = "chosen" if cell == found["chosen"] else ""
        lines.append([element("th", _linked(cell, outcome.runs.get(cell), folder), scope="row"), *figures, marked])
    shown = table(f"Candidates of {name}", ["pretraining", *(_RULES[rule] for rule in BY), ""], lines, kind="study")
    return element("details", element("summary", f"Candidates of {name}"), shown)


def _not_there(study: Study, outcome: Outcome) -> list[Html]:
    failed = dict(outcome.failed)
    missing = {node.name: "not run" for node in study.nodes if node.name not in outcome.runs and node.name not in failed}
    lines: list[list[Content]] = [[name, element("td", error, class_="text")] for name, error in (failed | missing).items()]
    return [table("Cells that failed or were not run", ["cell", left("why")], lines, kind="study")] if lines else []


def _records(outcome: Outcome, runs: Sequence[Run], folder: Path) -> list[Html]:
    if not runs:
        return []
    cells: dict[Path, list[str]] = {}
    for name, run in outcome.runs.items():
        cells.setdefault(run.folder, []).append(name)
    lines: list[list[Content]] = []
    records = [(run, run.record) for run in runs]
    for run, record in records:
        named = ", ".join(name for name in cells[run.folder] if name != run.name)
        lines.append(
            [
                _linked(run.name, run, folder),
                element("td", named, class_="text"),
                record["stage"]["kind"],
                number(record["wall_seconds"], 0),
                record["device"],
                record["machine"]["host"],
                record["started"][:16].replace("T", " "),
                record["commit"][:9],
            ]
        )
    spent = sum(record["wall_seconds"] for _, record in records)
    devices = ", ".join(dict.fromkeys(record["device"] for _, record in records))
    titles: list[Content] = ["run", left("also stands for"), "kind", "seconds", "device", "host", "started", "commit"]
    shown = table("Runs, each with its own report", titles, lines, kind="study")
    return [
        note(f"The runs took {_hours(spent)} in sum, on {devices}."),
        element("p", "The list of runs is in the file that this was printed from.", class_="note on-paper"),
        element("details", element("summary", count(len(runs), "run")), shown),
    ]


def _hours(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
