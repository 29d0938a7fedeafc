"""Time spent waiting for data: the host's, or on a GPU the device's."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitClock:
    """Sums the time of its `waiting` blocks.

    On a GPU the host runs ahead: it may wait while the device still computes the step before, or not wait while the device does.
    So there a block's time is the device's: from the end of the work queued before the block to the end of the work queued in it.
    """

    def __init__(self, device: str):
        self._on_device = device == "cuda"
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # perhaps not yet reached by the device

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the consumer waits."""
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
        """Seconds of all completed blocks. Does not synchronise."""
        self._collect()
        return self._seconds

    def _collect(self):
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
