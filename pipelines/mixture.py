"""Several shard sets read as one; each epoch takes patches from every set in proportion to its weight."""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.sampler import Order, epoch_order
from pipelines.shard_reader import ShardReader, check_ids
from sharding.manifest import class_names

# Position of the set's number in a draw key. Set 0's keys are its ids, so its draws are those of the set alone.
_SET_BITS = 48


class Part(NamedTuple):
    """One set of a mixture: its folder or open reader, ids (n,) of the patches to read, and its relative weight."""

    shards: str | Path | ShardReader
    ids: np.ndarray
    weight: float = 1.0


class Mixture:
    """A drop-in for ShardReader in ViewLoader: patch i of set k has the id (patches of the sets before k) + i.

    ids: (n,) of all parts' patches, to give to the loader; an epoch has n patches.
    labels: (n,) int64 by id, all -1 if the sets' classes differ; sizes, shards: as ShardReader's, with the shards numbered
    consecutively.
    Raises ValueError without parts, for a weight that is not above 0, and for ids that a set does not have.
    """

    def __init__(self, parts: Sequence[Part]):
        if not parts:
            raise ValueError("a mixture needs at least one shard set")
        assert len(parts) < 2 ** (63 - _SET_BITS), len(parts)
        self.readers = [part.shards if isinstance(part.shards, ShardReader) else ShardReader(part.shards) for part in parts]
        self.weights = [part.weight for part in parts]
        self.folder = " + ".join(str(reader.folder) for reader in self.readers)
        self._starts = _starts([len(reader) for reader in self.readers])
        self._first_shards = _starts([int(reader.shards.max(initial=-1)) + 1 for reader in self.readers])
        chosen = [np.asarray(part.ids, np.int64) for part in parts]
        for reader, weight, ids in zip(self.readers, self.weights, chosen, strict=True):
            if not 0 < weight < float("inf"):
                raise ValueError(f"{reader.folder}: its weight is {weight:g}; give a number above 0, or leave the set out")
            check_ids(ids, reader, reader.folder)
        self.ids = np.concatenate([ids + start for ids, start in zip(chosen, self._starts, strict=False)])
        self.sizes = np.concatenate([reader.sizes for reader in self.readers])
        self.shards = np.concatenate(
            [reader.shards + first for reader, first in zip(self.readers, self._first_shards, strict=False)]
        )
        classes = [class_names(reader.folder) for reader in self.readers]
        if all(names == classes[0] for names in classes):
            self.labels = np.concatenate([reader.labels for reader in self.readers])
        else:  # class numbers have different meanings
            self.labels = np.full(len(self), -1, np.int64)

    def __len__(self):
        return int(self._starts[-1])

    def epoch_order(self, ids: np.ndarray, *, seed: int, epoch: int, window: int | None = None) -> Order:
        """An epoch of len(ids) patches, evenly mixed, with each set's share by weight.

        Each set makes passes over its ids, each pass in an order of its own (see sampler.epoch_order; the window applies to each
        set), and continues in the next epoch where it stopped. Views are drawn for the pass, so a small set that repeats within
        an epoch gets new views.
        Raises ValueError if a set's weight is too small for one patch, or none of its patches is among ids.
        """
        sets = self.set_numbers(ids)
        counts = apportion(len(ids), self.weights)
        drawn = []
        for number, (reader, count) in enumerate(zip(self.readers, counts, strict=True)):
            chosen = ids[sets == number]
            if not count or not len(chosen):
                why = "its weight is too small for an epoch" if len(chosen) else "none of its patches is selected for an epoch"
                raise ValueError(f"{reader.folder}: {why} of {len(ids):,} patches; raise it, or leave the set out")
            keys, shards = self.draw_keys(chosen), None
            if window is not None:
                shards = reader.shards[chosen - self._starts[number]] + np.int64(number << _SET_BITS)
            start = epoch * count
            passes = np.arange(start // len(keys), -(-(start + count) // len(keys)))
            orders = [epoch_order(keys, seed=seed, epoch=int(each), shards=shards, window=window) for each in passes]
            here = slice(start - int(passes[0]) * len(keys), None)
            found = np.concatenate(orders)[here][:count] - (number << _SET_BITS) + self._starts[number]
            drawn.append(Order(found, np.repeat(passes, len(keys))[here][:count]))
        mixed = interleave(counts)
        return Order(*(np.concatenate(columns)[mixed] for columns in zip(*drawn, strict=True)))

    def draw_keys(self, ids: np.ndarray) -> np.ndarray:
        """The keys of the patches' random numbers: the id in its own set, with the set's number in the high bits."""
        sets = self.set_numbers(ids)
        return ids - self._starts[sets] + (sets << _SET_BITS)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """As ShardReader.read."""
        encoded: list[np.ndarray] = [np.empty(0, np.uint8)] * len(ids)
        for reader, rows, own in self._by_set(ids):
            for row, data in zip(rows, reader.read(own), strict=True):
                encoded[row] = data
        return encoded

    def damaged(self, ids: np.ndarray) -> np.ndarray:
        """As ShardReader.damaged."""
        found = np.zeros(len(ids), bool)
        for reader, rows, own in self._by_set(ids):
            found[rows] = reader.damaged(own)
        return found

    def name_patches(self, ids: np.ndarray) -> list[str]:
        """As ShardReader.name_patches, with the set's folder in front."""
        found = [""] * len(ids)
        for reader, rows, own in self._by_set(ids):
            for row, name in zip(rows, reader.name_patches(own), strict=True):
                found[row] = f"{reader.folder.name}/{name}"
        return found

    def check(self, ids: np.ndarray) -> None:
        """As ShardReader.check."""
        for reader, _, own in self._by_set(ids):
            reader.check(own)

    def expect(self, shards: np.ndarray) -> None:
        """As ShardReader.expect."""
        sets = np.searchsorted(self._first_shards, shards, side="right") - 1
        for number, reader in enumerate(self.readers):
            reader.expect(shards[sets == number] - self._first_shards[number])

    def decoders(self, ids: np.ndarray) -> Counter[str]:
        """As ShardReader.decoders."""
        return sum((reader.decoders(own) for reader, _, own in self._by_set(ids)), Counter())

    def close(self) -> None:
        """As ShardReader.close."""
        for reader in self.readers:
            reader.close()

    def set_numbers(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64: which of the mixture's sets each patch is of."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _by_set(self, ids: np.ndarray) -> Iterator[tuple[ShardReader, np.ndarray, np.ndarray]]:
        """For each set among these ids: its reader, the rows of its ids, and the ids within the set."""
        sets = self.set_numbers(ids)
        for number in np.unique(sets):
            rows = np.flatnonzero(sets == number)
            yield self.readers[number], rows, ids[rows] - self._starts[number]


def apportion(patches: int, weights: Sequence[float]) -> list[int]:
    """Each set's number of patches, by the largest-remainder method; ties go to the first."""
    exact = [Fraction(weight) for weight in weights]  # without rounding errors
    quotas = [patches * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda k: (counts[k] - quotas[k], k))
    for k in by_remainder[: patches - sum(counts)]:
        counts[k] += 1
    return counts


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Indices that mix concatenated sets evenly: (sum of counts,) int64.

    The i-th of n patches of a set goes to (i + 1/2) / n of the way, so each stretch has nearly each set's share.
    """
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return np.argsort(places, kind="stable")


def _starts(lengths: Sequence[int]) -> np.ndarray:
    """(sets + 1,) int64: start of each set in their concatenation, and its end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
