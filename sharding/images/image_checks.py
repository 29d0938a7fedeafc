"""Read an encoded image's header, decode it, or refuse it.

Training decodes with DALI, which uses nvImageCodec. A file that it cannot decode ends the whole pipeline, often without naming
the file. And of a damaged file it makes a damaged image: libjpeg and libpng only warn of zeros in the middle, or of a missing
half. So every image of a set is decoded here, by the same libraries, and a warning is an error. (Pillow would be too lenient.)
JPEGs are decoded by libjpeg-turbo alone, at an eighth of their size, which reads every coefficient and is twice as fast.
Everything that it accepts, nvImageCodec accepts too: a test holds both against each other on mutated files.

nvImageCodec's own CPU decoders decode the others. They do not survive everything:

- a damaged JPEG 2000 file ends the process, by its header (SIGFPE) or by its data (SIGSEGV): Pillow decodes it first;
- a PNG with a chunk that claims 4 GB makes them allocate 4 GB: the chunks are parsed first;
- EXIF data that their parts read differently corrupt the heap when one of them rotates the image: they are removed first;
- a TIFF can corrupt the heap, and a WebP can take gigabytes: Pillow decodes these, and DALI never gets them from a set.

To read another format, add it to PILLOW_FORMATS in `pillow_decoder`, and its first bytes to `formats`.
"""

import functools
import os
import re
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
    too_little_data,
    too_many_scans,
)
from sharding.images.jpeg_decoder import decode_jpeg
from sharding.images.pillow_decoder import PILLOW_FORMATS, DecodedImage, decode_with_pillow
from sharding.shard_format import STORABLE

# Read at nvImageCodec's first import. Refused files are listed in quarantine.parquet, not on the terminal.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

# What libjpeg and libpng write about damaged data. (Of libpng's other warnings most are about metadata, such as colour profiles.)
_DAMAGE = re.compile(rb"JPEG|Inconsistent progression|libpng [a-z]+: .*(IDAT|CRC error)")


class Header(NamedTuple):
    """An image's header.

    width, height: pixels, before an EXIF orientation is applied. deviations: in which respects it is no plain 8-bit RGB file of a
    storable format. exif: what a decoder must not see, and the orientation to apply. coding: of a JPEG, its process and chroma
    subsampling, such as "baseline 4:2:0". picture: the pixels, if the format is neither JPEG nor PNG and had to be decoded. deep:
    it has more than 8 bits per sample.
    """

    kind: str
    width: int
    height: int
    deviations: tuple[str, ...]
    exif: Exif = NO_EXIF
    coding: str | None = None
    picture: DecodedImage | None = None
    deep: bool = False


def read_header(data: bytes) -> Header | Refusal:
    """Read the header of a JPEG or PNG, in about 10 us. Other formats are decoded by Pillow."""
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
    if isinstance(frame, Refusal):
        return frame
    if frame.bits != 8:
        return Refusal("undecodable", f"a JPEG of {frame.bits} bits per sample: {WAY_OUT}")
    stream = _read_stream(data, "JPEG")
    if isinstance(stream, Refusal):
        return stream
    if refusal := too_many_scans(frame.scans, stream.width, stream.height):
        return refusal
    if stream.channels == 3:
        deviations = ["JPEG of RGB"] * frame.rgb  # some decoders take it for YCbCr
    else:
        deviations = ["grey" if stream.channels == 1 else "CMYK"]
    return _header("JPEG", stream, deviations, frame.exif, frame.coding)


def _png_header(data: bytes) -> Header | Refusal:
    structure = png_chunks(data)
    if isinstance(structure, Refusal):
        return structure
    chunks, exif = structure
    stream = _read_stream(data, "PNG")
    if isinstance(stream, Refusal):
        return stream
    if b"acTL" in chunks:
        return several_images("an animation")
    transparent = b"tRNS" in chunks  # a transparent colour or palette entry
    if transparent and stream.bits > 8:
        return Refusal("undecodable", f"a PNG of 16 bits with a transparent colour: {WAY_OUT}")
    deviations = ["palette"] * (stream.colours == "PALETTE") + ["16-bit"] * (stream.bits > 8)
    if transparent or stream.channels in (2, 4):
        deviations.append("LA" if stream.channels <= 2 else "RGBA")
    elif stream.channels == 1:
        deviations.append("grey")
    return _header("PNG", stream, deviations, exif, None)


def _header(kind: str, stream: "_Stream", deviations: list[str], exif: Exif, coding: str | None) -> Header:
    if exif.orientation == 1:
        return Header(kind, stream.width, stream.height, tuple(deviations), coding=coding, deep=stream.bits > 8)
    deviations.append("rotated by EXIF" if exif.orientation else "damaged EXIF")
    return Header(kind, stream.width, stream.height, tuple(deviations), exif, coding, deep=stream.bits > 8)


