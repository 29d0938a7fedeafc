"""A whole page around its sections: one HTML file that asks nothing of the network."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from train.reporting.markup import Html, element, joined
from train.reporting.styling import STYLE


class Filled(NamedTuple):
    """A section with something in it. place: its id, by which contents and links name it."""

    place: str
    title: str
    parts: list[Html]


def page(title: str, about: Sequence[Html], sections: Sequence[Filled], *, style: str = "") -> str:
    """The HTML file. about: what stands below the title; sections: those without parts are left out; style: CSS beside that of
    all pages."""
    sections = [section for section in sections if section.parts]
    links = [element("li", element("a", section.title, href=f"#{section.place}")) for section in sections]
    body = joined(
        [
            element("header", element("h1", title), *about),
            element("nav", element("ul", *links), aria_label="Contents"),
            element("main", *map(_section, sections)),
        ]
    )
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            element("title", title),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f"<style>{STYLE}{style}</style>"),
        ]
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head.markup}</head>\n<body>\n{_own_ids(body.markup)}\n</body>\n</html>\n'


def _section(section: Filled) -> Html:
    name = f"{section.place}-title"
    return element("section", element("h2", section.title, id=name), *section.parts, id=section.place, aria_labelledby=name)


def _own_ids(text: str) -> str:
    """With the ids within each figure made the only ones of the page: figures of one size share their clipping boxes' names."""
    numbers = itertools.count(1)

    def rename(figure: re.Match) -> str:
        prefix = f"f{next(numbers)}-"
        return re.sub(r'( id="|url\(#|href="#)', lambda found: f"{found[1]}{prefix}", figure[0])

    return re.sub(r"<svg.*?</svg>", rename, text, flags=re.DOTALL)
