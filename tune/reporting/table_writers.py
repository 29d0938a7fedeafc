"""Write a study's tables to the console, to Markdown, CSV and Parquet files, and to the study's report."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from train.records.json_files import replacing, write_text
from tune.reporting.formatting import Footnotes, format_entry, format_published, report_links, sub_tables
from tune.reporting.table_data import ResultTable, TableEntry
from tune.reporting.table_notes import SMOKE, notes_below
from tune.reporting.trial_metrics import format_axis
from tune.study.schema import Study

if TYPE_CHECKING:
    from tune.execution.study_state import StudyResult

_PUBLISHED = "In parentheses: the published value."

# The columns of an entry in CSV and Parquet, after the axes and the metric's name.
_ENTRY_COLUMNS = {
    "mean": pa.float64(),
    "std": pa.float64(),
    "low": pa.float64(),
    "high": pa.float64(),
    "seeds": pa.int64(),
    "published": pa.float64(),
    "status": pa.string(),
    "error": pa.string(),
}


def console_table(table: ResultTable) -> Table:
    """The table for the console, with its notes below."""
    parts, footnotes = sub_tables(table), Footnotes()
    shown = Table(title=Text(table.title, style="bold"), title_justify="left", caption_justify="left")
    for title in (*([""] if table.columns else []), *map(format_axis, table.rows)):
        shown.add_column(Text(title), overflow="fold")  # names that are cut look alike
    for head in parts[0].columns:
        shown.add_column(Text(head), justify="right", overflow="fold")
    for part in parts:
        for row, (heads, entries) in enumerate(part.rows):
            metric = [Text(part.title if row == 0 else "")] if part.title else []
            shown.add_row(*metric, *map(Text, heads), *(_console_entry(entry, footnotes) for entry in entries))
        shown.add_section()
    shown.caption = Text("\n".join([*([SMOKE] if table.smoke else []), *footnotes.lines(), *_below(table)]), style="")
    return shown


def _console_entry(entry: TableEntry, footnotes: Footnotes) -> Text:
    text = Text(format_entry(entry), style="bold" if entry.best else "red" if entry.status == "failed" else "")
    return text + Text(footnotes.mark(entry) + format_published(entry), style="dim")


def _below(table: ResultTable) -> list[str]:
    published = any(entry.published is not None for entry in table.all_entries)
    return [*([_PUBLISHED] if published else []), *notes_below(table)]


def write_tables(study: Study, tables: Sequence[ResultTable], folder: Path) -> list[Path]:
    """Write each table as Markdown, as CSV and as Parquet, named after its title. Returns their paths.

    CSV and Parquet have a row for each metric of a planned entry: the axes' values, metric, mean, std, low, high, seeds,
    published, status, error, run (names, with "; " between them).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table, name in zip(tables, _file_names(tables), strict=True):
        markdown, text, parquet = (folder / f"{name}{ending}" for ending in (".md", ".csv", ".parquet"))
        write_text(markdown, _markdown(study, table, folder))
        rows = _long_rows(table)
        _write_csv(text, table, rows)
        _write_parquet(parquet, study, table, rows)
        paths += [markdown, text, parquet]
    return paths


def _file_names(tables):
    names: list[str] = []
    for table in tables:
        plain = re.sub(r"[^\w.]+", "-", table.title.lower()).strip("-.") or "table"
        number = 1
        while (name := plain if number == 1 else f"{plain}-{number}") in names:
            number += 1
        names.append(name)
    return names


def _markdown(study: Study, table: ResultTable, folder: Path) -> str:
    footnotes = Footnotes()
    lines = [f"# {_escaped(table.title)}", "", f"Study {_escaped(study.name)}."]
    lines += ["", f"**{_escaped(SMOKE)}**"] if table.smoke else []
    for part in sub_tables(table):
        lines += ["", *([f"## {_escaped(part.title)}", ""] if part.title else [])]
        lines.append(_line([*(_escaped(format_axis(axis)) for axis in table.rows), *map(_escaped, part.columns)]))
        lines.append(_line([*(":--" for _ in table.rows), *("--:" for _ in part.columns)]))
        for heads, entries in part.rows:
            lines.append(_line([*map(_escaped, heads), *(_markdown_entry(entry, footnotes, folder) for entry in entries)]))
    for text in (*footnotes.lines(), *_below(table)):
        lines += ["", _escaped(text)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_entry(entry: TableEntry, footnotes: Footnotes, folder: Path) -> str:
    text = format_entry(entry)
    addresses = report_links(entry, folder)
    if len(addresses) == 1:
        text = f"[{text}]({addresses[0]})"
    if entry.best:
        text = f"**{text}**"
    if len(addresses) > 1:
        text += " " + " ".join(f"[{number}]({address})" for number, address in enumerate(addresses, 1))
    return text + footnotes.mark(entry) + format_published(entry)


def _escaped(text: str) -> str:
    """Text with the characters escaped that Markdown would interpret, also in a table."""
    return re.sub(r"([\\`*_\[\]<>|&#~$])", r"\\\1", " ".join(text.split()))


def _long_rows(table: ResultTable) -> list[dict[str, Any]]:
    return [
        dict(zip((*table.rows, *table.columns), (*row_head, *column_head), strict=True))
        | {"metric": metric, **{name: getattr(entry, name) for name in _ENTRY_COLUMNS}}
        | {"run": "; ".join(run.name for run in entry.runs) or None}
        for row_head, cells in zip(table.row_heads, table.entries, strict=True)
        for column_head, cell in zip(table.column_heads, cells, strict=True)
        for metric, entry in cell.items()
        if entry.status != "unplanned"
    ]


def _write_csv(path: Path, table: ResultTable, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*table.rows, *table.columns, "metric", *_ENTRY_COLUMNS, "run"])
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, study: Study, table: ResultTable, rows: Sequence[dict[str, Any]]) -> None:
    axes = {axis: _axis_column([row[axis] for row in rows]) for axis in (*table.rows, *table.columns)}
    types = {"metric": pa.string(), **_ENTRY_COLUMNS, "run": pa.string()}
    columns = axes | {name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()}
    about = {"study": study.name, "title": table.title, "smoke": str(table.smoke).lower()}
    with replacing(path) as partial:
        pq.write_table(pa.table(columns).replace_schema_metadata(about), partial)


def _axis_column(values: Sequence[Any]) -> pa.Array:
    """Numbers if all values are numbers; otherwise text, as in the CSV file."""
    kinds = {type(value) for value in values if value is not None}
    for kind, arrow in (({int}, pa.int64()), ({bool}, pa.bool_()), ({int, float}, pa.float64())):
        if kinds and kinds <= kind:
            return pa.array(values, arrow)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def study_report(study: Study, outcome: "StudyResult", tables: Sequence[ResultTable], path: Path) -> Path:
    """Write the study's report, one self-contained HTML file. Returns its path.

    Raises ValueError where a run's folder is damaged.
    """
    from tune.reporting.study_report import page  # matplotlib takes seconds to import

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(study, outcome, tables, path.parent))
    return path
