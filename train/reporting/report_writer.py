"""The report of one or several runs: its sections, in order, and the HTML file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from train.records.json_files import write_text
from train.records.runs import Run
from train.reporting import page
from train.reporting.markup import Html, note
from train.reporting.page import PageSection
from train.reporting.run_view import RunView, read_run
from train.reporting.sections import (
    by_class,
    embedding_maps,
    lineage,
    patches,
    run_records,
    run_warnings,
    scores,
    training,
    view_pairs,
)


class Section(NamedTuple):
    """place: its id in the page; title: its heading; show: its content, for runs side by side; an empty list omits it."""

    place: str
    title: str
    show: Callable[[Sequence[RunView]], list[Html]]


SECTIONS = (
    Section("warnings", "Read this first", run_warnings.show),
    Section("lineage", "Runs and their data", lineage.show),
    Section("scores", "Test metrics", scores.show),
    Section("classes", "Class by class", by_class.show),
    Section("maps", "Map of the test patches", embedding_maps.show),
    Section("neighbours", "Nearest neighbours", patches.show_neighbours),
    Section("mistakes", "Worst mistakes", patches.show_mistakes),
    Section("training", "Training", training.show),
    Section("views", "What pretraining saw", view_pairs.show),
    Section("records", "Records", run_records.show),
)


def write_report(runs: Sequence[Run], path: Path, *, title: str | None = None) -> Path:
    """Write the report of finished runs, side by side where there are several. Returns its path.

    Raises ValueError when a run is not finished, was made by an older version of this code, or lacks a file.
    """
    write_text(path, render_report(runs, title or _default_title(runs)))
    return path


def render_report(runs: Sequence[Run], title: str) -> str:
    """The whole HTML file. Raises ValueError where a run is not finished, too old, or damaged."""
    views = [read_run(run, number) for number, run in enumerate(runs)]
    found = [PageSection(section.place, section.title, section.show(views)) for section in SECTIONS]
    return page.page(title, [note(_subtitle(views))], found)


def _subtitle(runs: Sequence[RunView]) -> str:
    days = sorted({run.record["started"][:10] for run in runs})
    what = "one run" if len(runs) == 1 else f"{len(runs)} runs side by side"
    return f"PatchCLR report · {what} · {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}"


def _default_title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else "Runs side by side"
