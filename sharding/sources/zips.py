"""Read a zip's members in place, without Python's zipfile, which keeps about 700 bytes per member in every process.

Here the directory at the end of the zip is read once, in the scan. Each member is then read by its local header alone.

Source: PKWARE, APPNOTE.TXT 6.3.10, sections 4.3.7 (local header) to 4.3.16 (end record), 4.5.3 (zip64), appendix D (names).
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from errno import EIO
from typing import NamedTuple

from sharding.sources.file_listing import SkippedFiles, printable

_END = struct.Struct(
    "<4s4H2LH"
)  # signature, disks, number of entries here and in all, directory's size and offset, comment's length
_LOCATOR_SIZE = 20  # bytes of the zip64 locator, which follows the zip64 end record
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_END_SIGNATURE, _END64_SIGNATURE, _LOCATOR_SIGNATURE = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY_SIGNATURE, _LOCAL_SIGNATURE = b"PK\1\2", b"PK\3\4"
_DESCRIPTOR_SIGNATURE = b"PK\7\x08"
_MAX_COMMENT = 2**16

_ENCRYPTED, _HAS_DESCRIPTOR, _UTF8_NAME = 1 << 0, 1 << 3, 1 << 11  # flags of a member
_STORED, _DEFLATED = 0, 8  # methods of compression
_MAX_RATIO = 1032  # the largest compression ratio, by zlib's documentation
_UNIX = 3  # the system that a member comes from


class _Entry(NamedTuple):
    """A member by the directory. offset: of its local header. mode: the file's Unix mode, or 0."""

    name: bytes
    in_utf8: bool
    mode: int
    offset: int
    size: int


def is_zip(file: int) -> bool:
    """Whether an open file begins or ends like a zip."""
    return os.pread(file, 4, 0) == _LOCAL_SIGNATURE or _END_SIGNATURE in _tail(file)[1]


def zip_members(file: int, shown: str, skipped: SkippedFiles) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset of the local header and size in bytes of every file in a zip, in the order of its directory.

    Names are in UTF-8, or unchanged when their encoding is unknown. shown: the zip's path in messages.
    Raises ValueError when the directory is damaged.
    """
    try:
        length = os.fstat(file).st_size
        directory, count, shift = _directory(file)
        encoding = _encoding(directory, count, shown, skipped)
        for entry in _entries(directory, count):
            if entry.name.endswith(b"/"):
                continue
            if stat.S_IFMT(entry.mode) not in (0, stat.S_IFREG):
                skipped.special += 1
                continue
            name = entry.name
            if encoding and not entry.in_utf8:
                name = name.decode(encoding).encode()
            if entry.offset + shift >= length or entry.size > _MAX_RATIO * length:
                raise _Damaged
            yield name, entry.offset + shift, entry.size
    except (_Damaged, struct.error):
        raise ValueError(f"{shown} is a zip that is damaged or was cut short: copy or download it again") from None


class _Damaged(Exception):
    """A zip's directory is inconsistent."""


def _tail(file: int) -> tuple[int, bytes]:
    """The part of a file that contains a zip's end record, and the offset of that part."""
    start = max(0, os.fstat(file).st_size - _END.size - _MAX_COMMENT)
    return start, os.pread(file, _END.size + _MAX_COMMENT, start)


