"""Every byte's place, worked out before the first one is written.

A sample in a tar is the image's member and, where labelled, a `.cls` member with the class index as text. A member is a
512-byte USTAR header and the data, padded to 512 bytes. So sizes alone fix all offsets.
"""

import re
import tarfile
from collections.abc import Sequence

import numpy as np

BLOCK = 512  # bytes: the unit of a tar
RECORD = 10_240  # bytes: a tar's length is a multiple of this
LEAST_PATCHES = 256  # in a shard, so that tiny patches do not make thousands of files
EXTENSIONS = {"jpeg": "jpg", "png": "png"}

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


def sample_key(patch_id: int, file_name: str) -> str:
    """`<id as 9 digits>_<file name's stem>`, the stem cut to 48 of A-Z a-z 0-9 _ - and everything else made `_`.

    No dots: WebDataset takes what follows the first one for the extension. No blanks: DALI's index is split at them.
    """
    stem = file_name.rpartition(".")[0] or file_name
    return f"{patch_id:09d}_{_NOT_PLAIN.sub('_', stem)[:48]}"


def shard_of_each(sizes: np.ndarray, labelled: bool, *, shard_bytes: int, shard_patches: int | None) -> np.ndarray:
    """(n,) int32: equal numbers of consecutive patches per shard, so that no shard is a small rest.

    sizes: (n,) of the images, bytes. shard_bytes: about how large a shard shall be; shard_patches: at most how many.
    """
    count = len(sizes)
    shards = -(-int(tar_sizes(sizes, labelled).sum()) // shard_bytes)
    shards = max(1, min(shards, count // LEAST_PATCHES))
    if shard_patches is not None:
        shards = max(shards, -(-count // shard_patches))
    return np.asarray(np.arange(count, dtype=np.int64) * shards // count, np.int32)


def tar_sizes(sizes: np.ndarray, labelled: bool) -> np.ndarray:
    """(n,) bytes that each sample takes in its tar, headers and padding included."""
    return BLOCK + -(-sizes // BLOCK) * BLOCK + (2 * BLOCK if labelled else 0)


def image_offsets(sizes: np.ndarray, shards: np.ndarray, labelled: bool) -> np.ndarray:
    """(n,) int64: where each image's bytes begin in its tar."""
    lengths = tar_sizes(sizes, labelled)
    starts = np.cumsum(lengths) - lengths
    first = np.searchsorted(shards, shards)  # the first patch of each patch's shard
    return starts - starts[first] + BLOCK


def member(name: str, data: bytes) -> bytes:
    """One tar member: header, data, padding. Nothing in it depends on the clock or on who writes it."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def tar_end(length: int) -> bytes:
    """What closes a tar whose members take `length` bytes."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % RECORD)


def index_text(
    keys: Sequence[str], extensions: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]
) -> str:
    """DALI's index, version 1.2: a line per sample, and in it extension, offset, size and name of each member.

    labels: -1 where the sample has no `.cls` member.
    """
    lines = [f"v1.2 {len(keys)}"]
    for key, extension, offset, size, label in zip(keys, extensions, offsets, sizes, labels, strict=True):
        line = f"{extension} {offset} {size} {key}.{extension}"
        if label >= 0:
            label_offset = offset + -(-size // BLOCK) * BLOCK + BLOCK
            line += f" cls {label_offset} {len(str(label))} {key}.cls"
        lines.append(line)
    return "\n".join(lines) + "\n"
