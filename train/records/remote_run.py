"""Runs whose storage is a URL: worked on in a folder of this node, and mirrored.

    s3://bucket/runs/kidney/                                    what counts, whatever a node has of it
      run.json  config.yaml  learnt_from.parquet                written by the driver, before training begins
      metrics.jsonl  tensorboard/  ...                          by rank 0, every 15 s and before each checkpoint
      checkpoints/step-000000120/checkpoint.pt                  by rank 0, in one piece each; the newest one counts
      .lease-12                                                 who trains the run (train/records/run_lock.py)
      result.json                                               by the driver, after all else: the run is finished
      cells/5%-seed42/  ...                                     runs of their own below it, each with all this
    ~/.cache/patchclr/runs/s3/bucket/runs/kidney/               on each node ($PATCHCLR_CACHE)

An object store has no append and no rename. So all that works on a run works on files of its node, and here is what
brings them up to date in either direction. A local file is taken for the one at the URL if it has that one's size and time of
writing, which both directions give it. Who trains the run on this node holds the kernel's lock on .lock; its files are then newer
than those at the URL and nobody else touches them. Who brings others up to date holds .pull.
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
from train.records.checkpoints import CHECKPOINT_NAME, CHECKPOINTS
from train.records.run_lock import LOCK_NAME

RESULT_NAME = "result.json"
EVERY_SECONDS = 15.0  # between two looks at what has changed, on either side

CELLS = "cells"  # a folder with runs below a run
_NOT_ITS = (".", f"{CELLS}/", "ray/")  # runs of their own, and where Ray keeps its books on this node
_LARGE = (".safetensors", ".pt", ".parquet", ".npy")
_MOST = 2**30  # bytes of a file that is fetched in one request, so that it is of one moment
_PART = 8 * 2**20  # bytes of one request for a large file


def local_storage(storage: str) -> Path:
    """Where this node has the runs of a storage: the folder itself, or for a URL one in the cache."""
    if not is_url(storage):
        return Path(storage)
    scheme, _, place = storage.partition("://")
    return default_cache() / "runs" / scheme / place.strip("/")


class Mirror:
    """A run at a URL, and its folder on this node, which is made when it is needed.

    Raises ValueError for a URL that no run can be at. What it asks of the store raises ValueError as RemoteFolder does.
    """

    def __init__(self, url: str, *, tries: int = 6):
        storage, _, name = url.rstrip("/").rpartition("/")
        scheme, _, place = storage.partition("://")
        if scheme in ("http", "https"):
            raise ValueError(f"--storage {storage}: nothing can be written there; use s3://, another object store, or a folder")
        if not place.strip("/") or not name:
            raise ValueError(f"--storage {storage}: give a folder at the store too, such as s3://bucket/runs")
        if name.startswith(".") or ".." in place.split("/"):
            raise ValueError(f"{url}: a run's name at a URL has no leading dot, and its storage no '..'")
        self.store = RemoteFolder(url, tries=tries)
        self.url, self.name = self.store.url, name
        self.folder = (local_storage(storage) / name).absolute()
        self._pushing = threading.Lock()

    def is_training_here(self) -> bool:
        """Whether a process of this node trains the run right now."""
        if not self.folder.exists():
            return False
        with _lock_if_free(self.folder / LOCK_NAME) as free:
            return not free

    def pull(self, *, whole: bool, training: bool = False) -> None:
        """Make this node's files those at the URL: fetch what differs, and remove what is not there.

        whole: also weights and tables; without, none of those that differ stays. Checkpoints, TensorBoard's files and profiles
        are not fetched, and of runs below it the small files. training: the caller trains the run. Where another process of this
        node does, nothing happens.
        """
        if not training and self.is_training_here():
            return
        if not self.folder.exists() and not self.store.names():
            return
        with self._one_at_a_time():
            everything = self.store.names()
            stored = _its_own(everything)
            changed = {name for name, each in stored.items() if not _same(self.folder / name, each)}
            fetched = [name for name in changed if "/" not in name and (whole or not name.endswith(_LARGE))]
            for name in fetched:
                self._fetch(name, stored[name])
            # Who has begun to train meanwhile has brought everything up to date itself, and has gone on from there.
            free = contextlib.nullcontext(True) if training else _lock_if_free(self.folder / LOCK_NAME)
            with free as mine:
                if mine:
                    for name in self._files():
                        if name in changed or name not in stored:
                            _remove(self.folder / name)
                    for name in fetched:
                        os.replace(self._incoming / name, self.folder / name)
        for cell in sorted({name.split("/")[1] for name in everything if name.startswith(f"{CELLS}/")}):
            Mirror(f"{self.url}/{CELLS}/{cell}").pull(whole=False)

    def push(self, *names: str) -> None:
        """Put this node's files at the URL, those given or all but checkpoints, where they differ; result.json last."""
        with self._pushing:
            stored = self.store.names()
            given = names or [name for name in self._files() if not name.startswith(CHECKPOINTS)]
            changed = [name for name in given if not _same(self.folder / name, stored.get(name))]
            for name in sorted(changed, key=lambda name: name == RESULT_NAME):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    self.store.write(name, self.folder / name)
            stored = self.store.names() if changed else {}
            for name in changed:
                _mark(self.folder / name, stored.get(name))

    def checkpoints(self) -> list[str]:
        """The names of those that are wholly there, from the oldest to the newest."""
        return sorted(name.split("/")[1] for name in self._checkpoints())

    def fetch_checkpoint(self, step: str) -> Path:
        """The folder of this checkpoint on this node, where it is then the only one; fetched once per node."""
        name, folder = _checkpoint(step), self.folder / CHECKPOINTS / step
        with self._one_at_a_time():
            stored = self._checkpoints().get(name)
            if stored is None:
                raise ValueError(f"{self.url}/{name} has gone: another process trains this run, or removed it; start again")
            if not _same(self.folder / name, stored):
                self._fetch(name, stored)
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(self._incoming / name, self.folder / name)
            for other in folder.parent.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other)
        return folder

    def push_checkpoint(self, step: str, file: Path) -> None:
        """Upload a checkpoint, and then remove the older ones. It counts once it is wholly there."""
        self.store.write(_checkpoint(step), file)
        stored = self._checkpoints()
        _mark(file, stored.get(_checkpoint(step)))
        for name in stored:
            if name < _checkpoint(step):
                self.store.remove(name)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Meanwhile, this node's metrics.jsonl is at most some seconds older than that at the URL, wherever the trainer is."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(EVERY_SECONDS):
                # For the eye alone: who trains says what is wrong with the store.
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
        walked = os.walk(self.folder, onerror=_unless_gone)
        paths = (Path(folder, name) for folder, _, names in walked for name in names)
        return list(_its_own({path.relative_to(self.folder).as_posix(): None for path in paths if path.is_file()}))

    def _fetch(self, name: str, stored: Stored) -> None:
        path = self._incoming / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while file.tell() < stored.size:
                # What is appended to is small, and is read at one moment.
                data = self.store.read(name, file.tell(), file.tell() + (_PART if name.endswith(_LARGE) else _MOST))
                if not data:
                    break
                file.write(data)
            if name.endswith(_LARGE) and file.tell() != stored.size:
                raise ValueError(f"{self.url}/{name} was written anew while it was fetched; start again")
        _mark(path, stored)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Of those on this node who bring the folder up to date. An OSError is one of its disk: the store's are ValueErrors."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".pull", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                shutil.rmtree(self._incoming, ignore_errors=True)  # of one that was killed
                yield
                shutil.rmtree(self._incoming, ignore_errors=True)
        except OSError as error:
            raise ValueError(
                f"{self.folder}, where this node has the run {self.url}, cannot be written ({error.strerror}): make room or mend"
                " it there, or set PATCHCLR_CACHE to a folder on a local disk with room"
            ) from error


