"""Runs at a URL: each node works in a local folder, which is synchronised with the URL.

    s3://bucket/runs/kidney/                                    the authoritative copy of the run
      run.json  config.yaml  learnt_from.parquet                by the driver, before training begins
      metrics.jsonl  tensorboard/  ...                          by rank 0, every 15 s and before each checkpoint
      checkpoints/step-000000120/checkpoint.pt                  by rank 0, in one request each; the newest counts
      .lease-12                                                 the lock (train/records/run_lock.py)
      result.json                                               by the driver, last: the run is finished
      cells/5%-seed42/  ...                                     sub-runs, each with all of this
    ~/.cache/patchclr/runs/s3/bucket/runs/kidney/               on each node ($PATCHCLR_CACHE)

An object store has no append and no rename, so all work is done on local files, and this module uploads and downloads them. A
local file counts as equal to the one at the URL if size and modification time are equal; both directions set the latter. The
process that trains the run on this node holds the kernel's lock on .lock: its files are newer than those at the URL, and no other
process changes them. A process that downloads files holds the lock on .pull.
"""

import contextlib
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.remote_folder import Interrupted, RemoteFolder, Stored, is_url
from pipelines.shard_cache import default_cache
from train.records.run_lock import LOCK_NAME

RESULT_NAME = "result.json"
CHECKPOINTS, CHECKPOINT_NAME = "checkpoints", "checkpoint.pt"  # folder of a run's checkpoints, and the file in each of them
SYNC_INTERVAL_S = 15.0  # between two uploads or downloads of what has changed

CELLS = "cells"  # folder of a run's sub-runs
_EXCLUDED = (".", f"{CELLS}/", "ray/")  # sub-runs, and Ray's own files on this node
_LARGE = (".safetensors", ".pt", ".parquet", ".npy")
_SMALL_FILE_BYTES = 2**30  # limit of a small file, which is fetched in one request and so is consistent
_CHUNK_BYTES = 8 * 2**20  # of one request for a large file


def local_storage(storage: str) -> Path:
    """This node's folder of a storage's runs: the storage itself, or for a URL a folder in the cache."""
    if not is_url(storage):
        return Path(storage)
    scheme, _, place = storage.partition("://")
    return default_cache() / "runs" / scheme / place.strip("/")


