"""An encoded image's bytes -> what its header says, its pixels, or why it is refused.

The trainer decodes by DALI, which sits on nvImageCodec, and a file that it cannot decode kills the whole pipeline, often
without a name. So what a set may hold is decoded here in full by nvImageCodec's own CPU decoders. (Pillow would be too
lenient: it accepts a JPEG without its last two bytes and a PNG without its last twelve.) They do not survive everything:

- a damaged JPEG 2000 file ends the process, by its header (SIGFPE) or by its data (SIGSEGV): Pillow decodes it first;
- a PNG of which one chunk claims 4 GB makes them take 4 GB: the chunks are walked first;
- EXIF data that its parts read differently corrupt the heap, as one of them turns the image: they are taken out first;
- a TIFF can corrupt the heap, and a WebP take gigabytes: these, which DALI never meets in a set, are left to Pillow.

To read another kind of file, add it to PILLOW_FORMATS in `pictures`, and how it begins to `formats`.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from sharding.images.formats import (
    NO_EXIF,
    WAY_OUT,
    Exif,
    Refusal,
    damaged,
    kind_of,
    png_chunks,
    read_jpeg,
    several_images,
    too_large,
)
from sharding.images.pillow_decoder import PILLOW_FORMATS, Picture, picture_of

# Read when nvImageCodec is first imported. A refused file is told in quarantine.parquet, not on the terminal.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

STORABLE = {"JPEG": "jpeg", "PNG": "png", "JPEG 2000": "jpeg2000"}  # the kinds that a set may hold, as its manifest names them


class Header(NamedTuple):
    """What a file says of itself.

    width, height: pixels, before an EXIF orientation is applied. oddities: what keeps it from being a plain 8-bit RGB file
    of a storable kind, in words. exif: what a decoder must not see, and the orientation to apply. coding: of a JPEG, its
    process and chroma subsampling, "baseline 4:2:0". picture: of another kind than JPEG and PNG, which had to be decoded.
    """

    kind: str
    width: int
    height: int
    oddities: tuple[str, ...]
    exif: Exif = NO_EXIF
    coding: str | None = None
    picture: Picture | None = None


def read_header(data: bytes) -> Header | Refusal:
    """All that can be said of a JPEG or PNG without decoding it, in about 10 us. Other kinds are decoded, by Pillow."""
    if not data:
        return Refusal("empty", "0 bytes")
    kind = kind_of(data)
    if kind == "JPEG":
        return _jpeg_header(data)
    if kind == "PNG":
        return _png_header(data)
    if kind in PILLOW_FORMATS:
        return _other_header(data, kind)
    if kind:
        return Refusal("undecodable", f"looks like {kind}, which DALI cannot decode: save it as PNG")
    return Refusal("not an image", f"begins with {data[:8].hex(' ')}")


def _jpeg_header(data: bytes) -> Header | Refusal:
    frame = read_jpeg(data)
    if frame is None:
        return damaged(data, "JPEG")
    if frame.bits != 8:
        return Refusal("undecodable", f"a JPEG of {frame.bits} bits per sample: {WAY_OUT}")
    stream = _read_stream(data, "JPEG")
    if isinstance(stream, Refusal):
        return stream
    if stream.channels == 3:
        oddities = ["JPEG of RGB"] * frame.rgb  # not every decoder heeds that it is no YCbCr
    else:
        oddities = ["grey" if stream.channels == 1 else "CMYK"]
    return _header("JPEG", stream, oddities, frame.exif, frame.coding)


def _png_header(data: bytes) -> Header | Refusal:
    structure = png_chunks(data)
    if structure is None:
        return damaged(data, "PNG")
    chunks, exif = structure
    stream = _read_stream(data, "PNG")
    if isinstance(stream, Refusal):
        return stream
    if b"acTL" in chunks:
        return several_images("an animation")
    transparent = b"tRNS" in chunks  # a colour, or some of the palette's
    if transparent and stream.bits > 8:
        return Refusal("undecodable", f"a PNG of 16 bits with a transparent colour: {WAY_OUT}")
    oddities = ["palette"] * (stream.colours == "PALETTE") + ["16-bit"] * (stream.bits > 8)
    if transparent or stream.channels in (2, 4):
        oddities.append("LA" if stream.channels <= 2 else "RGBA")
    elif stream.channels == 1:
        oddities.append("grey")
    return _header("PNG", stream, oddities, exif, None)


def _header(kind: str, stream: "_Stream", oddities: list[str], exif: Exif, coding: str | None) -> Header:
    if exif.orientation == 1:
        return Header(kind, stream.width, stream.height, tuple(oddities), coding=coding)
    oddities.append("rotated by EXIF" if exif.orientation else "damaged EXIF")
    return Header(kind, stream.width, stream.height, tuple(oddities), exif, coding)


def _other_header(data: bytes, kind: str) -> Header | Refusal:
    picture = picture_of(data, kind)
    if isinstance(picture, Refusal):
        return picture
    height, width, _ = picture.pixels.shape
    if kind in STORABLE:
        stream = _read_stream(data, kind)
        if not isinstance(stream, Refusal) and (stream.channels, stream.bits, stream.colours) == (3, 8, "SRGB"):
            return Header(kind, width, height, (), picture=picture)
    return Header(kind, width, height, (kind, *picture.oddities), picture=picture)


class _Stream(NamedTuple):
    width: int
    height: int
    channels: int
    bits: int
    colours: str


def _read_stream(data: bytes, kind: str) -> _Stream | Refusal:
    """nvImageCodec's view of a header."""
    try:
        stream = _codec().CodeStream(data)
        found = _Stream(stream.width, stream.height, stream.num_channels, stream.precision, stream.color_spec.name)
    except Exception:  # whatever a parser in C++ makes of damage
        return damaged(data, kind)
    return too_large(found.width, found.height) or found


def decode(data: bytes) -> np.ndarray | None:
    """(height, width, 3) uint8 RGB, as DALI's CPU decoder gives it, or None.

    Only for JPEG, PNG and JPEG 2000 that have passed read_header, without EXIF data that give another orientation than 1.
    """
    try:
        image = _decoder().decode(data)
    except Exception:
        return None
    return None if image is None else np.asarray(image)


@functools.cache
def _codec():
    import nvidia.nvimgcodec  # late: reading a manifest needs no decoder

    return nvidia.nvimgcodec


def load_decoder() -> None:
    """Do now what the first image would wait for."""
    _decoder()


@functools.cache
def _decoder():
    """One decoder per process, on the CPU and one thread: the processes are the parallelism."""
    codec = _codec()
    backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
    return codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)


@contextmanager
def silent_decoders() -> Iterator[None]:
    """Keep the decoders' own messages off the terminal: libpng, libtiff and OpenCV write to file descriptor 2, past Python."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
