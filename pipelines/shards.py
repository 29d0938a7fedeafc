"""Patch id -> encoded bytes: the tars of a shard set, mapped into memory once and never copied."""

import hashlib
import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa

from sharding.manifest import read_manifest


class ShardReader:
    """Random access to the patches of a shard set.

    labels: (n,) int64, -1 where unlabelled; sizes: (n, 2) int32 height and width in pixels; both by patch id.
    Saves nothing and holds no position: `read` is a pure function of the ids.
    """

    def __init__(self, shards: str | Path, manifest: pa.Table | None = None):
        self.folder = Path(shards)
        self.manifest = read_manifest(shards) if manifest is None else manifest
        column = {name: self.manifest[name].to_numpy() for name in ("shard", "offset", "size", "label", "height", "width")}
        self._shard, self._offset, self._size = column["shard"], column["offset"], column["size"]
        self.labels = column["label"].astype(np.int64)
        self.sizes = np.stack([column["height"], column["width"]], axis=1).astype(np.int32)
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self):
        return len(self._shard)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """The encoded images of these ids, as uint8 slices of the mapped tars.

        Raises ValueError when a shard is missing or too short, naming it.
        """
        return [self._slice(int(i)) for i in ids]

    def check(self, ids: np.ndarray) -> None:
        """Hold the bytes of these ids against the manifest. Raises ValueError at the first difference, naming the patch."""
        for i in ids:
            expected = self.manifest["sha256"][int(i)].as_py()
            if hashlib.sha256(self._slice(int(i)).tobytes()).hexdigest() != expected:
                raise ValueError(
                    f"{self._path(int(self._shard[i]))}: the bytes of patch {self.manifest['key'][int(i)].as_py()} are not the"
                    " ones that the manifest describes; the shard was changed or damaged since: copy or build it again"
                )

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.tar"

    def _slice(self, i: int) -> np.ndarray:
        shard, start = int(self._shard[i]), int(self._offset[i])
        data = self._mapped[shard] if shard in self._mapped else self._map(shard)
        stop = start + int(self._size[i])
        if stop > len(data):
            raise ValueError(
                f"{self._path(shard)}: {len(data)} bytes long, but patch {self.manifest['key'][i].as_py()} ends at byte {stop};"
                " the shard was cut short: copy or build it again"
            )
        return data[start:stop]

    def _map(self, shard: int) -> np.ndarray:
        path = self._path(shard)
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ValueError(
                f"{path}: this shard is in the manifest but not in the folder; copy or build the set again"
            ) from None
        except ValueError:  # what mmap says of an empty file
            raise ValueError(f"{path}: this shard is empty; copy or build the set again") from None
        self._mapped[shard] = np.frombuffer(mapped, np.uint8)
        return self._mapped[shard]
