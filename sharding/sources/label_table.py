"""`--table`: a table with the fields of each image. It has a column `path`, and a column for each field.

A path is absolute, or relative to a source with `/` between folders. The table is Parquet, or CSV in UTF-8 with commas,
semicolons or tabs. Values are text: from CSV unchanged, from Parquet as one would write them. An empty cell is an empty field.
Paths are in NFC; values are normalized (sharding.field_values), like those of a layout.
"""

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from sharding.field_values import normalize_column
from sharding.sources.file_listing import counted
from sharding.sources.layout import RESERVED

PATH = "path"

_HEAD = 2**16  # bytes at the start of a file by which its format is recognised
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# The names of pandas' index columns, which are no fields.
_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


@dataclass
class LabelTable:
    """A table: (n,) paths, (n,) values of each field, and (n,) the first row with the same path. file: its path in messages."""

    file: str
    paths: pa.StringArray
    first: np.ndarray
    fields: dict[str, pa.DictionaryArray]
    notes: list[str]


class SourcePaths(NamedTuple):
    """A source's absolute path, and the path of each of its images below it (both in NFC)."""

    root: str
    relative: pa.ChunkedArray


class UnmatchedRow(NamedTuple):
    """A row without an image. path: below the source with that number (the first if it may be any), absolute if None."""

    source: int | None
    path: str
    row: int


class TableMatch(NamedTuple):
    """A table matched with images. rows: for each source, (n,) the table's row for each image, null if it has none."""

    rows: list[pa.ChunkedArray]
    missing: list[UnmatchedRow]
    notes: list[str]


def read_label_table(path: str) -> LabelTable:
    """Read a table. Raises ValueError when it cannot be read, has no column `path`, or has a column twice."""
    table = _read_table(path)
    columns = table.column_names
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"--table {path} has the column {twice[0]!r} more than once: remove one of them")
    if PATH not in columns:
        raise ValueError(
            f"--table {path} has no column {PATH!r} but {', '.join(map(repr, columns))}: rename the one with the paths"
        )
    notes = []
    reserved = (RESERVED | {"name"}) - {PATH}
    if not_taken := [name for name in columns if name in reserved]:
        notes.append(f"--table: {', '.join(not_taken)} not taken, because the set fills columns of these names itself")
    if any(_NUMBERS.fullmatch(name) for name in columns):
        notes.append("--table: a column without a name (row numbers) not taken")
    fields = [name for name in columns if name not in reserved | {PATH} and not _NUMBERS.fullmatch(name)]

    paths = _text(table[PATH], path, PATH)
    if empty := paths.null_count:
        notes.append(f"--table: {counted(empty, 'row')} without a path left out")
        table, paths = table.filter(pc.is_valid(paths)), paths.drop_null()
    if not len(paths):
        raise ValueError(f"--table {path} has no row with a path")
    paths = pc.replace_substring_regex(paths, r"^(\./+)+", "")  # as `find .` prints them
    words = {}
    for name in fields:
        values, more = normalize_column(pa.chunked_array([_text(table[name], path, name).dictionary_encode()]), name)
        words[name] = values.chunk(0)
        notes += [f"--table: {note}" for note in more]
    return LabelTable(path, paths, _first_rows(path, paths, words), words, notes)


def _read_table(path: str) -> pa.Table:
    try:
        if not stat.S_ISREG((status := os.stat(path)).st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"--table {path} is not a file: give a .csv, .tsv or .parquet file")  # opening a pipe would block
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            if head.startswith(b"PAR1"):
                return pq.read_table(file)
            if head.startswith((b"PK", b"\xd0\xcf\x11\xe0")):
                raise ValueError(f"--table {path} is a workbook: save it as CSV UTF-8")
            if head.startswith(_UTF16):
                raise ValueError(f"--table {path} is not in UTF-8: save it as CSV UTF-8")
            return _read_csv(file.read(), head)
    except FileNotFoundError:
        raise ValueError(f"--table {path}: there is no such file; give a .csv, .tsv or .parquet") from None
    except IsADirectoryError:
        raise ValueError(f"--table {path} is a folder: give a .csv, .tsv or .parquet file") from None
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            raise ValueError(f"--table {path} is not in UTF-8: save it as CSV UTF-8") from None
        raise ValueError(f"--table {path} cannot be read: {error}") from None
    except UnicodeDecodeError:  # in the names of the columns
        raise ValueError(f"--table {path} is not in UTF-8: save it as CSV UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"--table {path} cannot be read: {error}") from None


def _read_csv(data: bytes, head: bytes) -> pa.Table:
    # Spreadsheets write ; in countries with a decimal comma. The header decides.
    header = re.sub(rb'"[^"]*"', b"", re.split(rb"[\r\n]", head.lstrip(b"\xef\xbb\xbf\r\n"), maxsplit=1)[0])
    delimiter = max(",", ";", "\t", key=lambda mark: header.count(mark.encode()))
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    reading = pa.csv.ReadOptions(use_threads=False)  # so that errors name the row
    with pa.csv.open_csv(io.BytesIO(data), read_options=reading, parse_options=parsing) as reader:
        names = reader.schema.names
    as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), null_values=[], strings_can_be_null=False)
    return pa.csv.read_csv(io.BytesIO(data), read_options=reading, parse_options=parsing, convert_options=as_text)


