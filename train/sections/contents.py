"""The report's table of contents, and the page around it."""

import itertools
import re
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
    training,
    view_pairs,
)
from train.sections.markup import Html, element, joined, note
from train.sections.shown import Shown, read_shown
from train.sections.styling import STYLE


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
    found = [(section, parts) for section in SECTIONS if (parts := section.show(shown))]
    links = [element("li", element("a", section.title, href=f"#{section.place}")) for section, _ in found]
    body = joined(
        [
            element("header", element("h1", title), note(_said(shown))),
            element("nav", element("ul", *links), aria_label="Contents"),
            element("main", *(_section(section, parts) for section, parts in found)),
        ]
    )
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            element("title", title),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f"<style>{STYLE}</style>"),
        ]
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head.markup}</head>\n<body>\n{_own_ids(body.markup)}\n</body>\n</html>\n'


def _section(section: Section, parts: list[Html]) -> Html:
    name = f"{section.place}-title"
    return element("section", element("h2", section.title, id=name), *parts, id=section.place, aria_labelledby=name)


def _said(runs: Sequence[Shown]) -> str:
    days = sorted({run.record["started"][:10] for run in runs})
    what = "one run" if len(runs) == 1 else f"{len(runs)} runs side by side"
    return f"PatchCLR report · {what} · {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}"


def _own_ids(text: str) -> str:
    """With the ids within each figure made the only ones of the page: figures of one size share their clipping boxes' names."""
    numbers = itertools.count(1)

    def rename(figure: re.Match) -> str:
        prefix = f"f{next(numbers)}-"
        return re.sub(r'( id="|url\(#|href="#)', lambda found: f"{found[1]}{prefix}", figure[0])

    return re.sub(r"<svg.*?</svg>", rename, text, flags=re.DOTALL)
