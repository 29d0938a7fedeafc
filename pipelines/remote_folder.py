"""A folder at a URL, through any fsspec driver: read ranges of files, write complete files, list and remove files.

All stores share one retry policy: each request has a time-out, and failed requests are repeated with exponential back-off, since
an overloaded store recovers only when its clients wait. The drivers' own retries are turned off, as they would multiply ours.
"""

import asyncio
import datetime
import errno
import functools
import random
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec

from sharding.cli import without_addresses

# For each driver: turn its own retries off, and read bytes as stored, because checksums are of those.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}},
    "http": {"headers": {"Accept-Encoding": "identity"}},
    "file": {"auto_mkdir": True},
}
_OPTIONS["s3a"], _OPTIONS["https"] = _OPTIONS["s3"], _OPTIONS["http"]
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
MAX_JSON_BYTES = 2**30  # of a dataset.json or run.json, which is read in one request
_KEPT = ": what was fetched is kept"
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what a file system without hard links answers
_SLOWEST = 2**20  # bytes per second: slower writes time out
# Names that drivers give to the time when a file was written.
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


class Interrupted(Exception):
    """The request was cancelled by `interrupted`."""


class NotThere(ValueError):
    """The store has no such file."""


class _BeyondTheEnd(Exception):
    pass


class Stored(NamedTuple):
    """A stored file: its size in bytes, and when it was written, in nanoseconds since 1970 (None if the driver does not say)."""

    size: int
    written_ns: int | None


