"""Decode with Pillow: formats that a set does not store, and a second opinion on images that are converted."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from sharding.images.formats import WAY_OUT, Refusal, damaged, several_images, too_large, webp_size

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


class DecodedImage(NamedTuple):
    """pixels: (height, width, 4) uint8 RGBA, upright. deviations: in which respects it was not upright 8-bit RGB."""

    pixels: np.ndarray
    deviations: tuple[str, ...]


def decode_with_pillow(data: bytes, kind: str) -> DecodedImage | Refusal:
    """Decode a file of one of PILLOW_FORMATS. Of 16 bits the upper 8 are kept, as DALI does with a PNG.

    A JPEG or PNG must have no EXIF data: sharding/images/image_checks.py decides what a decoder may see.
    """
    if kind == "WebP" and (refusal := too_large(*webp_size(data))):
        return refusal  # Pillow allocates memory before it knows the size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about harmless faults in a file
            # Only this format: some of Pillow's formats run other programs.
            image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[kind]])
            if refusal := too_large(*image.size):
                return refusal
            images = getattr(image, "n_frames", 1) if kind in _ORIENTED else 1
            if images != 1:
                return several_images(f"{images} in one file")
            deviations = _deviations(image, kind)
            if deviations is None:
                return Refusal("undecodable", f"a {kind} of samples that are not read reliably ({image.mode}): {WAY_OUT}")
            if kind in _ORIENTED:
                image = PIL.ImageOps.exif_transpose(image)
            pixels = _rgba(image)
    except Exception:  # Pillow's readers raise nearly anything
        return damaged(data, kind)
    return DecodedImage(pixels, deviations)


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
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow itself would clip it at 255
        return np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return np.asarray(image.convert("RGBA"))
