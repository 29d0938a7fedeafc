"""The notes of all shards -> manifest and quarantine, shard by shard, so that memory does not grow with a set's strings."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.manifest import COLUMNS, QUARANTINE_COLUMNS, WORDS
from sharding.shard_writer import ROWS, read_note
from sharding.sources.scan import source_names
from sharding.splits.assign import content_digests
from sharding.staging import write_whole

_ROW_GROUP = 2**16  # rows


class Written(NamedTuple):
    """The shards that a build has written into its folder: the numbers from `first` on, and of which rows of the scan each is."""

    folder: Path
    first: int
    rows: Sequence[np.ndarray]
    files: pa.Table  # of the scan

    def notes(self) -> Iterator[tuple[int, np.ndarray, pa.Table, dict[str, str]]]:
        """Of each shard: its number, its rows in the scan, its note and the sha256 of its files."""
        for number, rows in enumerate(self.rows, start=self.first):
            note = read_note(self.folder, number)
            yield number, rows, note.rows, note.files

    def sources(self, rows: np.ndarray, chosen: pa.ChunkedArray) -> pa.Array:
        """The names of the chosen ones among these rows of the scan."""
        return pa.array(source_names(self.files.take(pa.array(rows[chosen.to_numpy()]))), pa.string())


@dataclass
class Contents:
    """What the shards of one build hold. Arrays have one entry per packed patch, in id order.

    files: (n,) int64, the row in the scan; contents: (n, 2) uint64, the first 16 bytes of each source's sha256. digests: the
    sha256 of each written file. counts: for each column of words that the notes fill, how many patches have which word; reasons:
    how many files were refused for which. psnr: (m,) dB, those that were measured, and psnr_files: (m,) their rows in the scan.
    first_refused: the row in the scan, and the detail.
    """

    files: np.ndarray
    contents: np.ndarray
    psnr: np.ndarray
    psnr_files: np.ndarray
    digests: dict[str, str]
    counts: dict[str, Counter]
    refused: Counter
    first_refused: tuple[int, str] | None


def read_contents(written: Written) -> Contents:
    """What the notes say, column by column."""
    files, contents, psnr, psnr_files = [], [], [], []
    digests: dict[str, str] = {}
    counts = {name: Counter[str]() for name in ROWS.names if COLUMNS.get(name) == WORDS}
    refused = Counter[str]()
    first_refused = None
    for _, rows, note, names in written.notes():
        digests |= names
        packed = pc.is_null(note["reason"])
        good = note.filter(packed)
        files.append(rows[packed.to_numpy()])
        contents.append(content_digests(good["source_sha256"]))
        known = pc.is_valid(good["psnr"]).to_numpy()
        psnr.append(good["psnr"].to_numpy()[known])
        psnr_files.append(files[-1][known])
        for name, counter in {**counts, "reason": refused}.items():
            counter.update({row["values"]: row["counts"] for row in pc.value_counts(note[name].drop_null()).to_pylist()})
        if first_refused is None and len(good) < len(note):
            place = pc.index(packed, False).as_py()
            first_refused = int(rows[place]), note["detail"][place].as_py()
    return Contents(
        files=np.concatenate(files),
        contents=np.concatenate(contents),
        psnr=np.concatenate(psnr),
        psnr_files=np.concatenate(psnr_files),
        digests=digests,
        counts=counts,
        refused=refused,
        first_refused=first_refused,
    )


def write_manifest(
    path: Path, written: Written, contents: Contents, columns: dict[str, tuple[np.ndarray, list[str]]], before: pa.Table | None
) -> str:
    """Write manifest.parquet and return its sha256: the rows of a set that grows, then those of the new shards.

    columns: by name the further columns of words as codes and names; codes: (n,) int64 of the new patches in id order, -1 for
    null. The code of "class" is the label. before: the manifest of the set that grows.
    """
    none = np.zeros(0, np.int64)
    columns = columns | {name: (none, list(counter)) for name, counter in contents.counts.items()}
    dictionaries = {name: _merged(names, before, name) for name, (_, names) in columns.items()}
    extra = [name for name in columns if name not in COLUMNS]
    schema = pa.schema([(name, COLUMNS.get(name, WORDS)) for name in [*COLUMNS, *extra]])

    def tables() -> Iterator[pa.Table]:
        if before is not None:
            values = {name: _as_words(before[name], words) for name, words in dictionaries.items()}
            yield _table({name: before[name] for name in before.column_names} | values, schema)
        start, done = 0 if before is None else len(before), 0
        for number, rows, note, _ in written.notes():
            packed = pc.is_null(note["reason"])
            good = note.filter(packed)
            here = slice(done, done + len(good))
            values = {name: good[name] for name in good.column_names}
            values["id"] = np.arange(start + here.start, start + here.stop)
            values["shard"] = np.full(len(good), number)
            values["label"] = columns["class"][0][here]
            same = pc.equal(good["source_sha256"], good["sha256"])
            values["source_sha256"] = pc.if_else(same, pa.scalar(None, pa.string()), good["source_sha256"])
            values["source"] = written.sources(rows, packed)
            for name, (codes, names) in columns.items():
                if name not in contents.counts:
                    values[name] = pa.array(names, pa.string()).take(pa.array(codes[here], mask=codes[here] < 0))
            yield _table(values | {name: _as_words(values[name], words) for name, words in dictionaries.items()}, schema)
            done = here.stop

    return _write_tables(path, schema, tables())


def write_quarantine(path: Path, written: Written, before: pa.Table | None) -> str:
    """Write quarantine.parquet and return its sha256: what the set that grows had refused, then what the new shards did."""
    schema = pa.schema(list(QUARANTINE_COLUMNS.items()))

    def tables() -> Iterator[pa.Table]:
        if before is not None:
            yield before.cast(schema)
        for _, rows, note, _ in written.notes():
            refused = pc.is_valid(note["reason"])
            bad = note.filter(refused)
            sha256 = bad["source_sha256"].fill_null("")  # of a file that could not be read
            values = {
                "source": written.sources(rows, refused),
                "reason": bad["reason"],
                "detail": bad["detail"],
                "sha256": sha256,
            }
            yield _table(values, schema)

    return _write_tables(path, schema, tables())


def _write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Write Parquet whose bytes depend on the rows alone (and on the version of pyarrow), not on how they were cut."""

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression="zstd", store_schema=True) as writer:
            waiting = schema.empty_table()
            for table in tables:
                waiting = pa.concat_tables([waiting, table])
                while len(waiting) >= _ROW_GROUP:
                    writer.write_table(waiting.slice(0, _ROW_GROUP).combine_chunks(), row_group_size=_ROW_GROUP)
                    waiting = waiting.slice(_ROW_GROUP)
            writer.write_table(waiting.combine_chunks(), row_group_size=_ROW_GROUP)

    write_whole(path, write)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _merged(names: Iterable[str], before: pa.Table | None, column: str) -> pa.Array:
    """Every word of a column, sorted, so that the bytes do not depend on which comes first."""
    known = set(names)
    if before is not None:
        known |= set(before[column].unique().cast(pa.string()).drop_null().to_pylist())
    return pa.array(sorted(known), pa.string())


def _as_words(column: pa.ChunkedArray | pa.Array, dictionary: pa.Array) -> pa.DictionaryArray:
    plain = column.cast(pa.string())
    array = pa.concat_arrays(plain.chunks) if isinstance(plain, pa.ChunkedArray) and plain.num_chunks else plain
    return pa.DictionaryArray.from_arrays(pc.index_in(array, dictionary), dictionary)


def _table(values: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    columns = [
        value.cast(field.type) if isinstance(value, pa.Array | pa.ChunkedArray) else pa.array(value, field.type)
        for field, value in ((field, values[field.name]) for field in schema)
    ]
    return pa.table(columns, schema=schema)
