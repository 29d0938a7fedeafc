"""Retries for storage that fails: a network drive that is away for a moment, or a disk that is full until someone frees space."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

RETRY_TIMEOUT_S = 120.0  # requests to an object store (train/records/remote_run.py) are retried for as long
_PAUSE_S = 1.0  # between two tries


def retry_io(work: Callable[[], Result], place: str | Path, *, timeout_s: float = RETRY_TIMEOUT_S) -> Result:
    """Call a function that writes to a place until it succeeds. Returns what it returns.

    Raises ValueError that names the place after the time-out, also for the RuntimeError with which torch reports a full disk. The
    first failure is printed, so that a run that makes no progress says why.
    """
    ends, printed = time.monotonic() + timeout_s, False
    while True:
        try:
            return work()
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
            if time.monotonic() > ends:
                raise ValueError(
                    f"{place}: cannot be written ({reason}): free space or make the folder writable, and run the same command"
                    " again to resume from the previous checkpoint"
                ) from error
            if not printed:
                print(f"{place}: cannot be written ({reason}); retrying for {timeout_s:.0f} s", flush=True)
                printed = True
            time.sleep(min(_PAUSE_S, timeout_s))


def await_folder(folder: Path, *, timeout_s: float = RETRY_TIMEOUT_S) -> None:
    """Wait until the folder exists. Raises ValueError if it does not after the time-out."""
    ends = time.monotonic() + timeout_s
    while not _is_there(folder):
        if time.monotonic() > ends:
            raise ValueError(f"{folder} does not exist: mount the storage on this node, at the same path as on the others")
        time.sleep(min(_PAUSE_S, timeout_s))


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # a network drive that has lost its server
        return False