def _directory(file: int) -> tuple[bytes, int, int]:
    """The directory's bytes, its number of entries, and what to add to its offsets (the length of data before the zip)."""
    start, tail = _tail(file)
    end = tail.rfind(_END_SIGNATURE)
    if end < 0:
        raise _Damaged
    _, disk, _, _, count, size, offset, _ = _END.unpack_from(tail, end)
    length = 0  # of the zip64 records between the directory and the end record
    large = os.pread(file, _END64.size + _LOCATOR_SIZE, max(0, start + end - _END64.size - _LOCATOR_SIZE))
    if large.startswith(_END64_SIGNATURE) and large.startswith(_LOCATOR_SIGNATURE, _END64.size):
        length = len(large)
        _, _, _, _, disk, _, _, count, size, offset = _END64.unpack_from(large)
    place = start + end - length - size
    if disk or place < offset:
        raise _Damaged
    return os.pread(file, size, place), count, place - offset


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    place = 0
    for _ in range(count):
        (signature, made, _, flags, _, _, _, _, packed, size, *lengths, _, _, attributes, offset) = _ENTRY.unpack_from(
            directory, place
        )
        start = place + _ENTRY.size
        name_end = start + lengths[0]
        extra_end = name_end + lengths[1]
        place = extra_end + lengths[2]
        if signature != _ENTRY_SIGNATURE or place > len(directory):
            raise _Damaged
        if 0xFFFFFFFF in (packed, size, offset):
            size, offset = _zip64(directory[name_end:extra_end], packed, size, offset)
        mode = attributes >> 16 if made >> 8 == _UNIX else 0
        name = directory[start:name_end]
        yield _Entry(name, bool(flags & _UTF8_NAME) or name.isascii(), mode, offset, size)


def _zip64(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int]:
    """Size and offset of a zip64 entry: extra field 1 has those of the numbers that do not fit into 32 bits."""
    place = 0
    while place < len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        place += 4
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, place))
            try:
                size = next(numbers) if size == 0xFFFFFFFF else size
                packed = next(numbers) if packed == 0xFFFFFFFF else packed
                offset = next(numbers) if offset == 0xFFFFFFFF else offset
            except StopIteration:
                raise _Damaged from None
        place += length
    return size, offset


def _encoding(directory: bytes, count: int, shown: str, skipped: SkippedFiles) -> str | None:
    """The encoding of names that do not declare it: CP949 (Korean Windows), or None for UTF-8 (macOS) and unknown ones."""
    fitting = ["utf-8", "cp949"]
    undeclared, example = 0, b""
    for entry in _entries(directory, count):
        if not entry.in_utf8:
            undeclared, example = undeclared + 1, example or entry.name
            fitting = [encoding for encoding in fitting if _decodes(entry.name, encoding)]
    if not undeclared or "utf-8" in fitting:
        return None
    names = f"{shown} does not declare the encoding of its names ({undeclared:,} that are not ASCII)"
    if not fitting:
        skipped.remarks.append(
            f"{names}, and they are stored as they are, for example {printable(example)!r}: zip it again in UTF-8"
        )
        return None
    decoded = example.decode(fitting[0])
    skipped.remarks.append(
        f"{names}; they were read as Korean (CP949), for example {decoded!r}: if that is wrong, zip it again in UTF-8"
    )
    return fitting[0]


def _decodes(name: bytes, encoding: str) -> bool:
    try:
        name.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def read_zip_member(file: int, offset: int, size: int) -> bytes:
    """The bytes of the member whose local header is at `offset` of an open zip. Raises OSError when they cannot be read."""
    header = os.pread(file, _LOCAL.size, offset)
    if len(header) < _LOCAL.size or not header.startswith(_LOCAL_SIGNATURE):
        raise OSError(EIO, "damaged zip: no file where its directory says")
    _, _, flags, method, _, _, crc, _, _, name_length, extra_length = _LOCAL.unpack(header)
    if flags & _ENCRYPTED:
        raise OSError(EIO, "encrypted")
    start = offset + _LOCAL.size + name_length + extra_length
    # Incompressible data grow by 5 bytes per 16 KB or more; the data descriptor that may follow takes at most 24 bytes.
    most = min(size + size // 1000 + 64, max(0, os.fstat(file).st_size - start))
    packed = os.pread(file, most, start)
    if method == _STORED:
        data, rest = packed[:size], packed[size:]
    elif method == _DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(packed, size + 1)
        except zlib.error:
            raise OSError(EIO, "damaged zip: its data cannot be inflated") from None
        rest = inflate.unused_data
    else:
        raise OSError(EIO, f"compressed in a way that is not supported (method {method})")
    if flags & _HAS_DESCRIPTOR:
        rest = rest.removeprefix(_DESCRIPTOR_SIGNATURE)
        crc = int.from_bytes(rest[:4], "little")
    if len(data) != size or zlib.crc32(data) != crc:
        raise OSError(EIO, "damaged zip: its data do not fit their checksum")
    return data
