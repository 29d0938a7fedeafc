"""Write one shard: read its source files once, process each image, and write a tar, its index and a rows file.

The rows file (`shard-000000.rows`, Arrow) has one row per source file, packed or refused. The manifest and the quarantine follow
from the rows files of all shards. The next build recognises by its rows file a shard that an interrupted build has completed.
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from errno import EFBIG
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.images.image_checks import Refusal, silent_decoders
from sharding.images.image_processing import ImageOptions, ProcessedImage, process_image
from sharding.limits import MAX_SECONDS
from sharding.manifest import COLUMNS, FORMAT_VERSION, WORDS, index_file, shard_file
from sharding.process_pool import report_progress
from sharding.shard_format import BLOCK, EXTENSIONS, index_text, sample_key, tar_end, tar_member
from sharding.sources.archives import FileReader
from sharding.sources.file_listing import printable
from sharding.staging import rows_file, write_atomically, write_chunks

# The columns of a rows file. `reason` and `detail` are null for a packed image; the others are as in the manifest. Those columns
# of the manifest that need the whole set are filled by `sharding.manifest_writer`.
ROWS = pa.schema(
    {"reason": pa.string(), "detail": pa.string()}
    | {
        name: pa.string() if kind == WORDS else kind
        for name, kind in COLUMNS.items()
        if name not in ("id", "shard", "label", "class", "group", "split", "source")
    }
)
_CHECKS = 2  # raised when other images are refused, so that no build goes on from shards of before
_PROGRESS_STEP = 32  # files between two reports of progress


class ShardTask(NamedTuple):
    """One shard to write. files: the rows of a scan, in order; labels: (n,) class index, -1 where unlabelled."""

    number: int
    files: pa.Table
    labels: np.ndarray


class ShardRows(NamedTuple):
    """The rows file of a shard: a table by ROWS, and the sha256 of the shard's files by name."""

    rows: pa.Table
    files: dict[str, str]


def write_shard(task: ShardTask, *, folder: Path, options: ImageOptions) -> None:
    """Write a shard into the folder: tar, index and, last, the rows file. Keeps an identical shard of an earlier build."""
    identity = _identity(task, options)
    if _is_complete(task, identity, folder):
        return
    rows = _RowsBuilder()
    tar, index = folder / shard_file(task.number), folder / index_file(task.number)
    with silent_decoders(), _time_limit(), FileReader() as reader:
        tar_digest = write_chunks(tar, _tar_chunks(task, options, reader, rows))
    index_digest = write_chunks(index, [rows.index_text().encode()])
    metadata = {"identity": identity, tar.name: tar_digest, index.name: index_digest}
    table = rows.table().replace_schema_metadata(metadata)

    def write(path: Path) -> None:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)

    write_atomically(folder / rows_file(task.number), write)


def read_rows(folder: Path, number: int) -> ShardRows:
    """Read the rows file of a written shard."""
    with pa.OSFile(str(folder / rows_file(number))) as file:
        table = pa.ipc.open_file(file).read_all()
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return ShardRows(
        table.replace_schema_metadata(None), {name: metadata[name] for name in (shard_file(number), index_file(number))}
    )


def read_digest(reader: FileReader, container: bytes | None, path: bytes, offset: int, size: int) -> str | None:
    """The sha256 of a source file, hex; None when it cannot be read."""
    try:
        return hashlib.sha256(reader.read(container, path, offset, size)).hexdigest()
    except OSError:
        return None


class _RowsBuilder:
    """Collects the rows of a shard, column by column."""

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


