"""What all forms of a table have in common: its parts, the words for an entry, footnotes, and where a run's report is.

A table with column axes is read figure by figure (first the accuracies of all rows and columns, then the next figure); in one
without, each figure is a column.
"""

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from train.records.runs import Run
from tune.table_data import DIGITS, Entry, FilledTable

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_REPORT_NAME = "report.html"


class Block(NamedTuple):
    """A part of a table that fits on paper. title: of its figure, or None where the columns are figures; columns: their heads;
    rows: the entries below them."""

    title: str | None
    columns: list[str]
    rows: list[list[Entry]]


def blocks(table: FilledTable) -> list[Block]:
    """The table's parts, one for each figure where it has column axes."""
    if not table.columns:
        return [Block(None, list(table.metrics.values()), [list(row[0].values()) for row in table.entries])]
    heads = [table.column_text(column) for column in range(len(table.column_heads))]
    return [Block(title, heads, [[cell[name] for cell in row] for row in table.entries]) for name, title in table.metrics.items()]


class Footnotes:
    """Errors, each with the number that stands where it occurred."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def mark(self, entry: Entry) -> str:
        """¹ or the like; nothing where there was no error."""
        if entry.error is None:
            return ""
        if entry.error not in self.sentences:
            self.sentences.append(entry.error)
        return str(self.sentences.index(entry.error) + 1).translate(_SUPERSCRIPTS)

    def lines(self) -> list[str]:
        """All of them, to stand below."""
        return [f"{str(number).translate(_SUPERSCRIPTS)} {sentence}" for number, sentence in enumerate(self.sentences, 1)]


def entry_text(entry: Entry) -> str:
    """The figure with its deviation, or in a word why there is none."""
    if entry.status in ("failed", "missing", "unplanned"):
        return {"failed": "failed", "missing": "not run", "unplanned": ""}[entry.status]
    if entry.mean is None:
        return "–"
    return f"{entry.mean:.{DIGITS}f}" + ("" if entry.std is None else f" ± {entry.std:.{DIGITS}f}")


def published_text(entry: Entry) -> str:
    """The published figure, to stand behind ours."""
    return "" if entry.published is None else f" ({entry.published:.{DIGITS}f})"


def report_address(run: Run, folder: Path) -> str | None:
    """The address of a run's report, relative to a folder; None where the run has left none."""
    if run.url:
        return f"{quote(run.url, safe=':/')}/{_REPORT_NAME}"
    path = run.folder / _REPORT_NAME
    return quote(Path(os.path.relpath(path, folder.absolute())).as_posix()) if path.exists() else None
