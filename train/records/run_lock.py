"""Locks that let one process at a time train a run: the kernel's for a folder, and an object at the store for a run at a URL."""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.remote_folder import NotThere, RemoteFolder

LOCK_NAME = ".lock"  # in a run's folder
LEASE_SECONDS = 60.0  # a lock at a store expires when it was not renewed for so long

_POLL_SECONDS = 1.0
# A process that renews another's lock so often while we wait is alive. A worker whose driver was killed may still renew it once.
_RENEWALS = 2
_CONTENT_BYTES = 2**20  # more than the lock's content ever has


@contextlib.contextmanager
def exclusive_lock(folder: Path, timeout_s: float) -> Iterator[None]:
    """A block in which no other process trains the run in this folder: two writers would undo each other's work.

    Raises ValueError where another process still holds the lock after the time-out.
    """
    ends, waiting = time.monotonic() + timeout_s, False
    with open(folder / LOCK_NAME, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a network drive without locks: no way to tell
                    break
                if time.monotonic() > ends:
                    raise ValueError(
                        f"{folder.name} is being trained by another process: wait for it or end it, or choose another --name"
                    ) from None
                if not waiting and timeout_s >= 1:
                    print(f"{folder.name}: another process works on this run; waiting {timeout_s:.0f} s for it", flush=True)
                waiting = True
                time.sleep(0.1)
            else:
                break
        yield


class LockLost(ValueError):
    """Another process has taken over the lock of a run at a URL."""


class StoreLock:
    """The lock of a run at a URL: an object there that says which process trains the run, and when it was last heard of.

    Each version of it is an object of its own, `.lease-1`, `.lease-2` and so on; the highest counts. A process takes the lock,
    renews it, and takes over one that has expired in the same way: it creates the next version, which the store lets exactly one
    process do (see RemoteFolder.create, also for stores that cannot). The others see at once that they do not hold it, and a
    holder that was suspended sees it when it renews. The nodes' clocks must agree to within half a minute.

    store: the run at its URL; folder: the run's on this node. Methods raise ValueError, too, where the store fails.
    """

    def __init__(self, store: RemoteFolder, folder: Path):
        self._store, self._folder, self._id = store, folder, secrets.token_hex(8)
        self._version = 0
        self._renewing = threading.Lock()

    def acquire(self) -> None:
        """Take the lock, once it is free or has expired. Raises ValueError as `wait` does."""
        while not self._create(self.wait() + 1):
            pass

    def renew(self) -> None:
        """Say that this process is alive. Raises LockLost where another one has taken over."""
        with self._renewing:
            if self._holds(self._version) and self._create(self._version + 1):
                return
        holder = self._newest()[1]
        if holder is None:  # another process may have trained the run meanwhile, so this one must not continue
            raise LockLost(
                f"{self._store.url}: the lock of this run was removed, perhaps by another process that trained the run"
                " meanwhile: run the same command again to resume from the newest checkpoint"
            )
        raise LockLost(
            f"{self._store.url} is being trained by another process, on {holder['host']}, which took over the lock"
            " when this process did not renew it: end one of them"
        )

    def release(self) -> None:
        """Give the lock up."""
        for version in self._versions():
            if version <= self._version:
                self._store.remove(_name(version))

    def wait(self) -> int:
        """Wait until no process trains the run: the lock is released or expires. Returns its version, 0 without a lock.

        Raises ValueError if another process renews it meanwhile.
        """
        version, seen = self._newest()
        ends, renewals = None, 0
        while seen is not None:
            # The kernel tells who has this very file locked, and would not have let us come here.
            if seen["lock"] and seen["lock"] == _file_identity(self._folder / LOCK_NAME):
                break
            if ends is None:
                age = min(max(time.time() - seen["time"], 0.0), LEASE_SECONDS)
                ends = time.monotonic() + LEASE_SECONDS - age
                if age < LEASE_SECONDS:
                    print(
                        f"{self._folder.name}: {seen['host']} trained it {age:.0f} s ago; if that process has died, this one"
                        f" starts in {LEASE_SECONDS - age:.0f} s",
                        flush=True,
                    )
            if time.monotonic() >= ends:
                break
            time.sleep(_POLL_SECONDS)
            version, now = self._newest()
            if now is not None and now != seen:
                renewals, ends = renewals + 1, time.monotonic() + LEASE_SECONDS
                if renewals == _RENEWALS:
                    raise ValueError(
                        f"{self._store.url} is being trained by another process, on {now['host']}: wait for it, or end it"
                        f" and wait {LEASE_SECONDS:.0f} s, or choose another --name"
                    )
            seen = now
        return version

    def _create(self, version: int) -> bool:
        """Create this version. Returns whether this process holds the lock with it."""
        who = {"id": self._id, "host": platform.node(), "process": os.getpid(), "time": time.time()}
        content = json.dumps(who | {"lock": _file_identity(self._folder / LOCK_NAME)}).encode()
        try:
            self._store.create(_name(version), content)
        except FileExistsError:
            if not self._holds(version):  # else an earlier try has arrived whose answer did not
                return False
        if max(self._versions(), default=0) != version:
            # Others have come further since this process looked, and removed what was there. Only this process made this version.
            self._store.remove(_name(version))
            return False
        self._version = version
        if version >= 2:  # the one before stays: a listing that is made meanwhile shows one of the two
            self._store.remove(_name(version - 2))
        return True

    def _holds(self, version: int) -> bool:
        try:
            return self._read(version)["id"] == self._id
        except NotThere:
            return False

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        """The newest version and its content; 0 and None if no process holds the lock."""
        while versions := self._versions():
            with contextlib.suppress(NotThere):  # renewed or released meanwhile
                return max(versions), self._read(max(versions))
        return 0, None

    def _versions(self) -> list[int]:
        found = (re.fullmatch(r"\.lease(?:-([1-9][0-9]{0,17}))?", name) for name in self._store.entries())
        return [int(match[1] or 0) for match in found if match]

    def _read(self, version: int) -> dict[str, Any]:
        """Raises NotThere, and ValueError for damaged content, which does not show whether the run is being trained."""
        data = self._store.read(_name(version), 0, _CONTENT_BYTES)
        try:
            content = json.loads(data)
            texts = [content["id"], content["host"], content["lock"] or ""]
            if not (all(isinstance(text, str) for text in texts) and math.isfinite(content["time"])):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self._store.url}/{_name(version)}, the lock of this run, is damaged: if no process trains the run, remove it"
            ) from error
        return content


def _name(version: int) -> str:
    return f".lease-{version}" if version else ".lease"  # which the first release wrote, without versions


def _file_identity(path: Path) -> str | None:
    """Identifies the file and the running kernel; None if the file does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {stat.st_dev} {stat.st_ino}"
