"""A call in a process of its own: a crash, a hang or other errors than the user's are outcomes that a test can see."""

import hashlib
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sharding.cli import describe

SECONDS = 10.0  # more is a hang


class Outcome(NamedTuple):
    """value: what was returned, if error is None. error: the ValueError's or OSError's message."""

    value: Any
    error: str | None


def told(call: Callable[[], Any]) -> Outcome:
    """Make the call. Raises what is not for the user."""
    try:
        return Outcome(call(), None)
    except (ValueError, OSError) as error:
        text = describe(error)
        assert text.strip() and "\n" not in text and "object at 0x" not in text, repr(text)
        return Outcome(None, text)


def outcome_of(call: Callable[[], Any]) -> Outcome:
    """Make the call in a fork of this process. Raises AssertionError for a signal, a hang, and any other error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            try:
                answer: tuple[str, Any] = ("told", told(call))
            except BaseException as error:  # the parent shows it
                answer = ("fault", f"{type(error).__name__}: {error}")
            with os.fdopen(writing, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writing)
    data, ends = b"", time.monotonic() + SECONDS
    with os.fdopen(reading, "rb") as file:
        while ready := select.select([file], [], [], max(0.0, ends - time.monotonic()))[0]:
            if not (part := os.read(file.fileno(), 2**20)):
                break
            data += part
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert ready, f"no end after {SECONDS:.0f} s"
    assert not os.WIFSIGNALED(status), f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    kind, value = pickle.loads(data)
    assert kind != "fault", value
    return value


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