def _tar_chunks(task: ShardTask, options: ImageOptions, reader: FileReader, rows: _RowsBuilder) -> Iterator[bytes]:
    """The bytes of a shard's tar in chunks. Adds to rows what was packed and what was refused."""
    length = 0
    for done, (location, label) in enumerate(zip(file_locations(task.files), task.labels.tolist(), strict=True), start=1):
        if not done % _PROGRESS_STEP:
            report_progress(_PROGRESS_STEP)
        digest, image = _read_image(location, options, reader)
        if isinstance(image, Refusal):
            rows.add(reason=image.reason, detail=image.detail, source_sha256=digest)
            continue
        key = sample_key(task.number, len(rows.labels), os.path.basename(os.fsdecode(location[1])))
        rows.add(
            **image._asdict(),  # each field that is named like a column fills it
            source_sha256=digest,
            key=key,
            offset=length + BLOCK,
            size=len(image.data),
            sha256=digest if image.converted is None else hashlib.sha256(image.data).hexdigest(),
        )
        rows.labels.append(label)
        chunks = tar_member(f"{key}.{EXTENSIONS[image.format]}", image.data)
        if label >= 0:
            chunks += tar_member(f"{key}.cls", str(label).encode())
        length += sum(map(len, chunks))
        yield from chunks
    report_progress(len(task.labels) % _PROGRESS_STEP)
    yield tar_end(length)


def _read_image(
    location: tuple[bytes | None, bytes, int, int], options: ImageOptions, reader: FileReader
) -> tuple[str | None, ProcessedImage | Refusal]:
    """The sha256 of a source file, None if it cannot be read, and what becomes of it."""
    try:
        try:
            data = reader.read(*location)
        except OSError as error:
            reason = "too large" if error.errno == EFBIG else "unreadable"
            return None, Refusal(reason, error.strerror or "cannot be read")
        return hashlib.sha256(data).hexdigest(), _process_in_time(data, options)
    except MemoryError:
        path = printable(location[1])
        raise ValueError(f"not enough memory to read and decode {path}: try again with fewer --workers") from None


class _TimeIsUp(BaseException):
    """No Exception: the code around decoders takes those for damage."""


_image_started: float | None = None  # processor time in seconds; None between images


def _process_in_time(data: bytes, options: ImageOptions) -> ProcessedImage | Refusal:
    """process_image, or the refusal of an image that takes more than MAX_SECONDS. It is stopped only where it runs Python."""
    global _image_started
    _image_started = time.process_time()
    try:
        return process_image(data, options)
    except _TimeIsUp:
        return Refusal("too complex", f"takes more than {MAX_SECONDS:g} s of processor time")
    finally:
        _image_started = None


def _stop_image(number: int, frame: object) -> None:
    if _image_started is not None and time.process_time() - _image_started > MAX_SECONDS:
        raise _TimeIsUp


@contextmanager
def _time_limit() -> Iterator[None]:
    """Check each second of processor time. Without effect outside the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop_image)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def file_locations(files: pa.Table) -> Iterator[tuple[bytes | None, bytes, int, int]]:
    """The arguments of FileReader.read for each file."""
    columns = (files[name].to_pylist() for name in ("container", "path", "offset", "size"))
    return zip(*columns, strict=True)


def _identity(task: ShardTask, options: ImageOptions) -> str:
    """A digest of everything that decides a shard's bytes, except the bytes of the sources."""
    rules = [FORMAT_VERSION, _CHECKS, task.number, asdict(options)]
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    for container, path, offset, _ in file_locations(task.files):
        digest.update(b"%d:%b%d:%b%d;" % (len(container or b""), container or b"", len(path), path, offset))
    digest.update(task.labels.astype("<i4").tobytes())
    return digest.hexdigest()


def _is_complete(task: ShardTask, identity: str, folder: Path) -> bool:
    """Whether an interrupted build left this shard complete, made in the same way from the same bytes."""
    path = folder / rows_file(task.number)
    try:
        schema = pa.ipc.open_file(pa.OSFile(str(path))).schema
        if (schema.metadata or {}).get(b"identity") != identity.encode():
            return False
        written = read_rows(folder, task.number)
        if written.rows.schema != ROWS:  # of a version with other columns
            return False
        for name, digest in written.files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, pa.ArrowException, KeyError):
        return False
    with FileReader() as reader:
        for location, digest in zip(file_locations(task.files), written.rows["source_sha256"].to_pylist(), strict=True):
            if read_digest(reader, *location) != digest:
                return False
    report_progress(len(task.labels))
    return True
