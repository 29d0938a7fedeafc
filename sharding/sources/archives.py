"""Tar and zip files as sources: images are found and read in place, without unpacking.

This needs members that begin at a known byte: a plain tar, or a zip, which compresses each member by itself.
"""

import os
import tarfile
from collections.abc import Iterator
from errno import EFBIG, EIO, ENOENT
from itertools import groupby, islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.limits import MAX_FILE_BYTES
from sharding.sources.file_listing import (
    BATCH,
    IMAGE_EXTENSIONS,
    ImageBatch,
    SkippedFiles,
    counted,
    extension,
    printable,
    split_path,
)
from sharding.sources.zips import is_zip, read_zip_member, zip_members

# The first bytes of compressed files. A compressed tar can only be read from its start.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!")
_LONGEST_MAGIC = 6
_BLOCK = tarfile.BLOCKSIZE

_MOST_OPEN = 8  # archives


def images_in(archive: bytes, skipped: SkippedFiles) -> Iterator[ImageBatch]:
    """The images in a tar or zip, sorted by path (as bytes). Of members with equal names the last one counts.

    Offsets: of the data in a tar, of the local header in a zip. Paths have no `.` parts and no leading slash.
    Raises ValueError when the file is no archive that can be read in place, or is damaged.
    """
    shown = printable(archive)
    file = os.open(archive, os.O_RDONLY)
    try:
        if _is_tar(archive):  # first: a tar begins with the name of a member, which may be BZh.jpg
            members = _tar_members(archive, skipped)
        elif os.pread(file, _LONGEST_MAGIC, 0).startswith(_COMPRESSED):
            raise ValueError(
                f"{shown} is compressed as a whole and cannot be read in place: unpack it, or make it a plain tar or a zip"
            )
        elif is_zip(file):
            members = zip_members(file, shown, skipped)
        else:
            raise ValueError(f"{shown} is a file, and neither a tar nor a zip: give the folder that holds the images")
        table = _sorted_unique(_images_of(members, skipped), shown, skipped)
    finally:
        os.close(file)
    for batch in table.to_batches(BATCH):
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        for folder, group in groupby(((*split_path(path), offset, size) for path, offset, size in rows), key=lambda row: row[0]):
            _, names, offsets, sizes = zip(*group, strict=True)
            yield ImageBatch(folder, list(names), list(offsets), list(sizes))


def _is_tar(archive: bytes) -> bool:
    """Whether a file begins like a plain tar."""
    try:
        with tarfile.open(archive, "r:"):
            return True
    except _BAD_TAR:
        return False


# What tarfile raises for bytes that are no tar: its own errors, and those caused by absurd numbers.
_BAD_TAR = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)


