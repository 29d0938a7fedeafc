"""One shard: its files read once, each treated, and written as a tar with its index, beside a note of what is in it.

The note (`shard-000000.rows`, an Arrow file) has one row per source file, packed or refused. From all notes follow manifest
and quarantine, and by its note a shard of a build that was cut off is known again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.images.image_checks import Refusal, silent_decoders
from sharding.images.image_processing import Treatment, treat
from sharding.manifest import COLUMNS, FORMAT_VERSION, WORDS, index_file, shard_file
from sharding.process_pool import tick
from sharding.shard_format import BLOCK, EXTENSIONS, index_text, member, sample_key, tar_end
from sharding.sources.archives import FileReader
from sharding.staging import rows_file, write_pieces, write_whole

# What a note says of each source file. `reason` is null where it was packed; then all other columns but `detail` are as in the
# manifest. Those that a single shard does not know are filled in by `sharding.manifest_writer`.
ROWS = pa.schema(
    {"reason": pa.string(), "detail": pa.string()}
    | {
        name: pa.string() if kind == WORDS else kind
        for name, kind in COLUMNS.items()
        if name not in ("id", "shard", "label", "class", "group", "split", "source")
    }
)
_TICK = 32  # files between two words on progress


class ShardTask(NamedTuple):
    """One shard to write. files: the rows of a scan, in order; labels: (n,) class index, -1 where unlabelled."""

    number: int
    files: pa.Table
    labels: np.ndarray


class Note(NamedTuple):
    """What is in a written shard: a table by ROWS, and the sha256 of its files by name."""

    rows: pa.Table
    files: dict[str, str]


def write_shard(task: ShardTask, *, folder: Path, treatment: Treatment) -> None:
    """Write a shard into the folder: tar, index and, last, the note. One that an earlier build left is kept if it is the same."""
    identity = _identity(task, treatment)
    if _is_there(task, identity, folder):
        return
    rows = _Rows()
    tar, index = folder / shard_file(task.number), folder / index_file(task.number)
    with silent_decoders(), FileReader() as reader:
        tar_digest = write_pieces(tar, _tar_pieces(task, treatment, reader, rows))
    index_digest = write_pieces(index, [rows.index_text().encode()])
    metadata = {"identity": identity, tar.name: tar_digest, index.name: index_digest}
    table = rows.table().replace_schema_metadata(metadata)

    def write(path: Path) -> None:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)

    write_whole(folder / rows_file(task.number), write)


def read_note(folder: Path, number: int) -> Note:
    """The note of a shard that is there."""
    with pa.OSFile(str(folder / rows_file(number))) as file:
        table = pa.ipc.open_file(file).read_all()
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return Note(table.replace_schema_metadata(None), {name: metadata[name] for name in (shard_file(number), index_file(number))})


def read_digest(reader: FileReader, container: bytes | None, path: bytes, offset: int, size: int) -> str | None:
    """The sha256 of a source file, or None where it cannot be read."""
    try:
        return hashlib.sha256(reader.read(container, path, offset, size)).hexdigest()
    except OSError:
        return None


class _Rows:
    """The rows of a note, column by column."""

    def __init__(self) -> None:
        self.columns: dict[str, list] = {name: [] for name in ROWS.names}
        self.labels: list[int] = []

    def add(self, **values) -> None:
        for name, column in self.columns.items():
            column.append(values.get(name))

    def table(self) -> pa.Table:
        return pa.table(self.columns, schema=ROWS)

    def index_text(self) -> str:
        packed = [i for i, reason in enumerate(self.columns["reason"]) if reason is None]
        keys, formats, offsets, sizes = ([self.columns[name][i] for i in packed] for name in ("key", "format", "offset", "size"))
        return index_text(keys, [EXTENSIONS[name] for name in formats], offsets, sizes, self.labels)


def _tar_pieces(task: ShardTask, treatment: Treatment, reader: FileReader, rows: _Rows) -> Iterator[bytes]:
    """The bytes of a shard, piece by piece; what was packed and refused goes into rows."""
    length = 0
    for done, (place, label) in enumerate(zip(places(task.files), task.labels.tolist(), strict=True), start=1):
        if not done % _TICK:
            tick(_TICK)
        try:
            data = reader.read(*place)
        except OSError as error:
            rows.add(reason="unreadable", detail=error.strerror or "cannot be read")
            continue
        digest = hashlib.sha256(data).hexdigest()
        stored = treat(data, treatment)
        if isinstance(stored, Refusal):
            rows.add(reason=stored.reason, detail=stored.detail, source_sha256=digest)
            continue
        key = sample_key(task.number, len(rows.labels), os.path.basename(os.fsdecode(place[1])))
        rows.add(
            **stored._asdict(),  # of a manifest column's name, each field fills it
            source_sha256=digest,
            key=key,
            offset=length + BLOCK,
            size=len(stored.data),
            sha256=digest if stored.converted is None else hashlib.sha256(stored.data).hexdigest(),
        )
        rows.labels.append(label)
        pieces = member(f"{key}.{EXTENSIONS[stored.format]}", stored.data)
        if label >= 0:
            pieces += member(f"{key}.cls", str(label).encode())
        length += sum(map(len, pieces))
        yield from pieces
    tick(len(task.labels) % _TICK)
    yield tar_end(length)


def places(files: pa.Table) -> Iterator[tuple[bytes | None, bytes, int, int]]:
    """What FileReader.read takes, for each file."""
    columns = (files[name].to_pylist() for name in ("container", "path", "offset", "size"))
    return zip(*columns, strict=True)


def _identity(task: ShardTask, treatment: Treatment) -> str:
    """A digest of all that decides a shard's bytes, but for those of the sources."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, task.number, asdict(treatment)], sort_keys=True).encode())
    for container, path, offset, _ in places(task.files):
        digest.update(b"%d:%b%d:%b%d;" % (len(container or b""), container or b"", len(path), path, offset))
    digest.update(task.labels.astype("<i4").tobytes())
    return digest.hexdigest()


def _is_there(task: ShardTask, identity: str, folder: Path) -> bool:
    """Whether a build that was cut off left this shard whole, made in the same way of the same bytes."""
    path = folder / rows_file(task.number)
    try:
        schema = pa.ipc.open_file(pa.OSFile(str(path))).schema
        if (schema.metadata or {}).get(b"identity") != identity.encode():
            return False
        note = read_note(folder, task.number)
        if note.rows.schema != ROWS:  # of a version with other columns
            return False
        for name, digest in note.files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, pa.ArrowException, KeyError):
        return False
    with FileReader() as reader:
        for place, digest in zip(places(task.files), note.rows["source_sha256"].to_pylist(), strict=True):
            if read_digest(reader, *place) != digest:
                return False
    tick(len(task.labels))
    return True
