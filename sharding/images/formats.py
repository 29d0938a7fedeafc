"""Recognise image formats and parse their structure without a decoder; and the refusals that follow from it.

To recognise another format, add it to _KINDS.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from sharding.limits import (
    MAX_CHUNKS,
    MAX_COMPRESSED_TEXTS,
    MAX_PILLOW_PIXELS,
    MAX_PIXELS,
    MAX_SCANNED_PIXELS,
    MAX_SCANS,
    MAX_SIDE,
)

WAY_OUT = "save it as 8-bit RGB PNG"

_KINDS = tuple(
    (re.compile(begin, re.DOTALL), kind)
    for begin, kind in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
        (rb"\0\0\0\x0cjP  ", "JPEG 2000"),
        (rb"\xff\x4f\xff\x51", "JPEG 2000 codestream"),
        (rb"RIFF.{4}WEBP", "WebP"),
        (rb"BM", "BMP"),
        (rb"P[56]\s", "PNM"),
        (rb"GIF8", "GIF"),
        (rb".{4}ftypavi[fs]", "AVIF"),
        (rb".{4}ftyp(hei|hev|mif1|msf1)", "HEIC"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
        (rb"8BPS", "Photoshop"),
    )
)
_SUBSAMPLINGS = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0", (1, 2): "4:4:0", (4, 1): "4:1:1", (4, 2): "4:1:0"}
_PROCESSES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_BYTE_ORDERS = {b"II*\0": "little", b"MM\0*": "big"}  # of a TIFF structure, which EXIF data are
_ORIENTATION, _SHORT = 0x112, 3
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # DHT, JPG and DAC lie among the frame markers
_COMPRESSED_TEXTS = (b"zTXt", b"iTXt", b"iCCP")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_MAX_DEFLATE_RATIO = 1032  # by zlib's documentation


@dataclass(frozen=True)
class Refusal:
    """A refused image: one of a few reasons, to count by, and a detail about this file.

    quarantine.parquet records both, so another wording gives sets with refused images another fingerprint.
    """

    reason: str
    detail: str


class Exif(NamedTuple):
    """The positions of a file's EXIF data, and their orientation, 1 (upright) to 8.

    orientation: 1 if they have none; None if decoders could disagree, because they are damaged or there are several.
    """

    spans: tuple[tuple[int, int], ...]  # of the segments or chunks
    orientation: int | None


NO_EXIF = Exif((), 1)


class Frame(NamedTuple):
    """A JPEG's properties by the segments before its first scan, and its number of scans."""

    coding: str  # "baseline 4:2:0": process, and chroma subsampling where there are three components
    bits: int  # per sample
    rgb: bool  # red, green and blue are stored, not luma and chroma
    exif: Exif
    scans: int


def kind_of(data: bytes) -> str | None:
    """The format that the first bytes look like, or None."""
    for begin, kind in _KINDS:
        if begin.match(data):
            return kind
    return None


def read_jpeg(data: bytes) -> Frame | Refusal:
    """Parse the segments before a JPEG's first scan. Refuses one without a scan, or without an end marker after its start.

    The end marker cannot occur inside a scan, but a thumbnail in the header has one of its own.
    """
    exif: list[tuple[int, int]] = []
    jfif, adobe, frame, place = False, -1, 0, 2
    try:
        for _ in range(MAX_CHUNKS):
            marker = data[place + 1]
            if marker == 0xDA:
                break
            if data[place] != 0xFF:
                return damaged(data, "JPEG")
            if marker == 0xFF:  # fill byte before a marker
                place += 1
                continue
            end = place + 2 + (data[place + 2] << 8 | data[place + 3])
            if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
                frame = place
            elif marker == 0xE0:
                jfif = jfif or data.startswith(b"JFIF\0", place + 4)
            elif marker == 0xE1:
                if data.startswith(b"Exif", place + 4) or data[place + 10 : place + 14] in _BYTE_ORDERS:
                    exif.append((place, end))
            elif marker == 0xEE and data.startswith(b"Adobe", place + 4):
                adobe = data[place + 15]
            place = end
        else:
            return Refusal("too complex", f"a JPEG of more than {MAX_CHUNKS:,} segments: {WAY_OUT}")
        last = data.rfind(b"\xff\xd9")
        if not frame or last < place:
            return damaged(data, "JPEG")
        end = frame + 10 + 3 * data[frame + 9]
        ids, sampling = data[frame + 10 : end : 3], data[frame + 11 : end : 3]
        # A sequential JPEG whose first scan has all components has no other. (Searching all bytes would take far longer.)
        single = data[frame + 1] & 3 < 2 and data[place + 4] == len(ids)
    except IndexError:
        return damaged(data, "JPEG")
    # As in libjpeg: JFIF is YCbCr; otherwise Adobe's segment decides, or else the components' names.
    rgb = len(ids) == 3 and not jfif and (adobe == 0 or (adobe < 0 and ids == b"RGB"))
    scans = 1 if single else data.count(b"\xff\xda", place, last)
    return Frame(_coding(data[frame + 1], sampling), data[frame + 4], rgb, _exif(data, exif, b"Exif\0\0", 4, 0), scans)


@functools.lru_cache(maxsize=256)
def _coding(marker: int, sampling: bytes) -> str:
    """sampling: a byte per component, with the horizontal factor in its upper half and the vertical one in its lower."""
    process = _PROCESSES.get(marker, f"SOF{marker - 0xC0}")
    if len(sampling) != 3:
        return process
    (across, down), *chroma = (divmod(factors, 16) for factors in sampling)
    steps = {(across / x, down / y) if x and y else (0.0, 0.0) for x, y in chroma}
    return f"{process} {_SUBSAMPLINGS.get(steps.pop(), 'other') if len(steps) == 1 else 'other'}"  # type: ignore[arg-type]


