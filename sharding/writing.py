"""A planned shard set onto the disk: nothing half-written ever has its final name.

A shard is written under another name and renamed when it is safely there; the folder of all is `<out>.partial` until the end.
A build that was cut off goes on from its whole shards.
"""

import fcntl
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.manifest import index_file, shard_file, write_table
from sharding.plan import BLOCK, EXTENSIONS, index_text, member, tar_end, tar_sizes

_OURS = re.compile(r"(shard-\d{6}\.(tar|idx)|(manifest|quarantine)\.parquet|dataset\.json)(\.tmp)?")


class ShardTask(NamedTuple):
    """One shard to write: a list entry per patch, in order."""

    number: int
    paths: list[str]
    keys: list[str]
    extensions: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    digests: list[str]


def shard_tasks(manifest: pa.Table, paths: Sequence[str]) -> list[ShardTask]:
    """One task per shard. paths: the file to open for each row of the manifest."""
    shards = manifest["shard"].to_numpy()
    bounds = [*np.flatnonzero(np.diff(shards, prepend=-1)).tolist(), len(shards)]
    extensions = [EXTENSIONS[name] for name in manifest["format"].to_pylist()]
    columns = [manifest[name].to_pylist() for name in ("offset", "size", "label", "sha256")]
    keys = manifest["key"].to_pylist()
    return [
        ShardTask(number, *(list(column[start:end]) for column in (paths, keys, extensions, *columns)))
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    ]


def shard_length(task: ShardTask) -> int:
    return len(task.keys)


def write_shard(task: ShardTask, *, folder: Path) -> dict[str, str]:
    """Write a tar and its index, unless a build that was cut off left them whole. Returns the sha256 of each file."""
    tar = folder / shard_file(task.number)
    digest = _digest_if_whole(tar, task) or write_whole(tar, _tar_blocks(task, _read_source))
    text = index_text(task.keys, task.extensions, task.offsets, task.sizes, task.labels)
    index = folder / index_file(task.number)
    return {tar.name: digest, index.name: write_whole(index, [text.encode()])}


def _tar_blocks(task: ShardTask, read: Callable[[ShardTask, int], bytes]) -> Iterator[bytes]:
    """The bytes of a shard, sample by sample. read(task, i) gives the bytes of its patch i."""
    length = 0
    for i, (key, extension, label) in enumerate(zip(task.keys, task.extensions, task.labels, strict=True)):
        data = read(task, i)
        assert (length + BLOCK, len(data)) == (task.offsets[i], task.sizes[i]), (key, length, len(data))
        block = member(f"{key}.{extension}", data)
        if label >= 0:
            block += member(f"{key}.cls", str(label).encode())
        length += len(block)
        yield block
    yield tar_end(length)


def read_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _read_source(task: ShardTask, i: int) -> bytes:
    """The bytes of a source image, which must still be those that were checked."""
    try:
        data = read_file(task.paths[i])
    except OSError as error:
        raise ValueError(f"{task.paths[i]} cannot be read any more ({error.strerror}): start the build again") from None
    if hashlib.sha256(data).hexdigest() != task.digests[i]:
        raise ValueError(f"{task.paths[i]} was changed while the set was being built: start the build again")
    return data


class _NotWhole(Exception):
    """A shard of an earlier build does not hold what it should."""


def _digest_if_whole(tar: Path, task: ShardTask) -> str | None:
    """The sha256 of a shard that is there already, or None where it is missing or not what this plan would write."""
    try:
        with tar.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()

            def read_stored(task: ShardTask, i: int) -> bytes:
                data = os.pread(file.fileno(), task.sizes[i], task.offsets[i])
                if hashlib.sha256(data).hexdigest() != task.digests[i]:
                    raise _NotWhole
                return data

            expected = hashlib.sha256()
            for block in _tar_blocks(task, read_stored):
                expected.update(block)
    except (FileNotFoundError, _NotWhole):
        return None
    return actual if actual == expected.hexdigest() else None


def write_whole(path: Path, blocks: Iterable[bytes]) -> str:
    """Write a file under another name, and give it its own when it is safely on the disk. Returns its sha256."""
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(temporary)  # a full disk does not say where
        raise
    temporary.rename(path)
    return digest.hexdigest()


def write_parquet(table: pa.Table, path: Path) -> str:
    write_table(table, path)
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


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


def clear_stale(partial: Path, tasks: Sequence[ShardTask]) -> None:
    """Remove what a build that was cut off left behind and this one does not take up."""
    keep = {shard_file(task.number) for task in tasks}
    for stale in sorted(partial.iterdir()):
        if not _OURS.fullmatch(stale.name):
            raise ValueError(f"{stale} is not of a build that was cut off: move it away, or choose another --out")
        if stale.name not in keep:
            stale.unlink()


def check_space(partial: Path, tasks: Sequence[ShardTask]) -> None:
    needed = sum(int(tar_sizes(np.array(task.sizes), task.labels[0] >= 0).sum()) for task in tasks)
    there = sum(file.stat().st_size for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if needed - there > free:
        raise ValueError(f"{partial.parent} has {free / 1e9:,.1f} GB free, and the set needs {(needed - there) / 1e9:,.1f} GB")


def publish(partial: Path, out: Path) -> None:
    """Give the whole folder its final name, in one step."""
    _sync_folder(partial)
    partial.rename(out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
