"""Rank 0's side of a run at a URL: that nobody else trains it, and that what it leaves gets there while it trains."""

import json
import os
import platform
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from pipelines.remote_folder import NotThere
from train.records.checkpoints import CHECKPOINT_NAME
from train.records.remote_run import EVERY_SECONDS, Mirror

LEASE_NAME = ".lease"
LEASE_SECONDS = 60.0  # after which a lease that was not renewed has run out
_LOOK_SECONDS = 1.0
_RENEWALS = 2  # seen of another's lease: it is alive. A worker whose driver was killed may still renew it once


class Upkeep:
    """A block in which this process trains a run at a URL, and what it leaves in its folder gets there.

    Two threads do that: one renews the lease and puts up what was written, every 15 s; one uploads checkpoints, always the
    newest that there is. Training waits for neither. What fails is tried for about two minutes (mirror: with how many tries).
    After that, files are tried again with the next look, and a checkpoint ends the run: `check` raises it.

    The lease is a small object: who, and when last renewed. It keeps a second process from a run that is being trained anywhere.
    It is no lock: two that begin in the same second may both take it. Each looks at it before it is renewed, so the one whose
    lease was overwritten ends within 15 s, and until then both write the same checkpoints. A process that the store does not
    hear of for a minute loses its lease to whoever asks for it, and ends when it finds out. The nodes' clocks must agree to
    within half a minute.

    Raises ValueError where another process renews its lease while this one waits for it to run out.
    """

    def __init__(self, mirror: Mirror):
        self._mirror = mirror
        self._me = secrets.token_hex(8)
        self._news = threading.Condition()  # of the two below
        self._offered: Path | None = None
        self._ended = False
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"mirror: {work.__name__}")
            for work in (self._renew, self._upload)
        ]

    def __enter__(self):
        await_lease(self._mirror)
        self._take()
        shutil.rmtree(self._links, ignore_errors=True)
        self._mirror.pull(whole=False, training=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self._stop.set()
        with self._news:
            self._ended = True
            self._news.notify()
        for thread in self._threads:
            thread.join()
        try:
            if self._error is None:
                self._mirror.push()
                self._mirror.remove(LEASE_NAME)
        except ValueError as error:
            self._error = error
        if kind is None:  # of two errors, the first one is told
            self.check()

    def offer(self, checkpoint: Path) -> None:
        """Have the checkpoint in this folder, step-NUMBER, uploaded; one that still waits for that is passed over."""
        self._links.mkdir(exist_ok=True)
        # A second name: the folder's own is removed when the next one is there.
        link = self._links / checkpoint.name
        link.unlink(missing_ok=True)
        os.link(checkpoint / CHECKPOINT_NAME, link)
        with self._news:
            passed_over, self._offered = self._offered, link
            self._news.notify()
        if passed_over:
            passed_over.unlink()

    def check(self) -> None:
        """Raise what keeps the run from going on, if anything does."""
        if self._error is not None:
            raise self._error

    @property
    def _links(self) -> Path:
        return self._mirror.folder / ".uploading"

    def _guarded(self, work):
        try:
            work()
        except BaseException as error:
            self._error = self._error or error

    def _renew(self):
        while not self._stop.wait(EVERY_SECONDS):
            try:
                holder = _holder(self._mirror)
                if holder is None or holder["id"] == self._me:
                    self._take()
                    self._mirror.push()
                    continue
            except ValueError:
                continue  # the store fails for now; a checkpoint that cannot be uploaded says so
            raise ValueError(
                f"{self._mirror.url} is being trained by another process, on {holder['host']}, which took it over when this one"
                " was not heard of: end one of them"
            )

    def _upload(self):
        while True:
            with self._news:
                self._news.wait_for(lambda: self._offered or self._ended)
                link, self._offered = self._offered, None
            if link is None:
                return
            self._mirror.push()  # first: metrics.jsonl has to reach at least as far as the checkpoint
            self._mirror.push_checkpoint(link.name, link)
            link.unlink()

    def _take(self):
        lease = {"id": self._me, "host": platform.node(), "process": os.getpid(), "time": time.time()}
        self._mirror.write(LEASE_NAME, json.dumps(lease | {"lock": _lock_file(self._mirror)}).encode())


def await_lease(mirror: Mirror) -> None:
    """Wait until nobody trains the run: until the lease has run out that somebody who was killed has left.

    Raises ValueError where it is renewed meanwhile.
    """
    seen, ends, renewals = _holder(mirror), None, 0
    while seen is not None:
        # Of this very file the kernel tells who has it locked, and would not have let us come here.
        if seen["lock"] == _lock_file(mirror):
            return
        if ends is None:
            age = min(max(time.time() - seen["time"], 0.0), LEASE_SECONDS)
            ends = time.monotonic() + LEASE_SECONDS - age
            if age < LEASE_SECONDS:
                print(
                    f"{mirror.name}: {seen['host']} trained it {age:.0f} s ago; if that has died, this goes on in"
                    f" {LEASE_SECONDS - age:.0f} s",
                    flush=True,
                )
        if time.monotonic() >= ends:
            return
        time.sleep(_LOOK_SECONDS)
        now = _holder(mirror)
        if now is not None and now != seen:
            renewals, ends = renewals + 1, time.monotonic() + LEASE_SECONDS
            if renewals == _RENEWALS:
                raise ValueError(
                    f"{mirror.url} is being trained by another process, on {now['host']}: wait for it, or end it and wait"
                    f" {LEASE_SECONDS:.0f} s, or choose another --name"
                )
        seen = now


def _holder(mirror: Mirror) -> dict[str, Any] | None:
    try:
        return json.loads(mirror.read(LEASE_NAME))
    except NotThere:
        return None


def _lock_file(mirror: Mirror) -> str | None:
    """Which file of which running kernel this node's lock is."""
    try:
        stat = (mirror.folder / ".lock").stat()
    except FileNotFoundError:
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {stat.st_dev} {stat.st_ino}"
