"""The arithmetic of a shard: which patches, what a tar's bytes are, what its index says.

A sample in a tar is the image's member and, where labelled, a `.cls` member with the class index as text. A member is a
512-byte USTAR header and the data, padded to 512 bytes.
"""

import re
import tarfile
from collections.abc import Sequence

import numpy as np

BLOCK = 512  # bytes: the unit of a tar
RECORD = 10_240  # bytes: a tar's length is a multiple of this
LEAST_PATCHES = 256  # in a shard, so that tiny patches do not make thousands of files
MOST_PATCHES = 16_384  # in a shard, because a shard's list is held in memory as Python objects
MANY_SHARDS = 16  # where there are patches enough: shards are what packers, readers and ranks share among themselves
EXTENSIONS = {"jpeg": "jpg", "png": "png", "jpeg2000": "jp2"}

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


def sample_key(shard: int, place: int, file_name: str) -> str:
    """`<shard as 6 digits>_<place in it as 6 digits>_<file name's stem>`; the stem is cut at 48, all but A-Z a-z 0-9 - made _.

    No dots: WebDataset takes what follows the first one for the extension. No blanks: DALI's index is split at them.
    """
    stem = file_name.rpartition(".")[0] or file_name
    return f"{shard:06d}_{place:06d}_{_NOT_PLAIN.sub('_', stem)[:48]}"


def shard_bounds(sizes: np.ndarray, labelled: bool, *, shard_bytes: int, shard_patches: int | None) -> np.ndarray:
    """(S + 1,) int64: shard s holds the files from bounds[s] to bounds[s + 1]; equal numbers, so that no shard is a small rest.

    sizes: (n,) of the files, bytes. shard_bytes: about how large a shard shall be; shard_patches: at most how many patches, and
    never more than MOST_PATCHES. Small sets are cut into MANY_SHARDS, if each has LEAST_PATCHES.
    """
    count = len(sizes)
    shards = max(-(-int(tar_sizes(sizes, labelled).sum()) // shard_bytes), MANY_SHARDS)
    shards = max(1, min(shards, count // LEAST_PATCHES))
    shards = max(shards, -(-count // min(shard_patches or MOST_PATCHES, MOST_PATCHES)))
    # The first file i with i * shards // count == s, so that the numbers differ by one at most.
    return -(-np.arange(shards + 1, dtype=np.int64) * count // shards)


def tar_sizes(sizes: np.ndarray, labelled: bool) -> np.ndarray:
    """(n,) bytes that each sample takes in its tar, headers and padding included."""
    return BLOCK + -(-sizes // BLOCK) * BLOCK + (2 * BLOCK if labelled else 0)


# Python's own header of an empty file without a name. Filling in name, size and sum is 10 times faster than making each anew.
_PATTERN = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_UP_TO_SIZE, _UP_TO_SUM, _AFTER_SUM = _PATTERN[100:124], _PATTERN[136:148], _PATTERN[156:]
_SUM = sum(_UP_TO_SIZE) + sum(_UP_TO_SUM) + sum(_AFTER_SUM) + 8 * ord(" ")  # the sum counts its own field as blanks


def member(name: str, data: bytes) -> tuple[bytes, ...]:
    """One tar member in pieces: header, data, padding. Nothing in it depends on the clock or on who writes it."""
    named, size = name.encode("ascii"), b"%011o\0" % len(data)
    assert len(named) < 100 and len(size) == 12
    total = _SUM + sum(named) + sum(size)
    header = (named.ljust(100, b"\0"), _UP_TO_SIZE, size, _UP_TO_SUM, b"%06o\0 " % total, _AFTER_SUM)
    return *header, data, bytes(-len(data) % BLOCK)


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
