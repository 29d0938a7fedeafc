"""A shard set at a URL, through a cache on this node's disk: each shard is fetched once per node, when it is first needed.

    ~/.cache/patchclr/                      $PATCHCLR_CACHE, or what is given
      breast-1f0c9be0a35b7c42/              by the content of dataset.json: a set that was changed is another set
        dataset.json  manifest.parquet
        shard-000000.tar                    whole: its sha256 was that of dataset.json before it got this name
        shard-000001.tar.part               being fetched, or what a killed process left, which the next one takes up

All between processes is done by the kernel's locks (flock), which end with their holder. Who fetches a file has its .part
locked; the others wait for that lock and then find the file. Who uses a file has a shared lock on it, and only files without one
are removed to make room.
"""

import fcntl
import hashlib
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.remote_folder import MAX_JSON_BYTES, Interrupted, NotThere, RemoteFolder, is_url
from sharding.manifest import read_dataset

# Bytes of one request for any other file: what a failure costs, and what each thread holds in memory.
_REQUEST_BYTES = 8 * 2**20


def is_remote(shards: object) -> bool:
    """Is it the URL of a shard set (s3://bucket/kidney, https://..., file://...), and not a folder or an open reader?"""
    return is_url(shards)


def default_cache() -> Path:
    """$PATCHCLR_CACHE, or ~/.cache/patchclr."""
    return Path(os.environ.get("PATCHCLR_CACHE") or Path.home() / ".cache" / "patchclr").expanduser()


