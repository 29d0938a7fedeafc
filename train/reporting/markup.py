"""Building blocks of a report's HTML. Text is escaped here and nowhere else: anything but `Html` is text."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Html(NamedTuple):
    """Markup that goes into the page unchanged."""

    markup: str


Content = str | Html


def joined(parts: Iterable[Content], between: str = "") -> Html:
    """Parts one after the other. between: text."""
    return Html(html.escape(between).join(_markup(part) for part in parts))


def element(tag: str, *parts: Content, **attributes: str | None) -> Html:
    """<tag attributes>parts</tag>. Attributes' names lose a last underscore, others become hyphens; None: left out."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    written = "".join(f' {name}="{html.escape(value)}"' for name, value in names.items())
    return Html(f"<{tag}{written}>{joined(parts).markup}</{tag}>")


def note(*parts: Content) -> Html:
    """A paragraph in a muted colour."""
    return element("p", *parts, class_="note")


def heading(text: str) -> Html:
    """A heading within a section."""
    return element("h3", text)


def row(*parts: Content) -> Html:
    """Parts side by side, as many as fit."""
    return element("div", *parts, class_="row")


def table(caption: str, titles: Sequence[Content], rows: Sequence[Sequence[Content]], *, kind: str | None = None) -> Html:
    """A table whose first column names the rows. Cells may be given with their tags, as <td> or <th>. kind: a class for the
    style sheet."""
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = [
        element(
            "tr",
            *(
                each if _is_cell(each) else element("td" if i else "th", each, scope=None if i else "row")
                for i, each in enumerate(cells)
            ),
        )
        for cells in rows
    ]
    parts = element("caption", caption), element("thead", head), element("tbody", *body)
    return element("div", element("table", *parts, class_=kind), class_="wide", role="group", aria_label=caption, tabindex="0")


def figure(svg: str, caption: Content, *, alt: str, more: Content = "") -> Html:
    """An SVG with a caption above it, and more (a legend) below."""
    drawn = element("div", Html(svg), role="img", aria_label=alt)
    return element("figure", element("figcaption", caption), drawn, more)


def photo(jpeg: bytes, alt: str) -> Html:
    """A JPEG, embedded in the page."""
    data = base64.b64encode(jpeg).decode()
    return Html(f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">')


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A percentage with one decimal; a dash for None."""
    return "–" if value is None else f"{value:.1%}"


def share(fraction: float) -> str:
    """A share of labels as people say it: 5 %, 0.5 %."""
    return f"{100 * fraction:.3g}\u00a0%"


def count(amount: int, what: str) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{amount:,} {what}" if amount == 1 else f"{amount:,} {what}s"


def _is_cell(part):
    return isinstance(part, Html) and part.markup.startswith(("<td", "<th"))


def _markup(part: Content) -> str:
    return part.markup if isinstance(part, Html) else html.escape(part)