class Mirror:
    """A run at a URL and its folder on this node, which is made when needed.

    Raises ValueError for a URL that cannot hold a run. Requests to the store raise ValueError as RemoteFolder does.
    """

    def __init__(self, url: str, *, tries: int = 6):
        storage, _, name = url.rstrip("/").rpartition("/")
        scheme, _, place = storage.partition("://")
        if scheme in ("http", "https"):
            raise ValueError(f"--storage {storage}: this URL is read-only; use s3://, another object store, or a folder")
        if not place.strip("/") or not name:
            raise ValueError(f"--storage {storage}: give a folder at the store too, such as s3://bucket/runs")
        if name.startswith(".") or ".." in place.split("/"):
            raise ValueError(f"{url}: a run's name at a URL has no leading dot, and its storage no '..'")
        self.store = RemoteFolder(url, tries=tries)
        self.url, self.name = self.store.url, name
        self.folder = (local_storage(storage) / name).absolute()
        self._pushing = threading.Lock()

    def is_training_here(self) -> bool:
        """Whether a process on this node is training the run."""
        if not self.folder.exists():
            return False
        with _lock_if_free(self.folder / LOCK_NAME) as free:
            return not free

    def pull(self, *, whole: bool, training: bool = False) -> None:
        """Make this node's files equal to those at the URL: download files that differ, and remove files that the URL lacks.

        whole: also download weights and tables; otherwise those that differ are removed. Checkpoints, TensorBoard's files and
        profiles are never downloaded, of sub-runs only the small files. training: the caller trains the run; if another process
        on this node does, nothing happens.
        """
        if not training and self.is_training_here():
            return
        if not self.folder.exists() and not self.store.names():
            return
        with self._pull_locked():
            everything = self.store.names()
            stored = _files_of_run(everything)
            changed = {name for name, each in stored.items() if not _is_uploaded(self.folder / name, each)}
            fetched = [name for name in changed if "/" not in name and (whole or not name.endswith(_LARGE))]
            for name in fetched:
                self._fetch(name, stored[name])
            # A process that has begun to train meanwhile has downloaded everything itself, and its files are newer.
            free = contextlib.nullcontext(True) if training else _lock_if_free(self.folder / LOCK_NAME)
            with free as unlocked:
                if unlocked:
                    for name in self._files():
                        if name in changed or name not in stored:
                            _remove(self.folder / name)
                    for name in fetched:
                        os.replace(self._incoming / name, self.folder / name)
        for cell in sorted({name.split("/")[1] for name in everything if name.startswith(f"{CELLS}/")}):
            Mirror(f"{self.url}/{CELLS}/{cell}").pull(whole=False)

    def push(self, *names: str) -> None:
        """Upload this node's files that differ, the given ones or all but checkpoints; result.json last."""
        with self._pushing:
            stored = self.store.names()
            given = names or [name for name in self._files() if not name.startswith(CHECKPOINTS)]
            changed = [name for name in given if not _is_uploaded(self.folder / name, stored.get(name))]
            for name in sorted(changed, key=lambda name: name == RESULT_NAME):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    self.store.write(name, self.folder / name)
            stored = self.store.names() if changed else {}
            for name in changed:
                _copy_mtime(self.folder / name, stored.get(name))

    def checkpoints(self) -> list[str]:
        """The names of complete checkpoints, oldest first."""
        return sorted(name.split("/")[1] for name in self._checkpoints())

    def fetch_checkpoint(self, step: str) -> Path:
        """This checkpoint's folder on this node, downloaded once per node. Other checkpoints there are removed."""
        name, folder = _checkpoint(step), self.folder / CHECKPOINTS / step
        with self._pull_locked():
            stored = self._checkpoints().get(name)
            if stored is None:
                raise ValueError(f"{self.url}/{name} was removed, perhaps by a process that trains this run; start again")
            if not _is_uploaded(self.folder / name, stored):
                self._fetch(name, stored)
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(self._incoming / name, self.folder / name)
            for other in folder.parent.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other)
        return folder

    def push_checkpoint(self, step: str, file: Path) -> None:
        """Upload a checkpoint, then remove the older ones. It counts once the upload is complete."""
        self.store.write(_checkpoint(step), file)
        stored = self._checkpoints()
        _copy_mtime(file, stored.get(_checkpoint(step)))
        for name in stored:
            if name < _checkpoint(step):
                self.store.remove(name)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """A block during which this node's metrics.jsonl follows the one at the URL every few seconds."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(SYNC_INTERVAL_S):
                # Only for display: the process that trains reports errors of the store.
                with contextlib.suppress(ValueError, Interrupted):
                    self.pull(whole=False)

        thread = threading.Thread(target=follow, name="following a run", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            with self.store.interrupted():
                thread.join()

    @property
    def _incoming(self) -> Path:
        return self.folder / ".incoming"

    def _checkpoints(self) -> dict[str, Stored]:
        found = self.store.names(CHECKPOINTS).items()
        return {name: each for name, each in found if re.fullmatch(_checkpoint(r"step-\d+"), name)}

    def _files(self) -> list[str]:
        walked = os.walk(self.folder, onerror=_ignore_missing)
        paths = (Path(folder, name) for folder, _, names in walked for name in names)
        return list(_files_of_run({path.relative_to(self.folder).as_posix(): None for path in paths if path.is_file()}))

    def _fetch(self, name: str, stored: Stored) -> None:
        path = self._incoming / name
        path.parent.mkdir(parents=True, exist_ok=True)
        step = _CHUNK_BYTES if name.endswith(_LARGE) else _SMALL_FILE_BYTES
        with path.open("wb") as file:
            while file.tell() < stored.size:
                # Files that are appended to are small, and are read in one request.
                data = self.store.read(name, file.tell(), file.tell() + step)
                if not data:
                    break
                file.write(data)
            if name.endswith(_LARGE) and file.tell() != stored.size:
                raise ValueError(f"{self.url}/{name} changed while it was downloaded; start again")
        _copy_mtime(path, stored)

    @contextlib.contextmanager
    def _pull_locked(self) -> Iterator[None]:
        """A block in which only this process downloads files to this node. Raises ValueError for errors of the local disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".pull", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                shutil.rmtree(self._incoming, ignore_errors=True)  # of a process that was killed
                yield
                shutil.rmtree(self._incoming, ignore_errors=True)
        except OSError as error:
            raise ValueError(
                f"{self.folder}, this node's copy of {self.url}, cannot be written ({error.strerror}): free space or repair"
                " it, or set PATCHCLR_CACHE to a folder on a local disk with room"
            ) from error


def fetch_source(source: str) -> str:
    """The local source of initial weights: of a run at a URL its folder here, downloaded; all others stay as they are."""
    if not is_url(source):
        return source
    mirror = Mirror(source)
    mirror.pull(whole=True)
    return str(mirror.folder)


def _ignore_missing(error: OSError) -> None:
    """Ignore that a checkpoint's folder is removed during the walk."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _files_of_run(files: dict[str, Any]) -> dict[str, Any]:
    """The files of the run itself, by name: without sub-runs, locks and partial downloads."""
    return {name: each for name, each in files.items() if not name.startswith(_EXCLUDED) and "/." not in name}


def _checkpoint(step: str) -> str:
    return f"{CHECKPOINTS}/{step}/{CHECKPOINT_NAME}"


def _remove(path: Path) -> None:
    path.unlink()
    with contextlib.suppress(OSError):  # it is not empty
        path.parent.rmdir()


def _is_uploaded(path: Path, stored: Stored | None) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return stored is not None and (stat.st_size, stat.st_mtime_ns) == stored


def _copy_mtime(path: Path, stored: Stored | None) -> None:
    """Give a file the modification time of the one at the URL, unless it has grown meanwhile."""
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        if stored is not None and stored.written_ns is not None and path.stat().st_size == stored.size:
            os.utime(path, ns=(stored.written_ns, stored.written_ns))


@contextlib.contextmanager
def _lock_if_free(path: Path) -> Iterator[bool]:
    """A block with the kernel's lock on the file if it is free. Yields whether it is."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
