"""An image file's bytes -> what it is, or why it is refused.

The trainer decodes by DALI, which sits on nvImageCodec, and a file that it cannot decode kills the whole pipeline, often
without a name. So every image is decoded here in full by nvImageCodec's own CPU decoders. (Pillow would be too lenient: it
accepts a JPEG without its last two bytes and a PNG without its last twelve.)

To add a rule, write a function like those in RULES and add it there.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Read when nvImageCodec is first imported. A refused file is told in quarantine.parquet, not on the terminal.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

MAX_SIDE = 16_384  # pixels; a patch is far smaller, and a header that asks for more would fill the memory

_KINDS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
    (b"RIFF", "WebP"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)


@dataclass(frozen=True)
class Verdict:
    """A good image: 'jpeg' or 'png', and its size in pixels as displayed (after its EXIF orientation)."""

    format: str
    width: int
    height: int


@dataclass(frozen=True)
class Refusal:
    """A refused image: one of a few reasons to count by, and a detail for the person who looks for the file."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself, before it is decoded: sizes in pixels."""

    format: str
    width: int
    height: int


def _not_too_large(header: Header, min_size: int) -> Refusal | None:
    if max(header.width, header.height) > MAX_SIDE:
        return Refusal("too large", f"{header.width} x {header.height} px by its header; at most {MAX_SIDE} a side")
    return None


def _not_too_small(header: Header, min_size: int) -> Refusal | None:
    if min(header.width, header.height) < min_size:
        return Refusal("too small", f"{header.width} x {header.height} px; --min-size is {min_size}")
    return None


RULES = (_not_too_large, _not_too_small)  # on the header, before the image is decoded


def check_image(data: bytes, *, min_size: int = 1) -> Verdict | Refusal:
    """Decode one encoded image in full. min_size: the least width and height in pixels."""
    if not data:
        return Refusal("empty", "0 bytes")
    kind = next((name for magic, name in _KINDS if data.startswith(magic)), "")
    if kind not in ("jpeg", "png"):
        return Refusal("not a JPEG or PNG", f"looks like {kind}" if kind else f"begins with {data[:8].hex(' ')}")
    codec = _codec()
    try:
        stream = codec.CodeStream(data)
        header = Header(stream.codec_name, stream.width, stream.height)
    except RuntimeError:
        return Refusal("undecodable", _damage(data, kind))
    for rule in RULES:
        if refusal := rule(header, min_size):
            return refusal
    if kind == "jpeg" and not _jpeg_ends(data):
        return Refusal("undecodable", _damage(data, kind))
    image = _decoder().decode(data)
    if image is None:  # how this decoder says that it failed
        return Refusal("undecodable", _damage(data, kind))
    height, width, _ = image.shape
    return Verdict(header.format, width, height)


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end marker follows the first scan.

    Half a file padded with zeros, as a broken download leaves it, decodes without complaint: to half an image. Inside a
    scan the end marker's two bytes cannot occur, but a thumbnail in the header has an end of its own.
    """
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        # 0xFF may fill the space before a marker; any other segment says how long it is.
        place += 1 if data[place + 1] == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data.find(b"\xff\xd9", place) >= 0


def _damage(data: bytes, kind: str) -> str:
    end = b"\xff\xd9" if kind == "jpeg" else b"IEND"
    if end not in data[-64:]:
        return f"damaged or cut short: {len(data)} bytes that do not end as a {kind.upper()} ends"
    return "damaged: its header or its data cannot be decoded"


@functools.cache
def _codec():
    import nvidia.nvimgcodec  # late: reading a manifest needs no decoder

    return nvidia.nvimgcodec


@functools.cache
def _decoder():
    """One decoder per process, on the CPU and one thread: the processes are the parallelism."""
    codec = _codec()
    backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
    return codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)


@contextmanager
def silent_decoders() -> Iterator[None]:
    """Keep libpng's own messages off the terminal: it writes to file descriptor 2 itself, past Python."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