def _text(column: pa.ChunkedArray, path: str, name: str) -> pa.StringArray:
    """A column's values as text, null for empty cells."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        values = column.unique()
        text = values.cast(pa.string())
    except pa.ArrowException:
        raise ValueError(f"--table {path}: the column {name!r} is {column.type}, which is not text: write it as text") from None
    if pa.types.is_floating(values.type):
        text = pa.array([_number(v, t) for v, t in zip(values.to_pylist(), text.to_pylist(), strict=True)], pa.string())
    text = pc.utf8_normalize(text, form="NFC")
    text = pc.if_else(pc.equal(text, ""), None, text)
    found = pc.take(text, pc.index_in(column, value_set=values))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _number(value: float | None, text: str | None) -> str | None:
    """A float as text; NaN is None. Whole numbers have no point: pandas stores integers with gaps as floats."""
    if value is None or value != value:
        return None
    return str(int(value)) if abs(value) < float("inf") and value == int(value) else text


def match_table(table: LabelTable, sources: Sequence[SourcePaths]) -> TableMatch:
    """Find the table's row for each image of each source.

    Raises ValueError when two rows of a path differ, when a path belongs to images of two sources, or when no image has a row.
    """
    owner = np.full(len(table.paths), -1)  # the source of each row's image
    found: list[pa.ChunkedArray] = []
    for number, source in enumerate(sources):
        keys = _keys(table.paths, source.root)
        first = table.first if keys is table.paths else _first_rows(table.file, keys, table.fields)
        found.append(pc.index_in(source.relative, value_set=keys))
        has_image = np.zeros(len(owner), bool)
        has_image[found[-1].drop_null().to_numpy()] = True
        named = np.flatnonzero((first >= 0) & has_image[first])  # the first row of a path and its repetitions
        if (twice := owner[named] >= 0).any():
            row = int(named[twice][0])
            raise ValueError(
                f"--table {table.file}: {table.paths[row].as_py()!r} is an image of {sources[owner[row]].root} and one of "
                f"{source.root}: write absolute paths, or pack one source at a time"
            )
        owner[named] = number
    notes = list(table.notes)
    images, without = sum(map(len, found)), sum(rows.null_count for rows in found)
    if without:
        lost = next(
            source.relative.filter(pc.is_null(rows)) for source, rows in zip(sources, found, strict=True) if rows.null_count
        )
        example = lost[0].as_py()
        if without == images:
            raise ValueError(
                f"--table {table.file} has no row for any of {counted(images, 'image')}, for example {example!r}; its first path "
                f"is {table.paths[0].as_py()!r}: write paths as they are below the source, or absolute ones"
            )
        notes.append(f"{counted(without, 'file')} left out: --table has no row for it, for example {example!r}")
    missing = _missing(table, np.flatnonzero(owner < 0), [source.root for source in sources])
    return TableMatch(found, missing, notes)


def _keys(paths: pa.StringArray, root: str) -> pa.StringArray:
    """The paths below a source; null for an absolute path elsewhere."""
    absolute = pc.starts_with(paths, "/")
    if not pc.any(absolute).as_py():
        return paths
    below = _folder(root)
    inside = pc.utf8_slice_codeunits(paths, len(below))
    return pc.if_else(absolute, pc.if_else(pc.starts_with(paths, below), inside, None), paths)


def _folder(root: str) -> str:
    return root.rstrip("/") + "/"


def _first_rows(file: str, keys: pa.StringArray, fields: Mapping[str, pa.DictionaryArray]) -> np.ndarray:
    """(n,) int64: the first row with the same path, -1 for rows without a path. Raises ValueError when such rows differ."""
    first = pc.index_in(keys, value_set=keys, skip_nulls=True).fill_null(-1).to_numpy().astype(np.int64)
    again = np.flatnonzero((first >= 0) & (first != np.arange(len(first))))
    for name, words in fields.items():
        codes = words.indices.fill_null(-1).to_numpy()
        if (differ := codes[again] != codes[first[again]]).any():
            row = int(again[differ][0])
            two = " and ".join(repr(words[int(i)].as_py() or "") for i in (first[row], row))
            raise ValueError(
                f"--table {file} contradicts itself about {keys[row].as_py()!r}: its {name} is {two}; remove one of the rows"
            )
    return first


def _missing(table: LabelTable, rows: np.ndarray, roots: Sequence[str]) -> list[UnmatchedRow]:
    """The rows without an image, one for each path, ordered by source and path."""
    missing: dict[tuple[int, str], int] = {}
    for row, path in zip(rows.tolist(), table.paths.take(pa.array(rows)).to_pylist(), strict=True):
        owners = [number for number, root in enumerate(roots) if path.startswith(_folder(root))]
        if not path.startswith("/"):
            missing.setdefault((0, path), row)
        elif owners:
            missing.setdefault((owners[0], path.removeprefix(_folder(roots[owners[0]]))), row)
        else:
            missing.setdefault((-1, path), row)
    return [UnmatchedRow(None if source < 0 else source, path, row) for (source, path), row in sorted(missing.items())]
