"""Checkpoints that are written while training goes on: a copy of the state is taken, and a thread writes it."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHECKPOINTS = "checkpoints"  # the folder of them in a run's
CHECKPOINT_NAME = "checkpoint.pt"


class Background:
    """One piece of work at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin it, after the work before it has ended. Raises what that raised."""
        self.wait()
        # No daemon: a script that ends, also by Ctrl-C, still finishes what it was writing.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until the work has ended, or for at most so many seconds. Raises what it raised, once."""
        if self._thread is not None:
            self._thread.join(seconds)
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
    """Copy the state as it is now, and return what writes the copy into a folder, from any thread.

    state: dicts and lists of tensors and plain data, on the device or the CPU; it may change as soon as this returns. From a
    GPU the copies are only asked for, in the order of the device's work: nothing waits for them but the writing.
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
            os.fsync(file.fileno())  # a node that loses power keeps the name, which is given next, only with the content

    return write


def _copied(value):
    if isinstance(value, torch.Tensor):
        if value.device.type != "cuda":
            return value.clone()
        # Pinned, so that the copy does not hold the host up.
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value


def keep_newest(checkpoints: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint under checkpoints/step-NUMBER, whole or not at all, and remove the others. Returns that folder.

    Raises OSError where that cannot be, also where the folder above `checkpoints` is not there: made anew, it would hide that a
    network drive is not mounted. torch's writer tells of a full disk by a RuntimeError.
    """
    partial, final = checkpoints / f".step-{step:09d}.partial", checkpoints / f"step-{step:09d}"
    try:
        for left in checkpoints.glob(".step-*.partial"):  # of a run that was killed while it wrote
            shutil.rmtree(left)
        checkpoints.mkdir(exist_ok=True)
        partial.mkdir()
        write(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint helps nobody on a full disk
        raise
    for old in sorted(checkpoints.glob("step-*"))[:-1]:
        shutil.rmtree(old)
    return final


def newest_in(checkpoints: Path) -> str | None:
    """The name of the newest one; None where there is none."""
    return max((path.name for path in checkpoints.glob("step-*")), default=None)
