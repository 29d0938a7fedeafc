"""A table as a heat map: SVG in the page's text colour, with a scale that is readable in grey and by colour-blind readers."""

import html
import unicodedata
from collections.abc import Sequence

from tune.reporting.formatting import format_entry
from tune.reporting.table_data import ResultTable
from tune.reporting.trial_metrics import format_axis, format_axis_value

# Cividis at equal steps, from the smallest value to the largest (Nunez, Anderton and Renslow 2018).
_COLOURS = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
_HIGH, _LINE, _GAP = 30, 15, 8  # pixels: of a row of cells, of a line of text, between a head and the cells


def heat_map(table: ResultTable, metric: str) -> str:
    """The means of a metric, with the table's rows and columns. A cell without a mean has a word that says why."""
    means = [[row[column][metric].mean for column in range(len(table.column_heads))] for row in table.entries]
    known = [mean for row in means for mean in row if mean is not None]
    assert known, "a map of nothing"
    columns = [[format_axis_value(*each) for each in zip(table.columns, head, strict=True)] for head in table.column_heads]
    rows = [" · ".join(format_axis_value(*each) for each in zip(table.rows, head, strict=True)) for head in table.row_heads]
    corner = [format_axis(axis) for axis in table.columns]
    wide = max(52, *(_width(text) + 12 for head in columns for text in head))
    left = max(_width(text) for text in (*rows, *corner, _rows_title(table))) + _GAP
    top = _LINE * (len(corner) + 1) + _GAP
    parts = []
    for line, title in enumerate(corner):
        parts.append(_text(left - _GAP, _LINE * line + 11, title, anchor="end", soft=True))
        parts += [_text(left + wide * (i + 0.5), _LINE * line + 11, head[line]) for i, head in enumerate(columns)]
    parts.append(_text(left - _GAP, _LINE * len(corner) + 11, _rows_title(table), anchor="end", soft=True))
    for row, name in enumerate(rows):
        y = top + _HIGH * row
        parts.append(_text(left - _GAP, y + 19, name, anchor="end"))
        for column, mean in enumerate(means[row]):
            x = left + wide * column
            if mean is None:
                parts.append(_text(x + wide / 2, y + 19, format_entry(table.entries[row][column][metric]), soft=True))
                continue
            colour = _colour(mean, min(known), max(known))
            ink = "#000" if sum(weight * level for weight, level in zip((0.3, 0.59, 0.11), colour, strict=True)) > 125 else "#fff"
            parts.append(f'<rect x="{x + 1:g}" y="{y + 1}" width="{wide - 2:g}" height="{_HIGH - 2}" fill="rgb{colour}"/>')
            parts.append(_text(x + wide / 2, y + 19, f"{mean:.3f}", ink=ink))
    size = f"{left + wide * len(columns):g}", f"{top + _HIGH * len(rows):g}"
    box = f'width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-size="12">{"".join(parts)}</svg>'


def _rows_title(table: ResultTable) -> str:
    return f"{' · '.join(map(format_axis, table.rows))} ↓"


def _colour(value: float, low: float, high: float) -> tuple[int, ...]:
    """Interpolated from the scale by the value's position between low and high."""
    place = (value - low) / (high - low) * (len(_COLOURS) - 1) if high > low else (len(_COLOURS) - 1) / 2
    start = min(int(place), len(_COLOURS) - 2)
    return _between(_COLOURS[start], _COLOURS[start + 1], place - start)


def _between(one: Sequence[int], other: Sequence[int], part: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * part) for a, b in zip(one, other, strict=True))


def _width(text: str) -> float:
    """An estimate in pixels: the reader's font is unknown, and a Korean letter is as wide as two Latin ones."""
    return sum(13 if unicodedata.east_asian_width(letter) in "WF" else 7 for letter in text)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", ink: str = "currentColor", soft: bool = False) -> str:
    opacity = ' opacity="0.7"' if soft else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{ink}"{opacity}>{html.escape(text)}</text>'
