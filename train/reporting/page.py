"""The page around the sections: one self-contained HTML file."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from train.reporting.markup import Html, element, joined

_STYLE = Path(__file__).with_name("style.css")


class PageSection(NamedTuple):
    """A section of a page. place: its id, which links refer to."""

    place: str
    title: str
    parts: list[Html]


def page(title: str, about: Sequence[Html], sections: Sequence[PageSection], *, style: str = "") -> str:
    """The HTML file. about: what goes below the title; sections: those without parts are left out; style: additional CSS."""
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
            Html(f"<style>{read_style(_STYLE)}{style}</style>"),
        ]
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head.markup}</head>\n<body>\n{_unique_ids(body.markup)}\n</body>\n</html>\n'
    )


def read_style(path: Path) -> str:
    """The rules of a style sheet, without the comment on its first line."""
    return path.read_text(encoding="utf-8").partition("*/")[2]


def _section(section: PageSection) -> Html:
    name = f"{section.place}-title"
    return element("section", element("h2", section.title, id=name), *section.parts, id=section.place, aria_labelledby=name)


def _unique_ids(text: str) -> str:
    """Make ids unique in the page: plots of the same size share the names of their clipping boxes."""
    numbers = itertools.count(1)

    def rename(figure: re.Match) -> str:
        prefix = f"f{next(numbers)}-"
        return re.sub(r'( id="|url\(#|href="#)', lambda found: f"{found[1]}{prefix}", figure[0])

    return re.sub(r"<svg.*?</svg>", rename, text, flags=re.DOTALL)
