"""Images decoded by Pillow: those of a kind that a set does not hold, and a second opinion on those that it converts."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from sharding.images.formats import WAY_OUT, Refusal, damaged, several_images, too_large, webp_size

# What is read, as Pillow names it.
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
# The modes that become 8-bit RGBA without a choice, and what they are called. (CIELAB, floats and 32 bits would need one.)
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
_ORIENTED = ("TIFF", "WebP")  # the kinds of which Pillow applies an orientation
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of a TIFF
_WHITE_IS_ZERO, _CHUNKY = 0, 1


class Picture(NamedTuple):
    """pixels: (height, width, 4) uint8 RGBA, upright. oddities: in words, in what it was not 8-bit RGB or not upright."""

    pixels: np.ndarray
    oddities: tuple[str, ...]


def picture_of(data: bytes, kind: str) -> Picture | Refusal:
    """Decode a file of a kind of PILLOW_FORMATS. Of 16 bits the upper 8 are kept, as DALI does it with a PNG.

    A JPEG or PNG must have no EXIF data left: what a decoder may see is the business of sharding/images/image_checks.py.
    """
    if kind == "WebP" and (refusal := too_large(*webp_size(data))):
        return refusal  # Pillow takes the memory before it says how much
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file and does not matter
            # Only this format: Pillow's list has some that run other programs.
            image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[kind]])
            if refusal := too_large(*image.size):
                return refusal
            images = getattr(image, "n_frames", 1) if kind in _ORIENTED else 1
            if images != 1:
                return several_images(f"{images} in one file")
            oddities = _oddities(image, kind)
            if oddities is None:
                return Refusal("undecodable", f"a {kind} of samples that are not read reliably ({image.mode}): {WAY_OUT}")
            if kind in _ORIENTED:
                image = PIL.ImageOps.exif_transpose(image)
            pixels = _rgba(image)
    except Exception:  # its readers raise nearly anything
        return damaged(data, kind)
    return Picture(pixels, oddities)


def _oddities(image: PIL.Image.Image, kind: str) -> tuple[str, ...] | None:
    if image.mode not in _MODES:
        return None
    oddities = list(_MODES[image.mode])
    if kind == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(_BITS, (1,)))
        # Pillow reads these without a word as something else: planes as pixels, white as black, 12 bits as the lower of 16.
        if bits > 8 and (bits != 16 or tags.get(_PLANAR, _CHUNKY) != _CHUNKY or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO):
            return None
        if bits == 16 and "16-bit" not in oddities:
            oddities.insert(0, "16-bit")
    if kind in _ORIENTED and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in range(2, 9):
        oddities.append("rotated by EXIF")
    return tuple(oddities)


def _rgba(image: PIL.Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow itself would clip it at 255
        return np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return np.asarray(image.convert("RGBA"))
