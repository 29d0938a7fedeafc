"""Damaged patches, and the patches that training reads in their place."""

import numpy as np

from pipelines.mixture import Mixture
from pipelines.shard_reader import ShardReader
from sharding.philox import uniforms

_DRAWS = 32  # per damaged patch: with half of all patches damaged, one in four billion finds none


class Replacements:
    """What is read for each patch: the patch, or another one if it is damaged.

    The replacement is drawn from those `ids` that are of the same set, as a function of (seed, epoch, patch). So it is the same
    for every batch size, world size and restart. damaged: the ids found damaged so far, including drawn ones.

    ids: (n,) the selected patches, in any order.
    """

    def __init__(self, reader: ShardReader | Mixture, ids: np.ndarray, seed: int):
        self._reader, self._seed = reader, seed
        numbers = reader.set_numbers(ids)
        self._pools = {int(number): np.sort(ids[numbers == number]) for number in np.unique(numbers)}
        self.damaged: set[int] = set()

    def read_for(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """(B,) int64: the patches to read for these patches in these epochs.

        Raises ValueError, as ShardReader.read does, for a shard that cannot be read, and if no draw finds a whole patch.
        """
        chosen = np.array(ids, np.int64)
        rows = np.arange(len(chosen))
        for draw in range(_DRAWS):
            rows = rows[self._reader.damaged(chosen[rows])]
            if not len(rows):
                return chosen
            self.damaged.update(chosen[rows].tolist())
            chosen[rows] = [self._draw(int(ids[row]), int(epochs[row]), draw) for row in rows]
        raise ValueError(
            f"{self._reader.folder}: most of its patches are damaged, among them {sorted(self.damaged)[:4]}:"
            " copy or build the set again"
        )

    def _draw(self, patch: int, epoch: int, draw: int) -> int:
        only = np.array([patch])
        pool = self._pools[int(self._reader.set_numbers(only)[0])]
        (place,) = uniforms(self._reader.draw_keys(only), 1, seed=self._seed, stream="replacement", epoch=epoch, view=draw)[0]
        return int(pool[int(place * len(pool))])
