"""The order of an epoch, and each rank's part of it: pure functions of (seed, epoch, selection)."""

from typing import NamedTuple

import numpy as np

from sharding.philox import shuffle_keys, uniforms


class Order(NamedTuple):
    """Patches in reading order. ids: (n,) int64; epochs: (n,) int64, the epoch that each patch's views are drawn for.

    Within a single set all epochs are equal. In a mixture, each set counts its own passes.
    """

    ids: np.ndarray
    epochs: np.ndarray

    def part(self, step: int, batch_size: int, *, rank: int, world_size: int) -> "Order":
        """Rank r's part of global batch `step`, by rank_slice.

        A copy, so that a batch does not keep the whole epoch in memory.
        """
        return Order(*(rank_slice(column, step, batch_size, rank=rank, world_size=world_size).copy() for column in self))


def epoch_order(
    ids: np.ndarray, *, seed: int, epoch: int, shards: np.ndarray | None = None, window: int | None = None
) -> np.ndarray:
    """The ids in the order of that epoch: (n,) int64. Does not depend on the order in which the ids are given.

    window: None shuffles all ids together. W, for sets larger than the page cache, shuffles the shards, cuts them into runs of W
    (the last may be shorter) and shuffles the patches within each run, so that W shards are read from at a time. A window of all
    shards gives the same order as None. shards: (n,) the shard of each id, needed with a window.
    """
    ids = np.asarray(ids, np.int64)
    if window is None:
        ids = np.sort(ids)
        return ids[np.argsort(shuffle_keys(ids, seed=seed, stream="order", epoch=epoch), kind="stable")]
    assert shards is not None and len(shards) == len(ids) and window >= 1, window
    by_id = np.argsort(ids, kind="stable")
    ids, runs = ids[by_id], _shard_places(np.asarray(shards)[by_id], seed=seed, epoch=epoch) // window
    runs = runs.astype(np.min_scalar_type(runs.max(initial=0)))  # sorting one byte takes half the time of eight
    return ids[np.lexsort((shuffle_keys(ids, seed=seed, stream="order", epoch=epoch), runs))]


def _shard_places(shards: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: position of each patch's shard among the shuffled shards."""
    present, index = np.unique(shards, return_inverse=True)
    # View 1 of the stream, since patches draw from view 0: patch 3 and shard 3 must not share draws.
    draws = uniforms(present, 2, seed=seed, stream="order", epoch=epoch, view=1)
    places = np.empty(len(present), np.int64)
    places[np.lexsort((draws[:, 1], draws[:, 0]))] = np.arange(len(present))
    return places[index]


def by_first_use(shards: np.ndarray) -> np.ndarray:
    """The distinct shard numbers in order of first occurrence."""
    first = np.full(int(shards.max(initial=-1)) + 1, -1, np.int64)
    first[shards[::-1]] = np.arange(len(shards))[::-1]  # the last write, of the first occurrence, stays
    present = np.flatnonzero(first >= 0)
    return present[np.argsort(first[present])]


def steps_per_epoch(patches: int, batch_size: int, *, drop_last: bool) -> int:
    """Global batches in an epoch."""
    return patches // batch_size if drop_last else -(-patches // batch_size)


def rank_slice(order: np.ndarray, step: int, batch_size: int, *, rank: int, world_size: int) -> np.ndarray:
    """Rank r's part of global batch `step`: contiguous parts in rank order, whose sizes differ by at most one patch.

    The ranks' parts together are the same global batch for every world size. Of an incomplete last batch, some ranks may get
    nothing.
    """
    batch = order[step * batch_size : (step + 1) * batch_size]
    start, stop = len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size
    return batch[start:stop]
