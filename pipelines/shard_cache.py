"""A shard set at a URL, cached on this node's disk: each shard is downloaded once per node, when it is first needed.

    ~/.cache/patchclr/                      or $PATCHCLR_CACHE, or the `cache` argument
      breast-1f0c9be0a35b7c42/              named by a hash of dataset.json: a changed set is another set
        dataset.json  manifest.parquet
        shard-000000.tar                    complete: its sha256 was checked before it got this name
        shard-000001.tar.part               a download in progress, or interrupted; the next process continues it

Processes coordinate by the kernel's file locks (flock), which end with their holder. A process that downloads a file holds an
exclusive lock on its .part; others wait for that lock and then find the file. A process that uses a file holds a shared lock on
it; only files without a lock are evicted.

fsspec's own caches (filecache, blockcache) would not do: they check no digests, do not share one size limit between processes,
and may evict a file that another process reads.
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

from pipelines.remote_folder import MAX_JSON_BYTES, Interrupted, NotThere, RemoteFolder
from sharding.manifest import read_dataset, read_manifest

# Bytes of one request for any other file: what a failure costs, and what each thread holds in memory.
_REQUEST_BYTES = 8 * 2**20


def default_cache() -> Path:
    """$PATCHCLR_CACHE, or ~/.cache/patchclr."""
    return Path(os.environ.get("PATCHCLR_CACHE") or Path.home() / ".cache" / "patchclr").expanduser()


class RemoteSet:
    """A local copy of a shard set at a URL, filled on demand.

    folder: contains dataset.json and manifest.parquet from the start, and each shard once `local` has returned it. Changes at the
    URL do not affect an open set.
    limit_bytes: size limit of the whole cache; the least recently used files are evicted. None: nothing is evicted.
    parallel: concurrent downloads of `prefetch`. tries, timeout, sleep: see RemoteFolder.
    Raises ValueError if no shard set can be read at the URL, if the cache cannot be written, and if the limit is too small for
    the manifest and the largest shard. Thread-safe; end it with `close`.
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
        """The path of a file of the set, which stays there until `release`. Blocks while the file is downloaded.

        Raises ValueError, naming the file, if it cannot be downloaded, differs from dataset.json's digest, or does not fit.
        """
        with self._lock:
            used = name in self._used
        if not used:
            handle = self._open_locked(name, wait=True)
            assert handle is not None
            with self._lock:
                if self._used.setdefault(name, handle) != handle:  # another thread was faster
                    os.close(handle)
        return self.folder / name

    def release(self, name: str) -> None:
        """Allow the file's eviction. Existing memory maps of it stay readable."""
        with self._lock:
            handle = self._used.pop(name, None)
        if handle is not None:
            os.close(handle)

    def prefetch(self, names: Iterable[str]) -> None:
        """Download these files in the background, in this order. Replaces the files of earlier calls that have not started yet.

        They may be evicted until `local` returns them: under a limit, ask for no more than fits beside the files in use.
        A failure ends the prefetching silently; `local` raises it if the file is needed.
        """
        with self._lock:
            self._wanted = deque(name for name in names if not (self.folder / name).exists())
            for _ in range(min(self.parallel, len(self._wanted)) - len(self._threads)):
                thread = threading.Thread(target=self._prefetch_worker, name="prefetch of shards", daemon=True)
                self._threads.add(thread)
                thread.start()

    def close(self) -> None:
        """Cancel downloads, remove their partial files, end all threads and release all files. The set can be used again."""
        with self._lock:
            self._wanted.clear()
            threads, used = list(self._threads), list(self._used)
        with self._remote.interrupted():
            for thread in threads:
                thread.join()
        for name in used:
            self.release(name)

    def _open(self) -> tuple[Path, dict[str, str]]:
        """The set's folder in the cache, and the sha256 of each file."""
        try:
            data = self._remote.read("dataset.json", 0, MAX_JSON_BYTES)
        except NotThere as error:
            raise ValueError(f"{self.url} is not a shard set: {error}; give the folder that sharding/build.py wrote") from error
        place = re.sub(r"[^\w.-]", "_", self.url.rpartition("/")[2]) + "-" + hashlib.sha256(data).hexdigest()[:16]
        folder = self.cache / place
        with self._disk_errors_explained():
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
        table = read_manifest(self.folder, columns=["offset", "size"])
        # The end of the last image: the tar is a little longer.
        largest = int(np.max(table["offset"].to_numpy() + table["size"].to_numpy(), initial=0))
        needed = manifest.stat().st_size + largest
        if self.limit_bytes < needed:
            raise ValueError(
                f"a cache of {self.limit_bytes:,} bytes cannot hold one shard of {self.url} and its manifest: raise its limit to "
                f"more than {needed:,} bytes, and better to several shards"
            )

    def _prefetch_worker(self) -> None:
        """A thread of `prefetch`; ends when the queue is empty."""
        while True:
            with self._lock:
                if not self._wanted:
                    self._threads.discard(threading.current_thread())
                    return
                name = self._wanted.popleft()
            try:
                handle = self._open_locked(name, wait=False)
            except (ValueError, Interrupted):
                with self._lock:
                    self._wanted.clear()  # more requests do not help a failing store
            else:
                if handle is not None:
                    os.close(handle)

    def _open_locked(self, name: str, *, wait: bool) -> int | None:
        """A descriptor of the complete file, with a shared lock. None if another process is downloading it and wait is False."""
        if name not in self._digests:
            raise ValueError(f"{self.url}: {name} is not in dataset.json; build and upload the set again")
        path, part = self.folder / name, self.folder / f"{name}.part"
        with self._disk_errors_explained():
            while True:
                with suppress(FileNotFoundError):
                    handle = os.open(path, os.O_RDONLY)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    if _is_same_file(handle, path):
                        with suppress(PermissionError):  # of another user's file
                            # The access time is for eviction; the kernel's clock is coarser. The modification time must stay:
                            # readers detect changes by it.
                            os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
                        return handle
                    os.close(handle)  # evicted between our open and our lock
                with open(part, "a+b") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        if not wait:
                            return None
                        # Waits until the download ends or its process dies. A shared lock, since a complete file is in use
                        # at once, perhaps for days.
                        fcntl.flock(file, fcntl.LOCK_SH)
                        continue
                    if not _is_same_file(file.fileno(), part):
                        continue  # the lock's last holder completed or removed it
                    if path.exists():
                        part.unlink()  # completed between our check and our lock, and we created another
                        continue
                    self._fetch(name, file, part)
                    with self._make_room(0):  # no process counts the files meanwhile
                        part.rename(path)

    def _fetch(self, name: str, file: BufferedRandom, part: Path) -> None:
        """Download into the .part, whose lock we hold, until its digest is that of dataset.json."""
        expected = self._digests[name]
        try:
            for _ in range(2):  # wrong bytes are downloaded once more
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256")  # of what an interrupted download left
                while digest.hexdigest() != expected:
                    start = file.tell()
                    data = self._remote.read(name, start, start + _REQUEST_BYTES)
                    with self._make_room(len(data)):
                        file.write(data)
                        file.flush()
                    digest.update(data)
                    if len(data) < _REQUEST_BYTES:
                        break
                if digest.hexdigest() == expected:
                    os.fsync(file.fileno())
                    return
                file.truncate(0)
            raise ValueError(self._explain_mismatch(name, "its bytes do not match dataset.json, in two downloads"))
        except NotThere:
            part.unlink()
            raise ValueError(self._explain_mismatch(name, "it is in dataset.json but does not exist")) from None
        except (OSError, Interrupted):
            part.unlink(missing_ok=True)  # frees a full disk
            with suppress(OSError):  # what the buffer still holds does not fit either
                file.close()
            raise

    def _explain_mismatch(self, name: str, what: str) -> str:
        place = f"{self.url}/{name}"
        now = self._remote.read("dataset.json", 0, MAX_JSON_BYTES)
        if now != (self.folder / "dataset.json").read_bytes():
            return f"{place}: {what}, because the set was changed while it was in use; start again to use the set as it is now"
        return f"{place}: {what}; upload it again, or build the set again"

    @contextmanager
    def _make_room(self, needed: int) -> Iterator[None]:
        """Evict files so that `needed` bytes fit within the limit. One process at a time is in this context."""
        if self.limit_bytes is None:
            yield
            return
        with open(self.cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for path in self.cache.glob("*/*"):
                with suppress(FileNotFoundError):  # removed by a process without a limit, which takes no lock
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
    def _disk_errors_explained(self) -> Iterator[None]:
        """Turn an OSError into a ValueError about the cache's disk; errors of the store are ValueErrors already."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"the cache {self.cache} cannot be written ({error.strerror}): free or repair that disk, set PATCHCLR_CACHE to "
                "a folder on a local disk with room, or give the cache a limit"
            ) from error


def _is_same_file(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file of the cache unless a process has it locked or it belongs to another user. Returns whether it was removed."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(file.fileno(), path):
                path.unlink()
            return True
    except FileNotFoundError:
        return True
    except (BlockingIOError, PermissionError):
        return False
