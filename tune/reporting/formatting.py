"""What all formats of a table share: sub-tables, the text of an entry, footnotes, and links to reports.

A table with column axes has a sub-table for each metric. In a table without, each metric is a column.
"""

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from train.records.runs import Run
from tune.reporting.table_data import DIGITS, ResultTable, TableEntry
from tune.reporting.trial_metrics import format_axis_value

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_REPORT_NAME = "report.html"


class SubTable(NamedTuple):
    """A part of a table that fits on paper. title: of its metric, None if the columns are metrics; columns: their heads; rows:
    the values of the row axes as text, and the entries below the columns."""

    title: str | None
    columns: list[str]
    rows: list[tuple[list[str], list[TableEntry]]]


def sub_tables(table: ResultTable) -> list[SubTable]:
    """The table's parts: one for each metric if it has column axes."""
    heads = [[format_axis_value(*each) for each in zip(table.rows, head, strict=True)] for head in table.row_heads]

    def rows(entries):
        return list(zip(heads, entries, strict=True))

    if not table.columns:
        return [SubTable(None, list(table.metrics.values()), rows([list(row[0].values()) for row in table.entries]))]
    columns = [table.column_text(column) for column in range(len(table.column_heads))]
    return [
        SubTable(title, columns, rows([[cell[name] for cell in row] for row in table.entries]))
        for name, title in table.metrics.items()
    ]


class Footnotes:
    """Errors, each with the number that marks where it occurred."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def mark(self, entry: TableEntry) -> str:
        """The mark of an entry, such as ¹; nothing if it has no error."""
        if entry.error is None:
            return ""
        if entry.error not in self.sentences:
            self.sentences.append(entry.error)
        return str(self.sentences.index(entry.error) + 1).translate(_SUPERSCRIPTS)

    def lines(self) -> list[str]:
        """All footnotes, for below the table."""
        return [f"{str(number).translate(_SUPERSCRIPTS)} {sentence}" for number, sentence in enumerate(self.sentences, 1)]


def format_entry(entry: TableEntry) -> str:
    """The mean with its deviation, or a word that says why it is missing."""
    if entry.status in ("failed", "missing", "unplanned"):
        return {"failed": "failed", "missing": "not run", "unplanned": ""}[entry.status]
    if entry.mean is None:
        return "–"
    return f"{entry.mean:.{DIGITS}f}" + ("" if entry.std is None else f" ± {entry.std:.{DIGITS}f}")


def format_published(entry: TableEntry) -> str:
    """The published value, to follow ours."""
    return "" if entry.published is None else f" ({entry.published:.{DIGITS}f})"


def report_links(entry: TableEntry, folder: Path) -> list[str]:
    """The addresses of the reports of an entry's runs."""
    return [address for run in entry.runs if (address := report_link(run, folder))]


def report_link(run: Run, folder: Path) -> str | None:
    """The address of a run's report, relative to a folder; None if it has no report."""
    if run.url:
        return f"{quote(run.url, safe=':/')}/{_REPORT_NAME}"
    path = run.folder / _REPORT_NAME
    return quote(Path(os.path.relpath(path, folder.absolute())).as_posix()) if path.exists() else None
