"""A study's table in its report: values beside published ones, and a plot over fractions of the labels or a heat map."""

from collections.abc import Iterator
from pathlib import Path

from train.reporting import plots
from train.reporting.legends import line_legend
from train.reporting.markup import Content, Html, element, figure, joined, note, number, row, table
from train.scoring.metrics import METRICS
from tune.reporting.formatting import Footnotes, format_entry, report_links, sub_tables
from tune.reporting.heat_maps import heat_map
from tune.reporting.table_data import DIGITS, ResultTable, TableEntry
from tune.reporting.table_notes import notes_below
from tune.reporting.trial_metrics import format_axis, format_axis_value

_MAX_LINES = len(plots.COLOURS) * len(plots.DASHES)  # more would not all look different


def table_html(filled: ResultTable, folder: Path) -> list[Html]:
    """The table, its notes and its plots. folder: where the page will be."""
    footnotes = Footnotes()
    axes = [left(format_axis(axis)) for axis in filled.rows]
    shown = []
    for part in sub_tables(filled):
        rows: list[list[Content]] = []
        for heads, entries in part.rows:
            rows.append(
                [
                    *(element("th", head, scope="row") for head in heads),
                    *(_entry(entry, filled, footnotes, folder) for entry in entries),
                ]
            )
        shown.append(table(_capital(part.title or filled.title), [*axes, *part.columns], rows, kind="study"))
    errors = [element("ul", *(element("li", line) for line in lines), class_="notes")] if (lines := footnotes.lines()) else []
    notes = [*_interval_note(filled), *notes_below(filled)]
    return [*shown, *errors, *([note(" ".join(notes))] if notes else []), *_plots(filled)]


def left(title: str) -> Html:
    """The title of a column of names, aligned left as they are."""
    return element("span", title, class_="axis")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _entry(entry: TableEntry, filled: ResultTable, footnotes: Footnotes, folder: Path) -> Html:
    """Mean, deviation, interval and published value, one below the other. The mean links to the run's report."""
    addresses = report_links(entry, folder)
    mean: Content = format_entry(entry) if entry.mean is None else number(entry.mean, DIGITS)
    if len(addresses) == 1:
        mean = element("a", mean, href=addresses[0])
    parts: list[Content] = [element("span", mean, class_="mean"), footnotes.mark(entry)]
    if entry.std is not None:
        parts.append(element("small", f"± {number(entry.std, DIGITS)}"))
    if entry.low is not None and entry.high is not None:
        parts.append(element("small", f"{number(entry.low, DIGITS)}–{number(entry.high, DIGITS)}"))
    if entry.published is not None:
        parts.append(element("small", f"published {number(entry.published, DIGITS)}"))
        parts += [element("small", "(not comparable)")] if filled.smoke else []
    if len(addresses) > 1:
        runs = (element("a", str(i), href=address) for i, address in enumerate(addresses, 1))
        parts.append(element("small", "runs ", joined(runs, " ")))
    kind = "best" if entry.best else "none" if entry.mean is None else None
    return element("td", *parts, class_=kind)


def _interval_note(filled: ResultTable) -> Iterator[str]:
    if any(entry.low is not None for entry in filled.all_entries):
        yield "Ranges: 95 % bootstrap intervals over the test split, by group (slide or patient) where known."


def _plots(filled: ResultTable) -> list[Html]:
    lines = _lines(filled)
    if lines is not None:
        drawn = [part for metric in filled.metrics for part in _over_fractions(filled, metric, lines)]
        legend = line_legend([(name, number) for number, name in enumerate(lines)])
        return [row(*drawn), legend, note("Bars: 95 % intervals, for single runs.")] if drawn else []
    if len(filled.row_heads) < 2 or len(filled.column_heads) < 2:
        return []
    unlike = "loss" in filled.metrics and len({entry.compares for entry in _entries_with_mean(filled, "loss")}) > 1
    maps: list[Content] = []
    for metric, title in filled.metrics.items():
        means = [entry.mean for entry in _entries_with_mean(filled, metric) if entry.mean is not None]
        if not means or (metric == "loss" and unlike):
            continue
        alt = (
            f"Heat map of {title}: {_names(filled.rows)} down, {_names(filled.columns)} across,"
            f" from {number(min(means))} (dark) to {number(max(means))} (light); the values are in the table"
        )
        maps.append(figure(heat_map(filled, metric), _capital(title), alt=alt))
    reason = note("No heat map of the losses: those of different batch sizes, methods, temperatures or sets are not comparable.")
    return [*([row(*maps)] if maps else []), *([reason] if unlike else [])]


def _entries_with_mean(filled: ResultTable, metric: str) -> list[TableEntry]:
    entries = (cell[metric] for cells in filled.entries for cell in cells)
    return [entry for entry in entries if entry.mean is not None]


def _names(axes: tuple[str, ...]) -> str:
    return " and ".join(map(format_axis, axes))


Lines = dict[str, list[tuple[float, dict[str, TableEntry]]]]


def _lines(filled: ResultTable) -> Lines | None:
    """Fractions of the labels and table cells, by the values of the other axes. None for a table without fractions, or with more
    lines than can be told apart."""
    axes = (*filled.rows, *filled.columns)
    if "fraction" not in axes or not set(filled.metrics) <= set(METRICS):
        return None
    found: Lines = {}
    for row_head, cells in zip(filled.row_heads, filled.entries, strict=True):
        for column_head, cell in zip(filled.column_heads, cells, strict=True):
            at = dict(zip(axes, (*row_head, *column_head), strict=True))
            fraction = at.pop("fraction")
            name = ", ".join(format_axis_value(axis, value) for axis, value in at.items()) or filled.title
            found.setdefault(name, []).append((fraction, cell))
    # A line without values is left out of the legend.
    found = {name: points for name, points in found.items() if any(_has_values(cell) for _, cell in points)}
    shares = {fraction for points in found.values() for fraction, _ in points}
    return found if len(shares) > 1 and len(found) <= _MAX_LINES else None


def _has_values(cell: dict[str, TableEntry]) -> bool:
    return any(entry.mean is not None for entry in cell.values())


def _over_fractions(filled: ResultTable, metric: str, lines: Lines) -> Iterator[Html]:
    drawn = []
    for place, points in enumerate(lines.values()):
        entries = {share: cell[metric] for share, cell in points}
        means = {share: mean for share in sorted(entries) if (mean := entries[share].mean) is not None}
        low, high = ([getattr(entries[share], end) for share in means] for end in ("low", "high"))
        if means:
            ends = (None, None) if None in (*low, *high) else (low, high)
            drawn.append(plots.Line(place, list(means), list(means.values()), *ends))
    if drawn:
        title = filled.metrics[metric]
        alt = f"{_capital(title)} over the share of labels, of {'; '.join(lines)}; the values are in the table"
        yield figure(plots.over_fractions(drawn), _capital(title), alt=alt)
