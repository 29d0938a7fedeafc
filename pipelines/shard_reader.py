"""Patch id -> encoded bytes: the tars of a shard set, mapped into memory once and never copied."""

import functools
import hashlib
import mmap
import os
import resource
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.shard_cache import RemoteSet, is_remote
from sharding.decoders import decoder_path
from sharding.manifest import read_manifest, shard_file

_OTHER_FILES = 256  # that a process may have open beside its shards


class _Mapped(NamedTuple):
    """A shard in memory, and its file as it was then. data: (bytes,) uint8."""

    data: np.ndarray
    path: Path
    stat: os.stat_result


class ShardReader:
    """Random access to the patches of a shard set.

    shards: its folder, its URL, or a RemoteSet, which stays its owner's to close. folder: where the set lies, or is cached.
    labels: (n,) int64, -1 where unlabelled; sizes: (n, 2) int32 height and width in pixels; shards: (n,) int32; all by patch
    id. manifest: all that is known of the patches, which takes some 300 bytes for each and is read when it is first asked for.
    Saves nothing and holds no position: `read` is a pure function of the ids.
    """

    def __init__(self, shards: str | Path | RemoteSet):
        self._owns_remote = is_remote(shards)
        self.remote = RemoteSet(str(shards)) if self._owns_remote else shards if isinstance(shards, RemoteSet) else None
        self.folder = self.remote.folder if self.remote else Path(shards)  # type: ignore[arg-type]
        # What every batch needs, and no more: a set may have ten million patches.
        table = read_manifest(self.folder, columns=["shard", "offset", "size", "label", "height", "width"])
        self.shards, self._offset, self._size = (table[name].to_numpy() for name in ("shard", "offset", "size"))
        self.labels = table["label"].to_numpy().astype(np.int64)
        self.sizes = np.stack([table[name].to_numpy() for name in ("height", "width")], axis=1)
        self._mapped: dict[int, _Mapped] = {}
        _allow_open_files(int(self.shards.max(initial=-1)) + 1)

    @functools.cached_property
    def manifest(self) -> pa.Table:
        return read_manifest(self.folder)

    def __len__(self):
        return len(self.shards)

    def draw_keys(self, ids: np.ndarray) -> np.ndarray:
        """What a patch's random numbers are keyed by: its id."""
        return ids

    def expect(self, shards: np.ndarray) -> None:
        """These shards are read next, in this order; the others that are mapped are given up.

        Of a remote set they are fetched in the background, and those given up may make room for them.
        """
        for shard in self._mapped.keys() - set(shards.tolist()):
            del self._mapped[shard]
            if self.remote:
                self.remote.release(shard_file(shard))
        if self.remote:
            self.remote.prefetch([shard_file(shard) for shard in shards.tolist()])

    def decoders(self, ids: np.ndarray) -> Counter[str]:
        """How many of these patches each decoder takes where there is a GPU (see sharding.decoders)."""
        kinds = read_manifest(self.folder, columns=["format", "coding"]).take(pa.array(ids))
        counted = kinds.group_by(["format", "coding"]).aggregate([([], "count_all")]).to_pylist()
        found: Counter[str] = Counter()
        for row in counted:
            found[decoder_path(row["format"], row["coding"])] += row["count_all"]
        return found

    def close(self) -> None:
        """Unmap the shards, which are mapped anew when they are read again, and end a remote set that was opened by its URL."""
        self._mapped.clear()
        if self.remote and self._owns_remote:
            self.remote.close()

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """The encoded images of these ids, as uint8 slices of the mapped tars.

        Raises ValueError when a shard is missing, too short, or was changed since it was first read, naming it and a patch.
        """
        ids = np.asarray(ids, np.int64)
        shards, first = np.unique(self.shards[ids], return_index=True)
        for shard, i in zip(shards.tolist(), ids[first].tolist(), strict=True):
            self._look(shard, i)
        return [self._slice(i) for i in ids.tolist()]

    def check(self, ids: np.ndarray) -> None:
        """Hold the bytes of these ids against the manifest. Raises ValueError at the first difference, naming the patch."""
        for i in map(int, ids):
            self._look(int(self.shards[i]), i)
            if hashlib.sha256(self._slice(i).data).hexdigest() != self._sha256[i].as_py():
                raise ValueError(
                    f"{self._path(int(self.shards[i]))}: the bytes of patch {self._key(i)} are not the"
                    " ones that the manifest describes; the shard was changed or damaged since: copy or build it again"
                )

    @functools.cached_property
    def _sha256(self) -> pa.ChunkedArray:
        return read_manifest(self.folder, columns=["sha256"])["sha256"]

    def _key(self, i: int) -> str:
        """The patch's name, read for an error's message."""
        return read_manifest(self.folder, columns=["key"])["key"][i].as_py()

    def _path(self, shard: int) -> Path:
        return self.folder / shard_file(shard)

    def _look(self, shard: int, i: int) -> None:
        """Hold a mapped shard's file against what it was, before patch i of it is read.

        To read from a mapping whose file was cut short ends the process (SIGBUS). A file that was put in the shard's place
        is another one, and the mapped one stays as it is.
        """
        if shard not in self._mapped:
            return
        _, path, then = self._mapped[shard]
        try:
            now = os.stat(path)
        except OSError as error:
            raise ValueError(
                f"{path}: the shard is gone ({error.strerror}), and patch {self._key(i)} was to be read from it; put it back"
            ) from error
        if now.st_ino == then.st_ino and (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise ValueError(
                f"{path}: the shard was changed while it was in use, before patch {self._key(i)} was read from it;"
                " copy or build it again, and start again"
            )

    def _slice(self, i: int) -> np.ndarray:
        shard, start = int(self.shards[i]), int(self._offset[i])
        data = self._mapped[shard].data if shard in self._mapped else self._map(shard, i)
        stop = start + int(self._size[i])
        if stop > len(data):
            raise ValueError(
                f"{self._path(shard)}: {len(data)} bytes long, but patch {self._key(i)} ends at byte {stop};"
                " the shard was cut short: copy or build it again"
            )
        return data[start:stop]

    def _map(self, shard: int, i: int) -> np.ndarray:
        path = self.remote.local(shard_file(shard)) if self.remote else self._path(shard)
        try:
            with open(path, "rb") as file:
                mapped, stat = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno())
        except FileNotFoundError:
            raise ValueError(
                f"{path}: this shard is in the manifest but not in the folder, and patch {self._key(i)} is in it;"
                " copy or build the set again"
            ) from None
        except ValueError:  # what mmap says of an empty file
            raise ValueError(f"{path}: this shard is empty; copy or build the set again") from None
        self._mapped[shard] = _Mapped(np.frombuffer(mapped, np.uint8), path, stat)
        return self._mapped[shard].data


def _allow_open_files(shards: int) -> None:
    """Every mapped shard has a file open, and a remote one has two; a process may have 1,024 where nobody says otherwise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * shards + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
