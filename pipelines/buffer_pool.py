"""Memory for batches on the CPU, used anew once nobody holds a batch any more."""

import math
import weakref
from collections import deque

import numpy as np
import torch


class BatchMemory:
    """Hands out tensors over pieces of memory that it keeps.

    The system gives out large pieces page by page, each at its first use, and for a batch of views that takes longer than
    to make the pixels that go there.

    numbers: of the largest batch; keep: how many pieces wait for the next batches at most.
    """

    def __init__(self, numbers: int, *, keep: int):
        self._numbers = numbers
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor. Its memory comes back when it and all tensors that share it are gone."""
        size = math.prod(shape)
        assert size <= self._numbers, (shape, self._numbers)
        try:
            piece = self._free.pop()
        except IndexError:
            piece = np.empty(self._numbers, np.float32)
        part = piece[:size].reshape(shape)
        weakref.finalize(part, self._free.append, piece).atexit = False
        return torch.from_numpy(part)
