"""Where one worker of a run keeps it: the run's checkpoints, and the lock that keeps others from training it meanwhile.

A run is in a folder that all its workers share, or at a URL, of which each node has a mirror. The training loop sees no
difference.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from train.records.checkpoints import CHECKPOINTS, Background, keep_newest, newest_in
from train.records.remote_run import Mirror
from train.records.retry import RETRY_TIMEOUT_S, retry_io
from train.records.uploader import LOCK_TIMEOUT_S, RunUploader, locked_run

_TRIES = 12  # of each request to the object store while a run is trained: about two minutes of pauses


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
        self._writer = Background()
        self._mirror = Mirror(url, tries=_TRIES) if url else None
        self._uploader: RunUploader | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """See `locked_run`."""
        with locked_run(self._folder, self._mirror, self._lock_timeout_s) as self._uploader:
            yield

    def newest(self) -> str | None:
        """The name of the newest checkpoint; None where there is none."""
        return max(self._mirror.checkpoints(), default=None) if self._mirror else newest_in(self._checkpoints)

    def fetch(self, name: str) -> Path:
        """The folder of this checkpoint on this node."""
        return self._mirror.fetch_checkpoint(name) if self._mirror else self._checkpoints / name

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Have a thread call `write` with the folder of a new checkpoint, after the one before is written.

        Raises what kept the one before from being written.
        """
        self._writer.start(functools.partial(self._save_now, step, write))

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the newest checkpoint is written, at most so many seconds. Raises what kept it from being written, and
        what keeps the run from being uploaded."""
        self._writer.wait(timeout_s)
        if self._uploader:
            self._uploader.raise_error()

    def _save_now(self, step: int, write: Callable[[Path], None]) -> None:
        written = retry_io(lambda: keep_newest(self._checkpoints, step, write), self._checkpoints, timeout_s=self.retry_timeout_s)
        if self._uploader:
            self._uploader.submit(written)
