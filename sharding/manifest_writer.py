"""Write manifest and quarantine from the rows files of all shards, one shard at a time to save memory."""

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

from sharding.manifest import COLUMNS, QUARANTINE_COLUMNS, WORDS, as_array
from sharding.shard_writer import ROWS, ShardRows, read_rows
from sharding.sources.scan import source_names
from sharding.splits.assign import content_digests
from sharding.staging import write_atomically

_ROW_GROUP = 2**16  # rows


class WrittenShards(NamedTuple):
    """The shards that a build has written: number of the first one, and the rows of the scan that each is made of."""

    folder: Path
    first: int
    rows: Sequence[np.ndarray]
    files: pa.Table  # of the scan

    def read(self) -> Iterator[tuple[np.ndarray, ShardRows]]:
        """For each shard, its rows in the scan and what was recorded of them."""
        for number, rows in enumerate(self.rows, start=self.first):
            yield rows, read_rows(self.folder, number)

    def sources(self, rows: np.ndarray, chosen: pa.ChunkedArray) -> pa.Array:
        """The paths of the chosen ones among these rows of the scan."""
        return pa.array(source_names(self.files.take(pa.array(rows[chosen.to_numpy()]))), pa.string())


@dataclass
class ShardContents:
    """What the shards of one build contain. Arrays have one entry per packed patch, in id order.

    files: (n,) int64, the row in the scan. contents: (n, 2) uint64, the first 16 bytes of each source's sha256. digests: the
    sha256 of each written file. counts: patches per value, for each dictionary column that the shards fill. refused: files per
    reason. psnr: (m,) dB, where it was measured, and psnr_files: (m,) their rows in the scan. first_refused: the row in the
    scan, and the detail.
    """

    files: np.ndarray
    contents: np.ndarray
    psnr: np.ndarray
    psnr_files: np.ndarray
    digests: dict[str, str]
    counts: dict[str, Counter]
    refused: Counter
    first_refused: tuple[int, str] | None


def read_contents(written: WrittenShards) -> ShardContents:
    """Collect what is in the shards, column by column."""
    files, contents, psnr, psnr_files = [], [], [], []
    digests: dict[str, str] = {}
    counts = {name: Counter[str]() for name in ROWS.names if COLUMNS.get(name) == WORDS}
    refused = Counter[str]()
    first_refused = None
    for rows, shard in written.read():
        digests |= shard.files
        packed = pc.is_null(shard.rows["reason"])
        good = shard.rows.filter(packed)
        files.append(rows[packed.to_numpy()])
        contents.append(content_digests(good["source_sha256"]))
        known = pc.is_valid(good["psnr"]).to_numpy()
        psnr.append(good["psnr"].to_numpy()[known])
        psnr_files.append(files[-1][known])
        for name, counter in {**counts, "reason": refused}.items():
            counter.update({row["values"]: row["counts"] for row in pc.value_counts(shard.rows[name].drop_null()).to_pylist()})
        if first_refused is None and len(good) < len(rows):
            index = pc.index(packed, False).as_py()
            first_refused = int(rows[index]), shard.rows["detail"][index].as_py()
    return ShardContents(
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
    path: Path,
    written: WrittenShards,
    contents: ShardContents,
    columns: dict[str, tuple[np.ndarray, list[str]]],
    before: pa.Table | None,
) -> str:
    """Write manifest.parquet: the rows of the set that is appended to, then those of the new shards. Returns its sha256.

    columns: further dictionary columns by name, as codes and names; codes: (n,) int64 of the new patches in id order, -1 for
    null. The code of "class" is the label. before: the manifest of the set that is appended to.
    """
    columns = columns | {name: (np.zeros(0, np.int64), list(counter)) for name, counter in contents.counts.items()}
    dictionaries = {name: _all_values(names, before, name) for name, (_, names) in columns.items()}
    extra = [name for name in columns if name not in COLUMNS]
    schema = pa.schema([(name, COLUMNS.get(name, WORDS)) for name in [*COLUMNS, *extra]])

    def tables() -> Iterator[pa.Table]:
        if before is not None:
            encoded = {name: _dictionary_encoded(before[name], values) for name, values in dictionaries.items()}
            yield _table({name: before[name] for name in before.column_names} | encoded, schema)
        first_id, done = 0 if before is None else len(before), 0
        for number, (rows, shard) in enumerate(written.read(), start=written.first):
            packed = pc.is_null(shard.rows["reason"])
            good = shard.rows.filter(packed)
            here = slice(done, done + len(good))
            values = {name: good[name] for name in good.column_names}
            values["id"] = np.arange(first_id + here.start, first_id + here.stop)
            values["shard"] = np.full(len(good), number)
            values["label"] = columns["class"][0][here]
            unchanged = pc.equal(good["source_sha256"], good["sha256"])
            values["source_sha256"] = pc.if_else(unchanged, pa.scalar(None, pa.string()), good["source_sha256"])
            values["source"] = written.sources(rows, packed)
            for name, (codes, names) in columns.items():
                if name not in contents.counts:
                    values[name] = pa.array(names, pa.string()).take(pa.array(codes[here], mask=codes[here] < 0))
            encoded = {name: _dictionary_encoded(values[name], known) for name, known in dictionaries.items()}
            yield _table(values | encoded, schema)
            done = here.stop

    return _write_tables(path, schema, tables())


def write_quarantine(path: Path, written: WrittenShards, before: pa.Table | None) -> str:
    """Write quarantine.parquet: what the set that is appended to had refused, then the new refusals. Returns its sha256."""
    schema = pa.schema(list(QUARANTINE_COLUMNS.items()))

    def tables() -> Iterator[pa.Table]:
        if before is not None:
            yield before.cast(schema)
        for rows, shard in written.read():
            refused = pc.is_valid(shard.rows["reason"])
            bad = shard.rows.filter(refused)
            yield _table(
                {
                    "source": written.sources(rows, refused),
                    "reason": bad["reason"],
                    "detail": bad["detail"],
                    "sha256": bad["source_sha256"].fill_null(""),  # "" for a file that could not be read
                },
                schema,
            )

    return _write_tables(path, schema, tables())


def _write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Write Parquet whose bytes depend on the rows (and the version of pyarrow) alone, not on how the tables divide them."""

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression="zstd", store_schema=True) as writer:
            pending = schema.empty_table()
            for table in tables:
                pending = pa.concat_tables([pending, table])
                while len(pending) >= _ROW_GROUP:
                    writer.write_table(pending.slice(0, _ROW_GROUP).combine_chunks(), row_group_size=_ROW_GROUP)
                    pending = pending.slice(_ROW_GROUP)
            writer.write_table(pending.combine_chunks(), row_group_size=_ROW_GROUP)

    write_atomically(path, write)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_values(names: Iterable[str], before: pa.Table | None, column: str) -> pa.Array:
    """Every value of a column, sorted, so that the bytes do not depend on which one comes first."""
    values = set(names)
    if before is not None:
        values |= set(before[column].unique().cast(pa.string()).drop_null().to_pylist())
    return pa.array(sorted(values), pa.string())


def _dictionary_encoded(column: pa.ChunkedArray | pa.Array, dictionary: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pc.index_in(as_array(column), dictionary), dictionary)


def _table(values: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    columns = [
        value.cast(field.type) if isinstance(value, pa.Array | pa.ChunkedArray) else pa.array(value, field.type)
        for field, value in ((field, values[field.name]) for field in schema)
    ]
    return pa.table(columns, schema=schema)
