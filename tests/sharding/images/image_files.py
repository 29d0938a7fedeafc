"""Image files that no encoder writes."""

import struct
import zlib
from collections.abc import Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, colour: int = 2, bits: int = 8) -> bytes:
    """A PNG with these chunks between its header and its end. colour: 0 grey, 2 RGB, 6 RGBA."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(data)) + data


def flat_jpeg(
    width: int, height: int, *, factors: Sequence[int] = (0x11, 0x11, 0x11), progressive: bool = False, scans: int = 1
) -> bytes:
    """A valid JPEG of one grey, in which a block takes two bits, or a bit in each scan.

    factors: of chroma subsampling, horizontal and vertical in a byte for each component. scans: of a progressive one.
    """
    count, most = len(factors), [max(each >> 4 for each in factors), max(each & 15 for each in factors)]
    units = -(-width // (8 * most[0])) * -(-height // (8 * most[1]))
    blocks = units * sum((each >> 4) * (each & 15) for each in factors)
    components = b"".join(bytes((i, each, 0)) for i, each in enumerate(factors, start=1))
    code = bytes((1, *[0] * 15, 0))  # of one bit, for "no coefficient"
    data = b"\xff\xd8" + jpeg_segment(0xDB, bytes((0, *[1] * 64)))
    data += jpeg_segment(0xC2 if progressive else 0xC0, struct.pack(">BHHB", 8, height, width, count) + components)
    data += jpeg_segment(0xC4, b"\0" + code) + jpeg_segment(0xC4, b"\x10" + code)
    tables = b"".join(bytes((i, 0)) for i in range(1, count + 1))
    data += jpeg_segment(0xDA, bytes((count,)) + tables + bytes((0, 0 if progressive else 63, 0)))
    data += _zero_bits(blocks if progressive else 2 * blocks)
    luma = -(-width // 8) * -(-height // 8)  # blocks, in the later scans of one component
    later = jpeg_segment(0xDA, bytes((1, 1, 0, 1, 63, 0))) + _zero_bits(luma)
    return data + (scans - 1) * later + b"\xff\xd9"


def _zero_bits(count: int) -> bytes:
    """Filled with ones to a whole byte."""
    return bytes(count // 8) + bytes((0xFF >> count % 8,)) * (count % 8 > 0)
