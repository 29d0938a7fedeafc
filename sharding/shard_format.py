"""The format of a shard: its number of patches, the bytes of its tar, and its index.

A sample in a tar is the image's member and, where labelled, a `.cls` member with the class index as text. A member is a
512-byte USTAR header and the data, padded to 512 bytes.
"""

import re
import tarfile
from collections.abc import Sequence

import numpy as np

BLOCK = 512  # bytes: the unit of a tar
RECORD = 10_240  # bytes: a tar's length is a multiple of this
MIN_PATCHES = 256  # per shard, so that tiny patches do not make thousands of files
MAX_PATCHES = 16_384  # per shard, because a shard's list is in memory as Python objects
MIN_SHARDS = 16  # if there are enough patches: packers, readers and ranks share the work by shards
# The formats that a set may contain: their names in the manifest by the names that nvImageCodec gives, and the files' extensions.
STORABLE = {"JPEG": "jpeg", "PNG": "png", "JPEG 2000": "jpeg2000"}
EXTENSIONS = {"jpeg": "jpg", "png": "png", "jpeg2000": "jp2"}

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


def sample_key(shard: int, place: int, file_name: str) -> str:
    """`<shard, 6 digits>_<place in it, 6 digits>_<stem of the file name>`; the stem is cut to 48 of A-Z a-z 0-9 - and _.

    No dots: WebDataset takes the text after the first one as the extension. No spaces: they separate the fields of DALI's index.
    """
    stem = file_name.rpartition(".")[0] or file_name
    return f"{shard:06d}_{place:06d}_{_NOT_PLAIN.sub('_', stem)[:48]}"


def shard_bounds(sizes: np.ndarray, labelled: bool, *, shard_bytes: int, shard_patches: int | None) -> np.ndarray:
    """(S + 1,) int64: shard s has the files from bounds[s] to bounds[s + 1]. All shards have equally many, give or take one.

    sizes: (n,) of the files, bytes. shard_bytes: approximate size of a shard. shard_patches: at most this many per shard, and
    never more than MAX_PATCHES. Small sets get MIN_SHARDS shards, if each has MIN_PATCHES.
    """
    count = len(sizes)
    shards = max(-(-int(tar_sizes(sizes, labelled).sum()) // shard_bytes), MIN_SHARDS)
    shards = max(1, min(shards, count // MIN_PATCHES))
    shards = max(shards, -(-count // min(shard_patches or MAX_PATCHES, MAX_PATCHES)))
    # The first file i with i * shards // count == s, so that the numbers differ by one at most.
    return -(-np.arange(shards + 1, dtype=np.int64) * count // shards)


def tar_sizes(sizes: np.ndarray, labelled: bool) -> np.ndarray:
    """(n,) bytes that each sample takes in its tar, including headers and padding."""
    return BLOCK + -(-sizes // BLOCK) * BLOCK + (2 * BLOCK if labelled else 0)


# Python's header of an empty file without a name. Filling in name, size and checksum is 10 times faster than tarfile.
_PATTERN = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_UP_TO_SIZE, _UP_TO_SUM, _AFTER_SUM = _PATTERN[100:124], _PATTERN[136:148], _PATTERN[156:]
_SUM = sum(_UP_TO_SIZE) + sum(_UP_TO_SUM) + sum(_AFTER_SUM) + 8 * ord(" ")  # the checksum counts its own field as spaces


def tar_member(name: str, data: bytes) -> tuple[bytes, ...]:
    """One tar member in chunks: header, data, padding. It does not depend on the time or the user."""
    path, size = name.encode("ascii"), b"%011o\0" % len(data)
    assert len(path) < 100 and len(size) == 12
    total = _SUM + sum(path) + sum(size)
    header = (path.ljust(100, b"\0"), _UP_TO_SIZE, size, _UP_TO_SUM, b"%06o\0 " % total, _AFTER_SUM)
    return *header, data, bytes(-len(data) % BLOCK)


def tar_end(length: int) -> bytes:
    """The end of a tar whose members take `length` bytes."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % RECORD)


def index_text(
    keys: Sequence[str], extensions: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]
) -> str:
    """DALI's index, version 1.2: a line per sample with extension, offset, size and name of each member.

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
