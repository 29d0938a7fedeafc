"""Asynchronous checkpoints: the state is copied, and a thread writes the copy while training continues."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHECKPOINTS = "checkpoints"  # folder in a run's folder
CHECKPOINT_NAME = "checkpoint.pt"


class Background:
    """Runs one task at a time in a background thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start the task after the previous one has ended. Raises what that raised."""
        self.wait()
        # Not a daemon: a script that ends, also by Ctrl-C, still finishes the checkpoint.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the task has ended, or for the time-out. Raises once what the task raised."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work):
        try:
            work()
        except BaseException as error:
            self._error = error


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


def newest_in(checkpoints: Path) -> str | None:
    """The name of the newest checkpoint; None if there is none."""
    return max((path.name for path in checkpoints.glob("step-*")), default=None)