class RemoteSet:
    """The local mirror of a shard set at a URL.

    folder: has dataset.json and manifest.parquet from the start, so whatever reads a set's description reads it there; a shard
    is in it once `local` has returned it. A set that is changed at its URL while this one is open stays the same here.
    limit_bytes: of all that the cache holds; the files used longest ago make room. None: nothing is ever removed.
    parallel: shards fetched at once by `prefetch`. tries, timeout, sleep: see RemoteFolder.
    Raises ValueError for a URL where no shard set can be read, for a cache that cannot be written, and for a limit below
    the manifest and the largest shard. May be used by several threads; end it with `close`.
    """

    def __init__(
        self,
        url: str,
        cache: str | Path | None = None,
        *,
        limit_bytes: int | None = None,
        parallel: int = 4,
        tries: int = 6,
        timeout: float = 60.0,
        sleep: Callable[[float], Any] | None = None,
    ):
        assert parallel >= 1, parallel
        self.cache = Path(cache).expanduser() if cache else default_cache()
        self.limit_bytes, self.parallel = limit_bytes, parallel
        self._remote = RemoteFolder(url, tries=tries, timeout=timeout, sleep=sleep)
        self.url = self._remote.url
        self._lock = threading.Lock()  # of the three below
        self._used: dict[str, int] = {}  # file -> the descriptor that has it locked
        self._wanted: deque[str] = deque()
        self._threads: set[threading.Thread] = set()
        try:
            self.folder, self._digests = self._open()
            self.local("manifest.parquet")
            self._check_limit()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def local(self, name: str) -> Path:
        """The path of a file of the set, which stays there until `release`; fetched first if need be, and then it blocks.

        Raises ValueError, naming the file, where it cannot be fetched, is not what dataset.json says, or does not fit.
        """
        with self._lock:
            used = name in self._used
        if not used:
            handle = self._hold(name, wait=True)
            assert handle is not None
            with self._lock:
                if self._used.setdefault(name, handle) != handle:  # another thread was faster
                    os.close(handle)
        return self.folder / name

    def release(self, name: str) -> None:
        """It is not in use here any more and may make room for others. What is still mapped of it stays readable."""
        with self._lock:
            handle = self._used.pop(name, None)
        if handle is not None:
            os.close(handle)

    def prefetch(self, names: Iterable[str]) -> None:
        """Fetch these in the background, in this order; what an earlier call asked for and is not begun is forgotten.

        They are not in use until `local` returns them: with a limit, ask for no more than fits beside those that are.
        A failure ends the prefetching and is not said here: `local` meets it again, and only if the file is needed.
        """
        with self._lock:
            self._wanted = deque(name for name in names if not (self.folder / name).exists())
            for _ in range(min(self.parallel, len(self._wanted)) - len(self._threads)):
                thread = threading.Thread(target=self._work, name="prefetch of shards", daemon=True)
                self._threads.add(thread)
                thread.start()

    def close(self) -> None:
        """End what is being fetched, and give up what is in use: nothing half-fetched and no thread of ours is left.

        What is asked for later is fetched as before.
        """
        with self._lock:
            self._wanted.clear()
            threads, used = list(self._threads), list(self._used)
        with self._remote.interrupted():
            for thread in threads:
                thread.join()
        for name in used:
            self.release(name)

    def _open(self) -> tuple[Path, dict[str, str]]:
        """The set's folder in the cache, and the sha256 of its files."""
        try:
            data = self._remote.read("dataset.json", 0, MAX_JSON_BYTES)
        except NotThere as error:
            raise ValueError(f"{self.url} is not a shard set: {error}; give the folder that sharding/build.py wrote") from error
        place = re.sub(r"[^\w.-]", "_", self.url.rpartition("/")[2]) + "-" + hashlib.sha256(data).hexdigest()[:16]
        folder = self.cache / place
        with self._writing():
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache, prefix=".new-") as new:
                Path(new, "dataset.json").write_bytes(data)
                try:
                    digests = read_dataset(new)["files"]
                except ValueError as error:
                    raise ValueError(str(error).replace(new, self.url)) from None
                folder.mkdir(exist_ok=True)
                os.replace(Path(new, "dataset.json"), folder / "dataset.json")
        return folder, digests

    def _check_limit(self) -> None:
        if self.limit_bytes is None:
            return
        manifest = self.folder / "manifest.parquet"
        table = pq.read_table(manifest, columns=["offset", "size"])
        # The end of the last image: the tar is a little longer.
        largest = int(np.max(table["offset"].to_numpy() + table["size"].to_numpy(), initial=0))
        needed = manifest.stat().st_size + largest
        if self.limit_bytes < needed:
            raise ValueError(
                f"a cache of {self.limit_bytes:,} bytes cannot hold one shard of {self.url} and its manifest: raise its limit to "
                f"more than {needed:,} bytes, and better to several shards"
            )

    def _work(self) -> None:
        """A thread of `prefetch`: ends when nothing is wanted any more."""
        while True:
            with self._lock:
                if not self._wanted:
                    self._threads.discard(threading.current_thread())
                    return
                name = self._wanted.popleft()
            try:
                handle = self._hold(name, wait=False)
            except (ValueError, Interrupted):
                with self._lock:
                    self._wanted.clear()  # a store that fails is not helped by more requests
            else:
                if handle is not None:
                    os.close(handle)

    def _hold(self, name: str, *, wait: bool) -> int | None:
        """A descriptor of the whole file, with a shared lock. None where another is fetching it and wait is False."""
        if name not in self._digests:
            raise ValueError(f"{self.url}: {name} is not in dataset.json; build and upload the set again")
        path, part = self.folder / name, self.folder / f"{name}.part"
        with self._writing():
            while True:
                with suppress(FileNotFoundError):
                    handle = os.open(path, os.O_RDONLY)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    if _is_at(handle, path):
                        with suppress(PermissionError):  # of another user's file
                            # Used now; the kernel's own clock is coarser. The other time stays: readers hold it against changes.
                            os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
                        return handle
                    os.close(handle)  # removed to make room between our open and our lock
                with open(part, "a+b") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        if not wait:
                            return None
                        # Until it is fetched, or who does that has died. Not for an exclusive lock: when the file is whole,
                        # it is at once in use, and may be so for days.
                        fcntl.flock(file, fcntl.LOCK_SH)
                        continue
                    if not _is_at(file.fileno(), part):
                        continue  # who had the lock has finished it, or removed it
                    if path.exists():
                        part.unlink()  # it was finished between our look and our lock, and we began another
                        continue
                    self._fetch(name, file, part)
                    with self._room(0):  # nobody counts the files meanwhile
                        part.rename(path)

    def _fetch(self, name: str, file: BufferedRandom, part: Path) -> None:
        """Fill the .part, whose lock we have, until its bytes are those of dataset.json; the size need not be known for that."""
        expected = self._digests[name]
        try:
            for _ in range(2):  # wrong bytes are fetched once more
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256")  # what a process left that was killed, or lost its store
                while digest.hexdigest() != expected:
                    start = file.tell()
                    data = self._remote.read(name, start, start + _REQUEST_BYTES)
                    with self._room(len(data)):
                        file.write(data)
                        file.flush()
                    digest.update(data)
                    if len(data) < _REQUEST_BYTES:
                        break
                if digest.hexdigest() == expected:
                    os.fsync(file.fileno())
                    return
                file.truncate(0)
            raise ValueError(self._why_wrong(name, "its bytes are not those that dataset.json describes, and were wrong twice"))
        except NotThere:
            part.unlink()
            raise ValueError(self._why_wrong(name, "it is in dataset.json but not there")) from None
        except (OSError, Interrupted):
            part.unlink(missing_ok=True)  # on a full disk, every byte counts
            with suppress(OSError):  # what the buffer still holds does not fit either
                file.close()
            raise

    def _why_wrong(self, name: str, what: str) -> str:
        place = f"{self.url}/{name}"
        now = self._remote.read("dataset.json", 0, MAX_JSON_BYTES)
        if now != (self.folder / "dataset.json").read_bytes():
            return f"{place}: {what}, because the set was changed while it was in use; start again to use the set as it is now"
        return f"{place}: {what}; upload it again, or build the set again"

    @contextmanager
    def _room(self, needed: int) -> Iterator[None]:
        """Keep the cache within its limit while `needed` bytes are added to it; one process at a time does that."""
        if self.limit_bytes is None:
            yield
            return
        with open(self.cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for path in self.cache.glob("*/*"):
                with suppress(FileNotFoundError):  # of a process without a limit, which does not take this lock
                    stat = path.stat()
                    if path.name != "dataset.json" and S_ISREG(
                        stat.st_mode
                    ):  # folders are those of runs (train/records/remote_run.py)
                        found.append((path, stat))
            excess = sum(stat.st_size for _, stat in found) + needed - self.limit_bytes
            for path, stat in sorted(found, key=lambda each: each[1].st_atime_ns):
                if excess > 0 and _remove(path):
                    excess -= stat.st_size
            if excess > 0:
                raise ValueError(
                    f"the cache {self.cache} may hold {self.limit_bytes:,} bytes, and {excess:,} more are in use at once: raise "
                    "its limit, or let the shuffling window span fewer shards"
                )
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of the store are ValueErrors already: an OSError is one of the cache's disk."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"the cache {self.cache} cannot be written ({error.strerror}): make room or mend it there, set PATCHCLR_CACHE to "
                "a folder on a local disk with room, or give the cache a limit"
            ) from error


def _is_at(handle: int, path: Path) -> bool:
    """Is the open file still the one at this path?"""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file of the cache, unless some process uses or fetches it or it is another user's."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file.fileno(), path):
                path.unlink()
            return True
    except FileNotFoundError:
        return True
    except (BlockingIOError, PermissionError):
        return False
