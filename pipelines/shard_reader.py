"""Patch id -> encoded bytes, from the memory-mapped tars of a shard set, without copies.

Each patch is checked when it is first read: its sha256 (10 us for 15 KB), because a decoder takes many flipped bits for another
image; and its header (6 us). When DALI 2.4 meets a header that it cannot parse in a batch of 32 images or more, it raises while
its other threads still work on that batch, in memory that it has given back: a crash, or damage that shows later. And views are
drawn for the manifest's height and width, which the image must have.
"""

import functools
import hashlib
import mmap
import os
import resource
from collections import Counter
from collections.abc import Sized
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from pipelines.remote_folder import is_url
from pipelines.shard_cache import RemoteSet
from sharding.decoders import decoder_path
from sharding.images.image_checks import parsed_size
from sharding.manifest import damaged_column, read_manifest, shard_file
from sharding.splits.assign import content_keys

_OTHER_FILES = 256  # file descriptors that a process needs beside its shards


class _Mapped(NamedTuple):
    """A mapped shard, (bytes,) uint8, and the state of its file at that time."""

    data: np.ndarray
    path: Path
    stat: os.stat_result


class DamagedPatch(ValueError):
    """One patch's bytes, or its header, are not those that were packed."""


class ShardReader:
    """Random access to the patches of a shard set.

    shards: its folder, its URL, or a RemoteSet, which the caller closes. folder: where the set is stored or cached.
    By patch id: labels (n,) int64, -1 for unlabelled; sizes (n, 2) int32, height and width in pixels; shards (n,) int32.
    manifest: all columns, about 300 bytes per patch, read at first use.
    Stateless: `read` is a pure function of the ids.
    """

    def __init__(self, shards: str | Path | RemoteSet):
        self._owns_remote = is_url(shards)
        self.remote = RemoteSet(str(shards)) if self._owns_remote else shards if isinstance(shards, RemoteSet) else None
        self.folder = self.remote.folder if self.remote else Path(shards)  # type: ignore[arg-type]
        # Only the columns that every batch needs: a set may have ten million patches.
        table = read_manifest(self.folder, columns=["shard", "offset", "size", "label", "height", "width"])
        self.shards, self._offset, self._size = (table[name].to_numpy() for name in ("shard", "offset", "size"))
        self.labels = table["label"].to_numpy().astype(np.int64)
        if table["height"].null_count or table["width"].null_count:
            raise ValueError(
                f"{self.folder}: its manifest lacks the images' width and height: pack the set with sharding/build.py"
            )
        self.sizes = np.stack([table[name].to_numpy() for name in ("height", "width")], axis=1)
        self._checked = np.zeros(len(table), bool)
        self._file_states: dict[int, tuple[int, int, int]] = {}  # of each shard that was mapped, when it was last
        self._mapped: dict[int, _Mapped] = {}
        _allow_open_files(int(self.shards.max(initial=-1)) + 1)

    @functools.cached_property
    def manifest(self) -> pa.Table:
        return read_manifest(self.folder)

    def __len__(self):
        return len(self.shards)

    def draw_keys(self, ids: np.ndarray) -> np.ndarray:
        """The keys of the patches' random numbers: their ids."""
        return ids

    def set_numbers(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64: which set of a mixture each patch is of. Here, all are of set 0."""
        return np.zeros(len(ids), np.int64)

    def expect(self, shards: np.ndarray) -> None:
        """Announce the shards that are read next, in this order, and unmap all others.

        Of a remote set, they are downloaded in the background, and unmapped ones may be evicted.
        """
        for shard in self._mapped.keys() - set(shards.tolist()):
            del self._mapped[shard]
            if self.remote:
                self.remote.release(shard_file(shard))
        if self.remote:
            self.remote.prefetch([shard_file(shard) for shard in shards.tolist()])

    def decoders(self, ids: np.ndarray) -> Counter[str]:
        """How many of these patches each decoder handles on a machine with a GPU (see sharding.decoders)."""
        kinds = read_manifest(self.folder, columns=["format", "coding"]).take(pa.array(ids))
        counted = kinds.group_by(["format", "coding"]).aggregate([([], "count_all")]).to_pylist()
        found: Counter[str] = Counter()
        for row in counted:
            found[decoder_path(row["format"], row["coding"])] += row["count_all"]
        return found

    def close(self) -> None:
        """Unmap the shards and close a remote set that was opened by its URL. Reading again maps them again."""
        self._mapped.clear()
        if self.remote and self._owns_remote:
            self.remote.close()

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """The encoded images of these ids, as uint8 slices of the mapped tars. Their bytes have the manifest's checksum, their
        headers its height and width.

        Raises ValueError, naming the shard and a patch, if a shard is missing, too short, or changed since it was packed or since
        it was first read, and for a header that cannot be parsed or gives another size.
        """
        ids = np.asarray(ids, np.int64)
        shards, first = np.unique(self.shards[ids], return_index=True)
        for shard, i in zip(shards.tolist(), ids[first].tolist(), strict=True):
            self._check_unchanged(shard, i)
        encoded = [self._patch_bytes(i) for i in ids.tolist()]
        for row in np.flatnonzero(~self._checked[ids]).tolist():
            self._check_patch(int(ids[row]), encoded[row])
        return encoded

    def damaged(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool: which of these patches `read` refuses because of their own bytes. Checks those that were not read before.

        Raises ValueError as `read` does if a shard is missing, or changed since it was first read.
        """
        found = np.zeros(len(ids), bool)
        for row in np.flatnonzero(~self._checked[ids]).tolist():
            i = int(ids[row])
            self._check_unchanged(int(self.shards[i]), i)
            try:
                self._check_patch(i, self._patch_bytes(i))
            except DamagedPatch:
                found[row] = True
        return found

    def name_patches(self, ids: np.ndarray) -> list[str]:
        """For messages: each patch's shard and key, such as "shard-000003.tar: 000003_000012_tile"."""
        keys = read_manifest(self.folder, columns=["key"])["key"]
        return [f"{shard_file(int(self.shards[i]))}: {keys[i].as_py()}" for i in ids.tolist()]

    def _check_patch(self, i: int, data: np.ndarray) -> None:
        """Check the bytes and the header. Raises DamagedPatch."""
        self._check_bytes(i, data)
        if (found := parsed_size(data)) != tuple(self.sizes[i].tolist()):
            self._raise_wrong_header(i, found)
        self._checked[i] = True  # the bytes of a mapped file change only with its time (see _check_unchanged)

    def _raise_wrong_header(self, i: int, found: tuple[int, int] | None) -> NoReturn:
        path, key = self._path(int(self.shards[i])), self._key(i)
        if found is None:
            raise DamagedPatch(f"{path}: patch {key} cannot be decoded, although its bytes match the manifest")
        raise DamagedPatch(
            f"{path}: patch {key} has {found[1]} x {found[0]} pixels, but {self.sizes[i, 1]} x {self.sizes[i, 0]} in the"
            " manifest, which was changed or damaged: copy or build the set again"
        )

    def check(self, ids: np.ndarray) -> None:
        """Verify the bytes of these ids by the manifest's checksums. Raises ValueError naming the first patch that differs."""
        for i in map(int, ids):
            self._check_unchanged(int(self.shards[i]), i)
            self._check_bytes(i, self._patch_bytes(i))

    def _check_bytes(self, i: int, data: np.ndarray) -> None:
        if int.from_bytes(hashlib.sha256(data.data).digest()[:8]) != self._digests[i]:
            path = self._path(int(self.shards[i]))
            differs = f"{path}: the bytes of patch {self._key(i)} do not match the manifest; "
            if self.remote:  # the original is whole, since it was checked when it was downloaded
                raise ValueError(f"{differs}this copy was changed or damaged: remove the file, and it is downloaded again")
            raise DamagedPatch(f"{differs}the shard was changed or damaged: copy or build it again")

    @functools.cached_property
    def _digests(self) -> np.ndarray:
        """(n,) uint64: the first 8 bytes of each patch's sha256. They identify damage as well as all 32, in less memory."""
        try:
            return content_keys(read_manifest(self.folder, columns=["sha256"])["sha256"])
        except (ValueError, TypeError) as error:  # no 64 hex digits, or null
            raise damaged_column(self.folder / "manifest.parquet", "sha256") from error

    def _key(self, i: int) -> str:
        """The patch's key, for error messages."""
        return read_manifest(self.folder, columns=["key"])["key"][i].as_py()

    def _path(self, shard: int) -> Path:
        return self.folder / shard_file(shard)

    def _check_unchanged(self, shard: int, i: int) -> None:
        """Raise ValueError if a mapped shard's file was changed or removed, before patch i is read from it.

        Reading from the map of a truncated file would kill the process (SIGBUS). A file that replaced the shard's has another
        inode, and the map is unaffected.
        """
        if shard not in self._mapped:
            return
        _, path, then = self._mapped[shard]
        try:
            now = os.stat(path)
        except OSError as error:
            raise ValueError(
                f"{path}: the shard is missing ({error.strerror}), and patch {self._key(i)} is in it; restore it"
            ) from error
        if now.st_ino == then.st_ino and (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise ValueError(
                f"{path}: the shard was changed while it was in use, before patch {self._key(i)} was read from it;"
                " copy or build it again, and start again"
            )

    def _patch_bytes(self, i: int) -> np.ndarray:
        shard, start = int(self.shards[i]), int(self._offset[i])
        data = self._mapped[shard].data if shard in self._mapped else self._map_shard(shard, i)
        stop = start + int(self._size[i])
        if stop > len(data):
            raise DamagedPatch(
                f"{self._path(shard)}: {len(data)} bytes long, but patch {self._key(i)} ends at byte {stop};"
                " the shard was cut short: copy or build it again"
            )
        return data[start:stop]

    def _map_shard(self, shard: int, i: int) -> np.ndarray:
        path = self.remote.local(shard_file(shard)) if self.remote else self._path(shard)
        try:
            with open(path, "rb") as file:
                mapped, stat = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno())
        except FileNotFoundError:
            raise ValueError(
                f"{path}: this shard is in the manifest but not in the folder, and patch {self._key(i)} is in it;"
                " copy or build the set again"
            ) from None
        except ValueError:  # mmap's error for an empty file
            raise ValueError(f"{path}: this shard is empty; copy or build the set again") from None
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._file_states.setdefault(shard, state) != state:  # another file than was mapped before
            self._file_states[shard] = state
            self._checked[self.shards == shard] = False
        self._mapped[shard] = _Mapped(np.frombuffer(mapped, np.uint8), path, stat)
        return self._mapped[shard].data


def check_ids(ids: np.ndarray, reader: Sized, folder: Path | str) -> None:
    """Raise ValueError if there are no ids, or for one that the reader of this folder does not have."""
    if not len(ids):
        raise ValueError(f"{folder}: no patch is selected")
    if ids.min() < 0 or ids.max() >= len(reader):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{folder}: has patches 0 to {len(reader) - 1}, not {wrong}")


def _allow_open_files(shards: int) -> None:
    """Raise the limit of open files, by default 1,024: each mapped shard has one open file, a remote one two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * shards + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
