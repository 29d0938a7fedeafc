"""Storage that fails is waited for: a network drive that is away for a moment, a disk that is full until somebody makes room."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE = 120.0  # seconds; what is asked of an object store (train/records/remote_run.py) is tried for as long
_PAUSE = 1.0  # between two tries


def patiently(work: Callable[[], Result], place: str | Path, *, seconds: float = PATIENCE) -> Result:
    """Call what writes to a place, again and again until it can, for at most so many seconds.

    Raises ValueError that names the place where it still cannot, also for the RuntimeError with which torch's writer tells of a
    full disk. The first failure is printed: a run that stands still says why.
    """
    ends, told = time.monotonic() + seconds, False
    while True:
        try:
            return work()
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
            if time.monotonic() > ends:
                raise ValueError(
                    f"{place}: could not be written ({reason}): see that there is room and that the folder can be written to;"
                    " the same command then goes on from the checkpoint before"
                ) from error
            if not told:
                print(f"{place}: could not be written ({reason}); trying again for {seconds:.0f} s", flush=True)
                told = True
            time.sleep(min(_PAUSE, seconds))


def await_folder(folder: Path, *, seconds: float = PATIENCE) -> None:
    """Wait until the folder is there. Raises ValueError where it is not after so many seconds."""
    ends = time.monotonic() + seconds
    while not _is_there(folder):
        if time.monotonic() > ends:
            raise ValueError(f"{folder} is not there: mount the storage on this node, at the same place as on the others")
        time.sleep(min(_PAUSE, seconds))


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # a network drive that has lost its server
        return False
