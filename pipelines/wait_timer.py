"""How long a consumer waited for data: on a GPU, how long the device did, which the host does not see."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitClock:
    """Adds up the time of its `waiting` blocks.

    On a GPU the host runs ahead: it may be held up while the device is still busy with the step before, and may itself be
    done while the device waits for the decoder. So there a block's time is from when the device had done all that was asked
    of it before, to when it has done what was asked of it in the block.
    """

    def __init__(self, device: str):
        self._on_device = device == "cuda"
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # that the device may not have come to yet

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which the consumer waits."""
        if self._on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            self._collect()
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Of all blocks that the device is done with. Waits for nothing."""
        self._collect()
        return self._seconds

    def _collect(self):
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