class RemoteFolder:
    """The files of a folder at a URL. Thread-safe.

    url: scheme://..., without a password or query; the driver finds its credentials itself (AWS_*, ~/.aws, ...).
    tries: per request; timeout: seconds per request, for asynchronous drivers (s3, http, gcs, abfs; not file and memory);
    sleep: called with the seconds of each pause; by default an interruptible wait.
    Raises ValueError for a URL that no installed driver reads, and for one with a password or a query.
    """

    def __init__(self, url: str, *, tries: int = 6, timeout: float = 60.0, sleep: Callable[[float], Any] | None = None):
        assert is_url(url) and tries >= 1 and timeout > 0, (url, tries, timeout)
        scheme = url.partition("://")[0]
        if urlsplit(url).password is not None:
            raise ValueError(
                f"the address {scheme}://... has a password in it, which would be written into every record of the run: leave it "
                "out, and set the driver's credentials in the environment"
            )
        if "?" in url:
            raise ValueError(f"{url.partition('?')[0]}: give the address of the set's folder, without ? and what follows")
        self.url, self.tries, self.timeout = url.rstrip("/"), tries, timeout
        try:
            # A driver instance of our own, since a cached one keeps the first caller's credentials. No cached listings, since
            # others write there too.
            settings = {"skip_instance_cache": True, "use_listings_cache": False} | _OPTIONS.get(scheme, {})
            self._fs, path = fsspec.url_to_fs(self.url, **settings)
        except ImportError as error:
            raise ValueError(f"{self.url}: the driver of {scheme}:// is not installed ({error}): install it with pip") from error
        except ValueError as error:
            raise ValueError(
                f"{self.url}: no driver reads {scheme}:// ({error}): use s3://, https:// or a local folder"
            ) from error
        if hasattr(self._fs, "retries"):
            self._fs.retries = 1  # s3fs retries on top of its library's retries, which the options turn off
        self._path = path.rstrip("/")
        self._interrupt = threading.Event()
        self._sleep = sleep or self._interrupt.wait
        self._running: set[Future] = set()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file; fewer if it ends before, none beyond its end.

        A server without range support sends the whole file, of which everything from start on is returned.
        Raises NotThere; ValueError with the file and the last error if access is denied or every try failed; Interrupted, see
        `interrupted`.
        """
        try:
            data = self._retry(name, "read", "cat_file", f"{self._path}/{name}", start=start, end=stop)
        except _BeyondTheEnd:
            return b""
        return data[start:] if len(data) > stop - start else data

    def write(self, name: str, source: bytes | Path) -> None:
        """Store bytes or a local file under this name, atomically: the old content stays if anything fails.

        Needs a store that puts whole objects, as s3, gcs and abfs do; for file://, a rename does it. Raises as `read` does, and
        FileNotFoundError for a missing local file.
        """
        path = f"{self._path}/{name}"
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        put = functools.partial(self._retry, name, "written", timeout=self.timeout + size / _SLOWEST)
        # Readers could see a half-written local copy.
        local = getattr(self._fs, "local_file", False)
        target = "{}/.{}.partial".format(*path.rsplit("/", 1)) if local else path
        if isinstance(source, bytes):
            put("pipe_file", target, source)
        else:
            put("put_file", str(source), target)
        if local:
            self._retry(name, "written", "mv", target, path)

    def create(self, name: str, data: bytes) -> None:
        """Create a file: if several processes do so at once, exactly one succeeds.

        This holds for file, and for s3 if the store supports If-None-Match, as AWS does. Other drivers have
        what their mode="create" does, and some only look first whether the file is there: two may succeed at the same moment.
        Raises FileExistsError, and as `write` does.
        """
        path = f"{self._path}/{name}"
        create = functools.partial(self._retry, name, "created")
        if not getattr(self._fs, "local_file", False):
            create("pipe_file", path, data, mode="create")
            return
        partial = "{}/.{}.{}.partial".format(*path.rsplit("/", 1), secrets.token_hex(4))
        try:
            create("pipe_file", partial, data)
            create("link", partial, path)
        finally:
            self.remove(partial.removeprefix(f"{self._path}/"))

    def names(self, under: str = "") -> dict[str, Stored]:
        """All files of the folder, or of a folder in it, recursively; none if there is no such folder.

        Raises as `read` does.
        """
        try:
            found = self._retry(under, "listed", "find", f"{self._path}/{under}".rstrip("/"), detail=True)
        except NotThere:
            return {}
        # Drivers differ in whether paths begin with a slash.
        start = len(self._path.strip("/")) + 1
        return {path.strip("/")[start:]: Stored(info["size"], _written_ns(info)) for path, info in found.items() if info}

    def entries(self) -> list[str]:
        """The names of files and folders directly in the folder, at one moment; empty if there is no such folder.

        Raises as `read` does.
        """
        try:
            found = self._retry("", "listed", "ls", self._path, detail=False)
        except NotThere:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises as `read` does."""
        try:
            self._retry(name, "removed", "rm_file", f"{self._path}/{name}")
        except NotThere:
            return

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Within this context every request raises Interrupted, including those in progress."""
        self._interrupt.set()
        try:
            for request in list(self._running):
                request.cancel()
            yield
        finally:
            self._interrupt.clear()

    def _pause(self, attempt: int) -> None:
        """Exponential back-off from half a second, with jitter so that a cluster's ranks do not return at once."""
        longest = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
        self._sleep(longest * random.SystemRandom().uniform(0.5, 1.0))  # does not affect results, so no seeded stream
        if self._interrupt.is_set():
            raise Interrupted

    def _retry(self, name: str, done: str, method: str, *args: Any, timeout: float | None = None, **settings: Any) -> Any:
        """Call the driver's method under the retry policy. done: what should happen to the file, as a participle for messages."""
        place = f"{self.url}/{name}".rstrip("/")
        for attempt in range(self.tries):
            try:
                return self._send(method, *args, timeout=timeout or self.timeout, **settings)
            except Exception as error:  # drivers have exceptions of many kinds
                if self._interrupt.is_set():
                    raise Interrupted from error
                status = _http_status(error)
                if status == 416:  # range not satisfiable: it starts at the file's end or beyond
                    raise _BeyondTheEnd from error
                if done == "created" and (isinstance(error, FileExistsError) or status == 412):  # a precondition failed
                    raise FileExistsError(f"{place} is there already") from error
                if isinstance(error, FileNotFoundError):
                    hint = ": check that the bucket exists" if done in ("written", "created") else ""
                    raise NotThere(f"{place} does not exist ({_error_text(error)}){hint}") from error
                if method == "link" and getattr(error, "errno", None) in _NO_LINKS:
                    raise ValueError(
                        f"{place} cannot be created: this file system has no hard links; give the folder without file://, or"
                        " another place"
                    ) from error
                if isinstance(error, NotImplementedError) or getattr(error, "errno", None) == errno.ENOSYS:
                    raise ValueError(f"{place} cannot be {done}: this store or its driver cannot do that; use s3://") from error
                if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
                    raise ValueError(
                        f"{place} may not be {done} ({_error_text(error)}): set credentials with that permission, in the "
                        "environment or its own files (for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
                    ) from error
                if attempt + 1 == self.tries:
                    raise ValueError(
                        f"{place} cannot be {done}: {self.tries} tries failed, the last with {_error_text(error)}; check "
                        f"that the store is up and reachable, and start again{_KEPT if done == 'read' else ''}"
                    ) from error
                self._pause(attempt)
        raise AssertionError

    def _send(self, method: str, *args: Any, timeout: float, **settings: Any) -> Any:
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*args, **settings)
        request = asyncio.run_coroutine_threadsafe(getattr(self._fs, f"_{method}")(*args, **settings), self._fs.loop)
        self._running.add(request)
        try:
            if self._interrupt.is_set():
                raise Interrupted
            return request.result(timeout)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {timeout:g} s") from error
        finally:
            request.cancel()  # does nothing to one that has ended
            self._running.discard(request)


def is_url(text: object) -> bool:
    """Whether it is a string that begins with a scheme, such as s3://."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def _http_status(error: BaseException) -> int | None:
    """The HTTP status of a driver's error: aiohttp's, or that of the botocore error that s3fs translated."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None)


def _written_ns(info: dict[str, Any]) -> int | None:
    """When a file was written, from a driver's datetime, seconds or ISO 8601 string."""
    time = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(time, str):
        time = datetime.datetime.fromisoformat(time)
    if isinstance(time, datetime.datetime):
        time = time.timestamp()
    return None if time is None else round(time * 10**9)


def _error_text(error: BaseException) -> str:
    """An error's message in one line; its type if the message is empty."""
    return without_addresses(" ".join(str(error).split())) or type(error).__name__
