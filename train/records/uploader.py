"""The lock of a run in a folder or at a URL, and the uploads of its holder."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.records.remote_run import CHECKPOINT_NAME, SYNC_INTERVAL_S, Mirror
from train.records.run_lock import LockLost, StoreLock, exclusive_lock

LOCK_TIMEOUT_S = 30.0  # a worker whose driver was killed may live on for so long


@contextlib.contextmanager
def locked_run(folder: Path, mirror: Mirror | None = None, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator["RunUploader | None"]:
    """A block in which no other process writes into the run. Yields its uploader where it is at a URL.

    When the block ends, a run at a URL has all its files there. Raises ValueError if another process still holds the lock after
    the time-out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder, timeout_s):
        if mirror is None:
            yield None
        else:
            with RunUploader(mirror) as uploader:
                yield uploader


class RunUploader:
    """A block in which this process holds the lock of a run at a URL, and uploads what it writes into the run's folder.

    Training waits for neither of its two threads. One renews the lock and uploads changed files, every 15 s. The other uploads
    checkpoints, always the newest, and renews the lock before each. Requests that fail are retried for about two minutes (mirror:
    with how many tries). After that, files are uploaded with the next round, and a checkpoint ends the run, as does a lost lock:
    `raise_error` raises it.

    Raises ValueError where another process trains the run.
    """

    def __init__(self, mirror: Mirror):
        self._mirror = mirror
        self._lock = StoreLock(mirror.store, mirror.folder)
        self._links = mirror.folder / ".uploading"
        self._news = threading.Condition()  # of the two below
        self._submitted: Path | None = None
        self._ended = False
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="uploader")

    def __enter__(self):
        self._lock.acquire()
        shutil.rmtree(self._links, ignore_errors=True)
        self._mirror.pull(whole=False, training=True)
        self._tasks = [self._threads.submit(work) for work in (self._upload_files, self._upload_checkpoints)]
        return self

    def __exit__(self, kind, *_):
        self._stop.set()
        with self._news:
            self._ended = True
            self._news.notify()
        self._threads.shutdown()
        # Of two errors, the first one is raised.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.raise_error()
            self._mirror.push()
            self._lock.release()

    def submit(self, checkpoint: Path) -> None:
        """Have the checkpoint in this folder, step-NUMBER, uploaded. One that still waits for its upload is skipped."""
        self._links.mkdir(exist_ok=True)
        # A second name: the folder's own is removed when the next one is there.
        link = self._links / checkpoint.name
        link.unlink(missing_ok=True)
        os.link(checkpoint / CHECKPOINT_NAME, link)
        with self._news:
            skipped, self._submitted = self._submitted, link
            self._news.notify()
        if skipped:
            skipped.unlink()

    def raise_error(self) -> None:
        """Raise what ended one of the threads, if anything did."""
        for task in self._tasks:
            if task.done():
                task.result()

    def _upload_files(self):
        while not self._stop.wait(SYNC_INTERVAL_S):
            try:
                self._lock.renew()
                self._mirror.push()
            except LockLost:
                raise
            except ValueError:
                continue  # the store fails for now; a checkpoint that cannot be uploaded says so

    def _upload_checkpoints(self):
        while True:
            with self._news:
                self._news.wait_for(lambda: self._submitted or self._ended)
                link, self._submitted = self._submitted, None
            if link is None:
                return
            self._lock.renew()
            self._mirror.push()  # first: metrics.jsonl has to reach at least as far as the checkpoint
            self._mirror.push_checkpoint(link.name, link)
            link.unlink()
