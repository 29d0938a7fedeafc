"""Crash-safe writing of a shard set: into the folder `<out>.partial`, which is renamed to `<out>` in one step.

One build at a time holds the folder. No incomplete file ever has its final name. The next build reuses what an interrupted one
left here.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sharding.manifest import index_file, shard_file

_BLOCK = 2**20  # bytes
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_BUILD_FILES = re.compile(r"(shard-\d{6}\.(tar|idx|rows)|(manifest|quarantine)\.parquet|dataset\.json)(\.tmp)?")


def rows_file(number: int) -> str:
    """The name of the file that lists what is in a written shard, until the manifest does."""
    return f"shard-{number:06d}.rows"


def write_chunks(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file atomically from its bytes. Returns their sha256, hex."""
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb", buffering=0) as file:
            for block in _blocks(chunks):
                digest.update(block)
                left = memoryview(block)
                while left:
                    left = left[file.write(left) :]
                _start_writing(file.fileno())

    write_atomically(path, write)
    return digest.hexdigest()


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of at least _BLOCK, because hashing and writing many small chunks would be slow."""
    buffered, length = [], 0
    for chunk in chunks:
        buffered.append(chunk)
        length += len(chunk)
        if length >= _BLOCK:
            yield b"".join(buffered)
            buffered, length = [], 0
    yield b"".join(buffered)


def _start_writing(handle: int) -> None:
    """Start writing a file's new data to disk, so that the fsync at its end has little left to wait for."""
    begin = 2  # SYNC_FILE_RANGE_WRITE of Linux's sync_file_range(2); a failure costs nothing but time
    _LIBRARY.sync_file_range(handle, ctypes.c_int64(0), ctypes.c_int64(0), begin)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under a temporary name, and rename it when it is safely on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _sync(temporary)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk's error names no file
        raise
    temporary.rename(path)


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """`<out>.partial`, locked until this process ends. Removed again when nothing was written."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, out)
        # Between our mkdir and our lock, another build may have finished and renamed the folder away.
        if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise ValueError(f"another build of {out} has just finished: look there, or start again")
        try:
            yield partial
        finally:  # only when we hold the lock: another build's folder may still be empty
            if partial.exists() and not any(partial.iterdir()):
                partial.rmdir()
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another build is writing {out}: wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks, such as some network drives


def clear_stale(partial: Path, shards: range) -> None:
    """Remove what an interrupted build left and this one does not reuse: all but these shards."""
    keep = {name(number) for number in shards for name in (shard_file, index_file, rows_file)}
    for stale in sorted(partial.iterdir()):
        if not _BUILD_FILES.fullmatch(stale.name):
            raise ValueError(f"{stale} does not belong to an interrupted build: move it away, or choose another --out")
        if stale.name not in keep:
            stale.unlink()


def clear(partial: Path) -> None:
    """Remove everything that a build wrote."""
    clear_stale(partial, range(0))


def check_space(partial: Path, needed: int) -> None:
    """Raise ValueError when `needed` bytes, less those that are there already, do not fit on the disk."""
    there = sum(file.stat().st_size for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if needed - there > free:
        raise ValueError(
            f"{partial.parent} has {_size(free)} free, and the set needs {_size(needed - there)}: make room, or "
            "choose an --out on another disk"
        )


def _size(count: int) -> str:
    """A number of bytes with three digits."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "bytes")) if count >= unit or unit == 1
    )
    return f"{count / unit:.3g} {name}"


def link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Hard-link files of one folder into another: nothing is copied, and readers of the first are not disturbed."""
    for name in names:
        (target / name).unlink(missing_ok=True)
        os.link(source / name, target / name)


def publish(partial: Path, out: Path) -> None:
    """Rename the folder to its final name in one step. Replaces a set that has this name."""
    for rows in partial.glob("*.rows"):
        rows.unlink()
    _sync(partial)
    if out.exists() and any(out.iterdir()):
        _exchange(partial, out)
        shutil.rmtree(partial)
    else:
        partial.rename(out)
    _sync(out.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders atomically, by Linux's renameat2(2)."""
    at_cwd, exchange = -100, 2
    if _LIBRARY.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange):
        error = ctypes.get_errno()
        if error not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(error, os.strerror(error), str(other))
        raise ValueError(
            f"{other.parent} is on a file system that cannot exchange two folders atomically: copy the set to a local disk, "
            f"append there and copy it back; the new shards are in {one}"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
