"""Asynchronous checkpoints: the state is copied, and a thread writes the copy while training continues.

A run is in a folder that all its workers share, or at a URL, of which each node has a mirror. The training loop sees no
difference.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from train.records.remote_run import CHECKPOINT_NAME, CHECKPOINTS, Mirror
from train.records.retry import RETRY_TIMEOUT_S, retry_io
from train.records.uploader import LOCK_TIMEOUT_S, RunUploader, locked_run

_TRIES = 12  # of each request to the object store while a run is trained: about two minutes of pauses


def copied_state(state: Any, device: torch.device) -> Callable[[Path], None]:
    """Copy the state as it is now. Returns a function that writes the copy into a folder, from any thread.

    state: dicts and lists of tensors and plain data, on the device or the CPU; it may change as soon as this returns. Copies
    from a GPU are asynchronous, in stream order: only the writing waits for them.
    """
    copy = _copied(state)
    done = None
    if device.type == "cuda":
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))

    def write(folder: Path) -> None:
        if done is not None:
            done.synchronize()
        path = folder / CHECKPOINT_NAME
        torch.save(copy, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # before the rename, so that a power loss leaves no name without content

    return write


def _copied(value):
    if isinstance(value, torch.Tensor):
        if value.device.type != "cuda":
            return value.clone()
        # Pinned, so that the copy does not block the host.
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value


def keep_newest(checkpoints: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint to checkpoints/step-NUMBER atomically, and remove the others. Returns that folder.

    Raises OSError if that fails, and if the folder above `checkpoints` does not exist: making it would hide that a network drive
    is not mounted. On a full disk torch's writer raises RuntimeError.
    """
    partial, final = checkpoints / f".step-{step:09d}.partial", checkpoints / f"step-{step:09d}"
    try:
        for left in checkpoints.glob(".step-*.partial"):  # of a run that was killed while writing
            shutil.rmtree(left)
        checkpoints.mkdir(exist_ok=True)
        partial.mkdir()
        write(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint only takes room on a full disk
        raise
    for old in sorted(checkpoints.glob("step-*"))[:-1]:
        shutil.rmtree(old)
    return final


class CheckpointStore:
    """A run's checkpoints. All workers may read; only rank 0 calls `locked` and `save`.

    Every checkpoint of a run is as good as any other, whichever worker wrote it and however many there were: what follows is the
    same. Only the newest one is kept.

    folder: of the run; url: of the run, where it is at one, and then the folder is this node's mirror. lock_timeout_s: how long
    to wait for another process that still trains the run. retry_timeout_s: how long to retry on storage that fails.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
    ):
        self._folder = folder
        self.retry_timeout_s = retry_timeout_s
        self._lock_timeout_s = lock_timeout_s
        self._checkpoints = folder / CHECKPOINTS
        # Not a daemon: a script that ends, also by Ctrl-C, still finishes the checkpoint.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._mirror = Mirror(url, tries=_TRIES) if url else None
        self._uploader: RunUploader | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """See `locked_run`."""
        with locked_run(self._folder, self._mirror, self._lock_timeout_s) as self._uploader:
            yield

    def newest(self) -> str | None:
        """The name of the newest checkpoint, or None."""
        names = self._mirror.checkpoints() if self._mirror else [path.name for path in self._checkpoints.glob("step-*")]
        return max(names, default=None)

    def fetch(self, name: str) -> Path:
        """The folder of this checkpoint on this node."""
        return self._mirror.fetch_checkpoint(name) if self._mirror else self._checkpoints / name

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Have a thread call `write` with the folder of a new checkpoint, after the one before is written. Raises as `wait`."""
        self.wait()
        self._writing = self._thread.submit(self._save_now, step, write)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the newest checkpoint is written, at most this many seconds. Raises the error that prevented it (once),
        and what keeps the run from being uploaded."""
        if self._writing and wait([self._writing], timeout_s).done:
            written, self._writing = self._writing, None
            written.result()
        if self._uploader:
            self._uploader.raise_error()

    def _save_now(self, step: int, write: Callable[[Path], None]) -> None:
        written = retry_io(lambda: keep_newest(self._checkpoints, step, write), self._checkpoints, timeout_s=self.retry_timeout_s)
        if self._uploader:
            self._uploader.submit(written)
