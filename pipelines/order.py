"""The order of an epoch, and who reads what of it: pure functions of (seed, epoch, selection)."""

import numpy as np

from sharding.draws import priorities


def epoch_order(ids: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The ids in the order of that epoch: (n,) int64. Depends on the set of ids, not on how they were listed."""
    ids = np.sort(np.asarray(ids, np.int64))
    return ids[np.argsort(priorities(ids, seed=seed, stream="order", epoch=epoch), kind="stable")]


def steps_per_epoch(patches: int, batch_size: int, *, drop_last: bool) -> int:
    """Global batches in an epoch."""
    return patches // batch_size if drop_last else -(-patches // batch_size)


def rank_slice(order: np.ndarray, step: int, batch_size: int, *, rank: int, world_size: int) -> np.ndarray:
    """Rank r's part of global batch `step`: contiguous parts that differ by at most one patch, in rank order.

    So the ranks' parts joined are the same global batch whatever the world size, and no patch is read twice.
    """
    batch = order[step * batch_size : (step + 1) * batch_size]
    start, stop = len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size
    return batch[start:stop]