def _other_header(data: bytes, kind: str) -> Header | Refusal:
    picture = decode_with_pillow(data, kind)
    if isinstance(picture, Refusal):
        return picture
    height, width, _ = picture.pixels.shape
    deep = "16-bit" in picture.deviations
    if kind.startswith("JPEG 2000"):
        stream = _read_stream(data, kind)
        if not isinstance(stream, Refusal):
            if kind in STORABLE and (stream.channels, stream.bits, stream.colours) == (3, 8, "SRGB"):
                return Header(kind, width, height, (), picture=picture)
            deep = stream.bits > 8
    return Header(kind, width, height, (kind, *picture.deviations), picture=picture, deep=deep)


class _Stream(NamedTuple):
    width: int
    height: int
    channels: int
    bits: int
    colours: str


def _read_stream(data: bytes, kind: str) -> _Stream | Refusal:
    """Parse the header with nvImageCodec."""
    try:
        stream = _codec().CodeStream(data)
        colours = "" if kind == "JPEG" else stream.color_spec.name  # it takes as long as the rest
        found = _Stream(stream.width, stream.height, stream.num_channels, stream.precision, colours)
    except Exception:  # C++ exceptions of any kind on damaged data
        return damaged(data, kind)
    size = found.width, found.height
    return too_large(*size) or too_little_data(data, kind, *size) or found


def check_data(data: bytes, header: Header) -> Refusal | None:
    """Read all of an image's data, and refuse it where a decoder so much as warns. Only for a format in STORABLE."""
    image = decode_pixels(data, header.kind, eighth=True)
    if isinstance(image, Refusal):
        return image
    sizes = ((header.height, header.width), (-(-header.height // 8), -(-header.width // 8)))
    return None if image.shape[:2] in sizes else damaged(data, header.kind)


def decode_pixels(data: bytes, kind: str, *, eighth: bool = False) -> np.ndarray | Refusal:
    """(height, width, 3) uint8 RGB, as DALI's CPU decoder gives it, or the refusal of a damaged image.

    Only for what `decode` may see. eighth: where that is faster, an eighth of height and width in grey.
    """
    image = None
    if kind == "JPEG":
        try:
            image = decode_jpeg(data, eighth=eighth)
        except ValueError as error:
            return Refusal("undecodable", f"a damaged JPEG: {error}")
    if image is None:
        image = decode(data)
    return damaged(data, kind) if image is None else image


def decode(data: bytes) -> np.ndarray | None:
    """(height, width, 3) uint8 RGB by nvImageCodec, as DALI's CPU decoder gives it; None if it reports damage.

    Only for JPEG, PNG and JPEG 2000 that have passed read_header, without EXIF data that give another orientation than 1.
    """
    decoder, messages = _decoder(), _messages()
    with _stderr_to(messages):
        try:
            image = decoder.decode(data)
        except Exception:
            image = None
    if length := os.lseek(messages, 0, os.SEEK_CUR):
        damage = _DAMAGE.search(os.pread(messages, length, 0))
        os.ftruncate(messages, 0)
        os.lseek(messages, 0, os.SEEK_SET)
        if damage:
            return None
    return None if image is None else np.asarray(image)


def parsed_size(data: bytes | np.ndarray) -> tuple[int, int] | None:
    """Height and width by nvImageCodec's parser, which DALI's decoder uses too. None if it cannot parse the header."""
    try:
        stream = _codec().CodeStream(data)
        return stream.height, stream.width
    except RuntimeError:
        return None


@functools.cache
def _codec():
    import nvidia.nvimgcodec  # imported late: reading a manifest needs no decoder

    return nvidia.nvimgcodec


def load_decoder() -> None:
    """Load the decoder now, so that the first image need not wait for it."""
    _decoder()


@functools.cache
def _decoder():
    """One decoder per process, on the CPU with one thread: the parallelism is in the processes."""
    codec = _codec()
    backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
    return codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)


@functools.cache
def _messages() -> int:
    """A file in memory for what decoders write to file descriptor 2 directly."""
    return os.memfd_create("decoder-messages")


@contextmanager
def _stderr_to(file: int) -> Iterator[None]:
    saved = os.dup(2)
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def silent_decoders() -> Iterator[None]:
    """Suppress the decoders' own messages: libpng, libtiff and OpenCV write to file descriptor 2 directly."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        with _stderr_to(null):
            yield
    finally:
        os.close(null)