def _tar_members(archive: bytes, skipped: SkippedFiles) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset of the data and size in bytes of every file in a plain tar, in the order of the tar."""
    damaged = f"{printable(archive)} is a tar that is damaged, was cut short or is several in a row: copy it again, or unpack it"
    try:
        with tarfile.open(archive, "r:") as tar:
            place = -1
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if info.offset_data <= place:
                    raise ValueError(damaged)  # with a negative size, it would loop forever
                place = info.offset_data
                if info.isreg() and not info.issparse():
                    yield os.fsencode(info.name), info.offset_data, info.size
                elif not info.isdir():
                    skipped.special += 1
            end = tar.offset  # where it stopped: at the end, or at a bad header
    except _BAD_TAR:
        raise ValueError(damaged) from None
    # tarfile takes a bad header for the end. After a true end there is at least one block of zeros and nothing else.
    with open(archive, "rb") as rest:
        rest.seek(end)
        block = rest.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ValueError(damaged)
        while block:
            if any(block):
                raise ValueError(damaged)
            block = rest.read(BATCH)


def _images_of(members: Iterator[tuple[bytes, int, int]], skipped: SkippedFiles) -> pa.Table:
    """The images among the members, as columns: path, offset, size."""

    def images() -> Iterator[tuple[bytes, int, int]]:
        for member, offset, size in members:
            path = _normalized(member)
            kind = extension(split_path(path)[1])
            if any(part != b".." and skipped.skips(part) for part in path.split(b"/")):
                continue
            skipped.saw_folder(split_path(path)[0])
            if kind not in IMAGE_EXTENSIONS:
                skipped.extensions[printable(kind)] += 1
            else:
                yield path, offset, size

    schema = pa.schema({"path": pa.binary(), "offset": pa.int64(), "size": pa.int64()})
    found, batches = images(), []
    while rows := list(islice(found, BATCH)):
        batches.append(pa.RecordBatch.from_arrays(list(map(pa.array, zip(*rows, strict=True), schema.types)), schema=schema))
    return pa.Table.from_batches(batches, schema)


def _sorted_unique(table: pa.Table, shown: str, skipped: SkippedFiles) -> pa.Table:
    """The members sorted by path, the last one of each path (sorting is stable)."""
    table = table.take(pc.sort_indices(table, sort_keys=[("path", "ascending")])).combine_chunks()
    if len(table) < 2:
        return table
    paths = table["path"]
    is_last = np.append(pc.not_equal(paths[:-1], paths[1:]).to_numpy(), True)
    if is_last.all():
        return table
    again = counted(int((~is_last).sum()), "file")
    skipped.remarks.append(f"{shown} has {again} again under the same name: the last one counts")
    return table.filter(pa.array(is_last))


def _normalized(member: bytes) -> bytes:
    """A member's name as a relative path: `./a//b` and `/a/b` become a/b."""
    if member.startswith((b"/", b"./")) or b"//" in member or b"/./" in member:
        return b"/".join(part for part in member.split(b"/") if part not in (b"", b"."))
    return member


class FileReader:
    """Reads the images of a scan from files and archives. Keeps the last archives open. A context manager."""

    def __init__(self) -> None:
        # File descriptor, and whether it is a tar. The most recently used comes last.
        self._archives: dict[bytes, tuple[int, bool]] = {}

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *error: object) -> None:
        while self._archives:
            self._close_oldest()

    def read(self, container: bytes | None, path: bytes, offset: int, size: int) -> bytes:
        """The bytes of the image in a row of `Scan.files`; of a plain file, its present content.

        Raises OSError with a strerror when it cannot be read; its errno is EFBIG for more than MAX_FILE_BYTES, none of which
        are read or inflated.
        """
        _check_size(size)
        if container is None:
            return _read_file(path, size)
        if size < 0:
            raise OSError(ENOENT, "no such file in the archive")
        file, is_tar = self._open_source(container)
        if not is_tar:
            return read_zip_member(file, offset, size)
        data = os.pread(file, size, offset)
        if len(data) != size:
            raise OSError(EIO, "the tar was cut short")
        return data

    def _open_source(self, container: bytes) -> tuple[int, bool]:
        archive = self._archives.pop(container, None)
        if archive is None:
            if len(self._archives) == _MOST_OPEN:
                self._close_oldest()
            archive = os.open(container, os.O_RDONLY), _is_tar(container)
        self._archives[container] = archive
        return archive

    def _close_oldest(self) -> None:
        oldest = next(iter(self._archives))
        os.close(self._archives.pop(oldest)[0])


def _check_size(size: int) -> None:
    """Raises OSError, EFBIG, for a file of more bytes than an image may have."""
    if size > MAX_FILE_BYTES:
        raise OSError(EFBIG, f"{size:,} bytes; at most {MAX_FILE_BYTES:,}")


def _read_file(path: bytes, size: int) -> bytes:
    if size < 0:
        os.stat(path)  # raises the reason
        raise OSError(ENOENT, "was not there when the sources were searched")
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be a pipe by now
    try:
        data = os.read(file, size + 1)
        if len(data) == size:
            return data
        blocks, total = [data], len(data)  # it has changed, or one call does not read all of it
        while block := os.read(file, 1 << 20):
            blocks.append(block)
            total += len(block)
            _check_size(total)
        return b"".join(blocks)
    finally:
        os.close(file)
