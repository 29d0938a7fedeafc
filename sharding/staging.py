"""A set while it is being written: a folder `<out>.partial` that one build at a time holds, and that becomes `<out>` in one step.

Nothing half-written ever has its final name. What a build that was cut off left here, the next one takes up.
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
_OURS = re.compile(r"(shard-\d{6}\.(tar|idx|rows)|(manifest|quarantine)\.parquet|dataset\.json)(\.tmp)?")


def rows_file(number: int) -> str:
    """The name of the file in which a written shard says what is in it, until the manifest does."""
    return f"shard-{number:06d}.rows"


def write_pieces(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file as write_whole does, from its bytes. Returns their sha256."""
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb", buffering=0) as file:
            for block in _joined(pieces):
                digest.update(block)
                left = memoryview(block)
                while left:
                    left = left[file.write(left) :]
                _start_writing(file.fileno())

    write_whole(path, write)
    return digest.hexdigest()


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of at least _BLOCK: a call to hash and to write them costs as much as a small piece."""
    waiting, length = [], 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= _BLOCK:
            yield b"".join(waiting)
            waiting, length = [], 0
    yield b"".join(waiting)


def _start_writing(handle: int) -> None:
    """Let the system begin to write what is new in a file, so that the sync at its end has little left to wait for."""
    begin = 2  # SYNC_FILE_RANGE_WRITE of Linux's sync_file_range(2); where it does not work, nothing is lost but time
    _LIBRARY.sync_file_range(handle, ctypes.c_int64(0), ctypes.c_int64(0), begin)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under another name, and give it its own when it is safely on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _sync(temporary)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk, every byte counts
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    temporary.rename(path)


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """`<out>.partial`, held by a lock that ends with this process. It is removed again where nothing was written."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, out)
        # Between our mkdir and our lock, another build may have finished and renamed the folder away.
        if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise ValueError(f"another build of {out} has just ended: look there, or start again")
        try:
            yield partial
        finally:  # only where the lock is ours: the folder of another build may still be empty
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
        pass  # a file system without locks, as some network drives are


def clear_stale(partial: Path, shards: range) -> None:
    """Remove what a build that was cut off left behind and this one does not take up: all but these shards."""
    keep = {name(number) for number in shards for name in (shard_file, index_file, rows_file)}
    for stale in sorted(partial.iterdir()):
        if not _OURS.fullmatch(stale.name):
            raise ValueError(f"{stale} is not of a build that was cut off: move it away, or choose another --out")
        if stale.name not in keep:
            stale.unlink()


def clear(partial: Path) -> None:
    """Remove everything that a build wrote."""
    clear_stale(partial, range(0))


def check_space(partial: Path, needed: int) -> None:
    """Raise ValueError where `needed` bytes, less what is there already, do not fit on the disk."""
    there = sum(file.stat().st_size for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if needed - there > free:
        raise ValueError(
            f"{partial.parent} has {free / 1e9:,.1f} GB free, and the set needs {(needed - there) / 1e9:,.1f} GB: make room, or "
            "choose an --out on another disk"
        )


def link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Give files of one folder a second name in another, so that nothing is copied and readers of the first are not disturbed."""
    for name in names:
        (target / name).unlink(missing_ok=True)
        os.link(source / name, target / name)


def publish(partial: Path, out: Path) -> None:
    """Give the whole folder its final name, in one step; a set that has it already goes away."""
    for note in partial.glob("*.rows"):
        note.unlink()
    _sync(partial)
    if out.exists() and any(out.iterdir()):
        _exchange(partial, out)
        shutil.rmtree(partial)
    else:
        partial.rename(out)
    _sync(out.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders' names, so that at any moment each name is one of the two. Linux's renameat2(2)."""
    at_cwd, exchange = -100, 2
    if _LIBRARY.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange):
        error = ctypes.get_errno()
        if error not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(error, os.strerror(error), str(other))
        raise ValueError(
            f"{other.parent} is on a file system that cannot exchange two folders in one step: copy the set to a local disk, "
            f"append there and copy it back; the new shards wait in {one}"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
