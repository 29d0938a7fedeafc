"""A pool of buffers for batches on the CPU. A buffer returns to the pool when its batch is garbage-collected."""

import math
import weakref
from collections import deque

import numpy as np
import torch


class BatchMemory:
    """Tensors over reused buffers.

    The kernel allocates large buffers page by page at first use, which for a batch of views takes longer than computing it.

    numbers: float32 elements of the largest batch; keep: most buffers that wait for reuse.
    """

    def __init__(self, numbers: int, *, keep: int):
        self._numbers = numbers
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor. Its buffer is reused once it and all tensors that share its memory are released."""
        size = math.prod(shape)
        assert size <= self._numbers, (shape, self._numbers)
        try:
            piece = self._free.pop()
        except IndexError:
            piece = np.empty(self._numbers, np.float32)
        part = piece[:size].reshape(shape)
        weakref.finalize(part, self._free.append, piece).atexit = False
        return torch.from_numpy(part)
