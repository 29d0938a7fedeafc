"""The report's sections, in their order."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from train.runs import Run
from train.sections import (
    by_class,
    cautions,
    embedding_maps,
    lineage,
    patches,
    records,
    scores,
    shell,
    training,
    view_pairs,
)
from train.sections.markup import Html, note
from train.sections.shell import Filled
from train.sections.shown import Shown, read_shown


class Section(NamedTuple):
    """place: its address in the page; title: its heading; show: what is in it, of runs side by side; nothing leaves it out."""

    place: str
    title: str
    show: Callable[[Sequence[Shown]], list[Html]]


SECTIONS = (
    Section("warnings", "Read this first", cautions.show),
    Section("lineage", "What was trained on what", lineage.show),
    Section("scores", "How good it is", scores.show),
    Section("classes", "Class by class", by_class.show),
    Section("maps", "Map of the test patches", embedding_maps.show),
    Section("neighbours", "Nearest neighbours", patches.show_neighbours),
    Section("mistakes", "Worst mistakes", patches.show_mistakes),
    Section("training", "How training went", training.show),
    Section("views", "What pretraining saw", view_pairs.show),
    Section("records", "Records", records.show),
)


def page(runs: Sequence[Run], title: str) -> str:
    """The whole HTML file. Raises ValueError where a run is not finished, too old, or damaged."""
    shown = [read_shown(run, number) for number, run in enumerate(runs)]
    found = [Filled(section.place, section.title, section.show(shown)) for section in SECTIONS]
    return shell.page(title, [note(_said(shown))], found)


def _said(runs: Sequence[Shown]) -> str:
    days = sorted({run.record["started"][:10] for run in runs})
    what = "one run" if len(runs) == 1 else f"{len(runs)} runs side by side"
    return f"PatchCLR report · {what} · {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}"