def fetch_source(source: str) -> str:
    """What initial weights come from: of a run at a URL its folder on this node, brought up to date; all else stays as it is."""
    if not is_url(source):
        return source
    mirror = Mirror(source)
    mirror.pull(whole=True)
    return str(mirror.folder)


def _unless_gone(error: OSError) -> None:
    """A checkpoint's folder may be removed while all are looked through."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _its_own(files: dict[str, Any]) -> dict[str, Any]:
    """Those that are the run's, by their names, and not of a run below it or of those who work on it."""
    return {name: each for name, each in files.items() if not name.startswith(_NOT_ITS) and "/." not in name}


def _checkpoint(step: str) -> str:
    return f"{CHECKPOINTS}/{step}/{CHECKPOINT_NAME}"


def _remove(path: Path) -> None:
    path.unlink()
    with contextlib.suppress(OSError):  # it is not empty
        path.parent.rmdir()


def _same(path: Path, stored: Stored | None) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return stored is not None and (stat.st_size, stat.st_mtime_ns) == stored


def _mark(path: Path, stored: Stored | None) -> None:
    """Give a file the time of writing of the one at the URL, unless it has grown meanwhile."""
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        if stored is not None and stored.written_ns is not None and path.stat().st_size == stored.size:
            os.utime(path, ns=(stored.written_ns, stored.written_ns))


@contextlib.contextmanager
def _lock_if_free(path: Path) -> Iterator[bool]:
    """A block with the kernel's lock on the file, if nobody else has it. Gives whether."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
