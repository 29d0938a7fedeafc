"""Legends of plots, as text beside them."""

from collections.abc import Sequence

from train.reporting.markup import Html, element, joined
from train.reporting.plots import class_style, line_style
from train.reporting.run_view import RunView

# Marks in a box of 10 x 10, as matplotlib draws them.
_SHAPES = {
    "o": '<circle cx="5" cy="5" r="4"/>',
    "s": '<rect x="1.5" y="1.5" width="7" height="7"/>',
    "^": '<path d="M5 1 9 9H1Z"/>',
    "D": '<path d="M5 0.5 9.5 5 5 9.5 0.5 5Z"/>',
}


def run_legend(runs: Sequence[RunView]) -> Html:
    """Each run's line; nothing where there is only one."""
    return line_legend([(run.name, run.number) for run in runs]) if len(runs) > 1 else Html("")


def line_legend(entries: Sequence[tuple[str, int]]) -> Html:
    """Names and the numbers of their line styles."""
    items = []
    for name, number in entries:
        colour, dashes = line_style(number)
        items.append(element("li", element("span", class_="line", style=f"border-top: 3px {dashes} {colour}"), name))
    return element("ul", *items, class_="legend")


def class_legend(names: Sequence[str]) -> Html:
    """Each class's mark."""
    styles = (class_style(number) for number in range(len(names)))
    return mark_legend([(name, *style) for name, style in zip(names, styles, strict=True)])


def mark_legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """A name, its colour and its mark."""
    items = []
    for name, colour, mark in entries:
        drawn = Html(f'<svg class="mark" viewBox="0 0 10 10" aria-hidden="true" fill="{colour}">{_SHAPES[mark]}</svg>')
        items.append(element("li", joined([drawn, name])))
    return element("ul", *items, class_="legend")