def png_chunks(data: bytes) -> tuple[set[bytes], Exif] | Refusal:
    """The names of a PNG's chunks up to IEND, and its EXIF data. Refuses one in which IEND is not reached."""
    names: list[bytes] = []
    exif: list[tuple[int, int]] = []
    place = 8
    while place + 12 <= len(data) and len(names) < MAX_CHUNKS:
        name = data[place + 4 : place + 8]
        names.append(name)
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if end > len(data) or not name.isalpha():
            return damaged(data, "PNG")
        if name == b"eXIf":
            exif.append((place, end))
        elif name == b"IEND":
            if sum(map(names.count, _COMPRESSED_TEXTS)) > MAX_COMPRESSED_TEXTS:
                return Refusal("too complex", f"a PNG of more than {MAX_COMPRESSED_TEXTS} compressed texts: {WAY_OUT}")
            return set(names), _exif(data, exif, b"", 8, 4)
        place = end
    if len(names) == MAX_CHUNKS:
        return Refusal("too complex", f"a PNG of more than {MAX_CHUNKS:,} chunks: {WAY_OUT}")
    return damaged(data, "PNG")


def remove_spans(data: bytes, spans: tuple[tuple[int, int], ...]) -> bytes:
    """The data without these spans."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(data)]
    return b"".join(data[end:start] for end, start in zip(ends, starts, strict=True))


def _exif(data: bytes, spans: list[tuple[int, int]], name: bytes, before: int, after: int) -> Exif:
    """spans: of segments with this many bytes before and after a name and the EXIF data."""
    if not spans:
        return NO_EXIF
    start, end = spans[0]
    clean = len(spans) == 1 and data.startswith(name, start + before)
    return Exif(tuple(spans), _orientation(data[start + before + len(name) : end - after]) if clean else None)


def _orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of a TIFF structure; None if anything is wrong with it."""
    order: Any = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return None
    directory = int.from_bytes(exif[4:8], order)
    length = 12 * int.from_bytes(exif[directory : directory + 2], order)
    entries = exif[directory + 2 : directory + 2 + length]
    if directory < 8 or len(exif) < directory + 2 + length:
        return None
    found = [entries[i : i + 12] for i in range(0, length, 12) if int.from_bytes(entries[i : i + 2], order) == _ORIENTATION]
    if not found:
        return 1
    kind, count, value = (int.from_bytes(found[0][i:j], order) for i, j in ((2, 4), (4, 8), (8, 10)))
    if len(found) > 1 or kind != _SHORT or count != 1 or value > 8:
        return None
    return value or 1  # some programs write 0 for unknown


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP's canvas in pixels, by its first chunk; (0, 0) for an unknown chunk."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    if chunk == b"VP8L":
        sides = int.from_bytes(data[21:25], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    return 0, 0


def too_large(width: int, height: int) -> Refusal | None:
    """The refusal of an image larger than MAX_SIDE or MAX_PIXELS; None for any other."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limits = f"at most {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all"
        return Refusal("too large", f"{width} x {height} px by its header; {limits}")
    return None


def too_large_for_pillow(width: int, height: int) -> Refusal | None:
    """The refusal of an image that is too large for Pillow to decode; None for any other."""
    if width * height > MAX_PILLOW_PIXELS:
        limit = f"at most {MAX_PILLOW_PIXELS:,} in all unless it is a plain JPEG or PNG"
        return too_large(width, height) or Refusal("too large", f"{width} x {height} px by its header; {limit}")
    return too_large(width, height)


def too_little_data(data: bytes, kind: str, width: int, height: int) -> Refusal | None:
    """The refusal of a JPEG or PNG whose bytes cannot hold so many pixels: its decoder would take memory for them first."""
    if kind == "JPEG":
        least = (-(-width // 8) * -(-height // 8)) / 8  # each block of 8 x 8 px takes a bit or more
    elif kind != "PNG":
        return None
    else:
        least = width * height * data[24] * _PNG_CHANNELS.get(data[25], 1) / 8 / _MAX_DEFLATE_RATIO
    if len(data) >= least:
        return None
    return Refusal(
        "undecodable", f"damaged or cut short: {len(data):,} bytes cannot hold the {width} x {height} px of its header"
    )


def too_many_scans(scans: int, width: int, height: int) -> Refusal | None:
    """The refusal of a JPEG that would keep a decoder busy: each scan visits every pixel."""
    if scans <= MAX_SCANS and scans * width * height <= MAX_SCANNED_PIXELS:
        return None
    limits = f"at most {MAX_SCANS} scans, and {MAX_SCANNED_PIXELS:,} px in all of them"
    return Refusal("too complex", f"a JPEG of {scans:,} scans of {width} x {height} px; {limits}: {WAY_OUT}")


def several_images(what: str) -> Refusal:
    """The refusal of a file with more than one image."""
    return Refusal("several images", f"{what}, of which DALI would read the first: save each by itself")


def damaged(data: bytes, kind: str) -> Refusal:
    """The refusal of a file of this format that cannot be decoded."""
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind)
    if end and end not in data[-64:]:
        return Refusal("undecodable", f"damaged or cut short: {len(data)} bytes that do not end as a {kind} ends")
    return Refusal("undecodable", f"looks like {kind}, but its header or its data cannot be decoded")
