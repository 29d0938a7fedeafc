"""Decode with Pillow: formats that a set does not store, and a second opinion on images that are converted.

Pillow silences libtiff, which only warns of a damaged JPEG in a TIFF: these are checked here. No check sees every changed byte of
formats without checksums: BMP, PNM, WebP, JPEG 2000, and TIFFs other than those compressed by Deflate.
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from sharding.images.formats import WAY_OUT, Refusal, damaged, several_images, too_large, too_large_for_pillow, webp_size
from sharding.images.jpeg_decoder import decode_jpeg
from sharding.limits import MAX_CHUNKS, MAX_IMAGES

# The formats that are read, and Pillow's names of them.
PILLOW_FORMATS = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "TIFF": "TIFF",
    "JPEG 2000": "JPEG2000",
    "JPEG 2000 codestream": "JPEG2000",
    "WebP": "WEBP",
    "BMP": "BMP",
    "PNM": "PPM",
}
# The modes that convert to 8-bit RGBA in one way only, and how they deviate. (CIELAB, floats and 32 bits have several ways.)
_MODES = {
    "1": ("grey",),
    "L": ("grey",),
    "I;16": ("16-bit", "grey"),
    "I;16B": ("16-bit", "grey"),
    "LA": ("LA",),
    "P": ("palette",),
    "PA": ("palette", "RGBA"),
    "RGB": (),
    "RGBX": (),
    "RGBA": ("RGBA",),
    "RGBa": ("RGBA",),
    "YCbCr": (),
    "CMYK": ("CMYK",),
}
_ORIENTED = ("TIFF", "WebP")  # the formats in which Pillow applies an orientation
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of a TIFF
_WHITE_IS_ZERO, _CHUNKY = 0, 1
_COMPRESSION, _JPEG_TABLES = 259, 347
_JPEG = 7  # a value of _COMPRESSION
_STARTS, _SIZES, _TILE_SIDES = (273, 324), (279, 325), (322, 323)  # strips' and tiles'
# Pillow's warnings about a TIFF that was cut short or whose tags lie outside it.
_DAMAGE = "Tag offset too large|Tag data larger than file|Possibly corrupt|Corrupt EXIF|Truncated File Read"


class DecodedImage(NamedTuple):
    """pixels: (height, width, 4) uint8 RGBA, upright. deviations: in which respects it was not upright 8-bit RGB."""

    pixels: np.ndarray
    deviations: tuple[str, ...]


def decode_with_pillow(data: bytes, kind: str) -> DecodedImage | Refusal:
    """Decode a file of one of PILLOW_FORMATS. Of 16 bits the upper 8 are kept, as DALI does with a PNG.

    A JPEG or PNG must have no EXIF data: sharding/images/image_checks.py decides what a decoder may see.
    """
    if kind == "WebP" and (refusal := too_large_for_pillow(*webp_size(data))):
        return refusal  # Pillow allocates memory before it knows the size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about harmless faults in a file
            if kind == "TIFF":
                warnings.filterwarnings("error", _DAMAGE)
            # Only this format: some of Pillow's formats run other programs.
            image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[kind]])
            if refusal := too_large_for_pillow(*image.size):
                return refusal
            images = _count_images(image) if kind in _ORIENTED else 1
            if images != 1:
                return several_images(f"{images} in one file" if images <= MAX_IMAGES else f"over {MAX_IMAGES} in one file")
            if kind == "TIFF" and (refusal := _check_tiff(image.tag_v2, data)):  # type: ignore[attr-defined]
                return refusal
            warnings.simplefilter("ignore")  # from here on about EXIF data, on which no pixel depends
            deviations = _deviations(image, kind)
            if deviations is None:
                return Refusal("undecodable", f"a {kind} of samples that are not read reliably ({image.mode}): {WAY_OUT}")
            if kind in _ORIENTED:
                image = PIL.ImageOps.exif_transpose(image)
            pixels = _rgba(image)
    except Exception:  # Pillow's readers raise nearly anything
        return damaged(data, kind)
    return DecodedImage(pixels, deviations)


def _count_images(image: PIL.Image.Image) -> int:
    """The images in a file; MAX_IMAGES + 1 if there are more, because each takes Pillow some time."""
    count = 1
    try:
        while count <= MAX_IMAGES:
            image.seek(count)
            count += 1
    except EOFError:
        pass
    image.seek(0)
    return count


def _check_tiff(tags: Mapping[int, Any], data: bytes) -> Refusal | None:
    """Check the strips or tiles of a TIFF before Pillow decodes them. Raises ValueError where a JPEG among them is damaged."""
    starts, sizes = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in (_STARTS, _SIZES))
    if max(len(starts), len(sizes)) > MAX_CHUNKS:
        return Refusal("too complex", f"a TIFF of more than {MAX_CHUNKS:,} strips or tiles: {WAY_OUT}")
    if refusal := too_large(*(tags.get(tag, 0) for tag in _TILE_SIDES)):
        return refusal  # each is allocated whole
    if tags.get(_COMPRESSION) == _JPEG:
        tables = tags.get(_JPEG_TABLES, b"")[:-2]  # they end with an end marker, and each strip begins with a start marker
        for start, size in zip(starts, sizes, strict=False):
            strip = data[start : start + size]
            decode_jpeg(tables + strip[2:] if tables else strip, eighth=True)
    return None


def _deviations(image: PIL.Image.Image, kind: str) -> tuple[str, ...] | None:
    if image.mode not in _MODES:
        return None
    deviations = list(_MODES[image.mode])
    if kind == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(_BITS, (1,)))
        # Pillow misreads these silently: planes as pixels, white as black, 12 bits as the lower 12 of 16.
        if bits > 8 and (bits != 16 or tags.get(_PLANAR, _CHUNKY) != _CHUNKY or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO):
            return None
        if bits == 16 and "16-bit" not in deviations:
            deviations.insert(0, "16-bit")
    if kind in _ORIENTED and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in range(2, 9):
        deviations.append("rotated by EXIF")
    return tuple(deviations)


def _rgba(image: PIL.Image.Image) -> np.ndarray:
    width, height = image.size
    pixels = np.empty((height, width, 4), np.uint8)
    for rows in strips(height, width):
        part = image.crop((0, rows.start, width, rows.stop)) if rows.stop - rows.start < height else image
        if image.mode.startswith("I;16"):
            pixels[rows, :, :3] = (np.asarray(part)[..., None] >> 8).astype(np.uint8)  # Pillow itself would clip it at 255
            pixels[rows, :, 3] = 255
        else:
            pixels[rows] = np.asarray(part.convert("RGBA"))
    return pixels


def strips(height: int, width: int) -> Iterator[slice]:
    """The rows of an image, as many at a time as have a million pixels: arithmetic takes several times their memory."""
    rows = max(1, 2**20 // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))
