"""Process each image: from a file's bytes to the bytes that are stored, or a refusal.

A set contains only plain images: 8-bit RGB (in a JPEG: YCbCr), upright, as JPEG, PNG or JPEG 2000. A plain file is stored
unchanged. Any other readable file is converted, and the manifest records how. So training never meets a palette, an alpha
channel or an orientation, which its decoders would each treat in their own way.

To add a rule that refuses images, add it to `process_image`; one that needs no pixels goes before the decoding.
"""

import io
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image

from sharding.images.formats import WAY_OUT, Frame, damaged, read_jpeg, remove_spans, too_large_for_pillow
from sharding.images.image_checks import Header, Refusal, check_data, decode, decode_pixels, read_header
from sharding.images.pillow_decoder import DecodedImage, decode_with_pillow, strips
from sharding.shard_format import STORABLE

# A pixel is tissue if it lets at most this much light through in its darkest channel: optical density 0.15, the threshold
# beta of Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.
_TISSUE_LEVEL = int(255 * 10**-0.15)
# A pixel with every channel below a tenth of white is no tissue but a scanner's padding, or ink: stains leave a brighter channel.
_BLACK_LEVEL = 25

# Of 16 bits the upper 8 are kept. Where none of them reaches this, no sample uses more than 14 bits: the camera had 10, 12 or 14,
# and its white is not 65,535. Bare glass is far above, and so is stained tissue in red.
_LEAST_PEAK = 64
_TOLERANCE = 2  # levels of 255 by which two decoders may differ in rounding; in our tests they never do


@dataclass(frozen=True)
class ImageOptions:
    """How images are processed; the fields are flags of sharding/build.py. Raises ValueError for invalid values.

    encode: "keep" stores plain files unchanged and converts others to PNG; "png", "jpeg:Q" and "jpeg2000" (lossless) encode
    images that are in another format. A plain JPEG is always kept, because encoding it again could only lose. check: "decode"
    decodes every image in full; "header" only those that must be converted. min_size: least width and height, pixels. min_tissue:
    least share of tissue, 0 (off) to 1. resize: shrink the shorter side to this, pixels; images are never enlarged, and every
    resized image is encoded again.
    """

    encode: str = "keep"
    check: str = "decode"
    min_size: int = 1
    min_tissue: float = 0.0
    resize: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch("keep|png|jpeg2000|jpeg:([1-9][0-9]?|100)", self.encode):
            way_out = "give keep, png, jpeg:Q with a quality Q from 1 to 100, or jpeg2000"
            raise ValueError(f"--encode {self.encode} is not known: {way_out}")
        if self.check not in ("decode", "header"):
            raise ValueError(f"--check {self.check} is not known: give decode or header")
        if self.min_size < 1:
            raise ValueError(f"--min-size {self.min_size} is out of range: give 1 px or more")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"--min-tissue {self.min_tissue} is out of range: give a share from 0 to 1")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"--resize {self.resize} is out of range: give 1 px or more")
        if self.resize is not None and self.encode == "keep":
            raise ValueError(
                "--resize changes the pixels, and --encode keep stores them as they are: give --encode png or jpeg:95"
            )
        if self.check == "header":
            for flag, given in (
                (f"--encode {self.encode}", self.encode != "keep"),
                ("--min-tissue", self.min_tissue > 0),
                ("--resize", self.resize is not None),
            ):
                if given:
                    raise ValueError(f"--check header decodes no pixels, and {flag} needs them: leave one of the two out")


class ProcessedImage(NamedTuple):
    """An image as it is stored in a shard.

    format: "jpeg", "png" or "jpeg2000". coding: of a JPEG, its process and chroma subsampling, such as "baseline 4:2:0".
    width, height: pixels. converted: the conversions in order, such as "TIFF, 16-bit"; None if data are the source's bytes.
    psnr: of the stored image against the pixels before lossy encoding, dB; None without lossy encoding.
    """

    data: bytes
    format: str
    coding: str | None
    width: int
    height: int
    converted: str | None
    psnr: float | None


def process_image(data: bytes, options: ImageOptions) -> ProcessedImage | Refusal:
    """Check one encoded image and convert it to a plain one. Never raises, whatever the bytes."""
    header = read_header(data)
    if isinstance(header, Refusal):
        return header
    if min(header.width, header.height) < options.min_size:
        return Refusal("too small", f"{header.width} x {header.height} px; --min-size is {options.min_size}")
    format = STORABLE.get(header.kind)
    kept = not header.deviations and (options.encode in ("keep", format) or format == "jpeg")
    if kept and not options.min_tissue and not options.resize:
        assert format
        if options.check == "decode" and (refusal := check_data(data, header)):
            return refusal
        return ProcessedImage(data, format, header.coding, header.width, header.height, None, None)
    plain = _plain_pixels(data, header)
    if isinstance(plain, Refusal):
        return plain
    image, done = plain
    if options.min_tissue and (share := tissue_share(image)) < options.min_tissue:
        return Refusal("too little tissue", f"{100 * share:.1f} % of its pixels; --min-tissue is {options.min_tissue:g}")
    if options.resize and min(image.shape[:2]) > options.resize:
        image = _resized(image, options.resize)
        done.append("resized")

    if kept and not done:
        assert format
        return ProcessedImage(data, format, header.coding, header.width, header.height, None, None)
    encode = options.encode
    done += [f"to {encode}"] * (encode != "keep")
    return _encoded(image, "png" if encode == "keep" else encode, ", ".join(done))


def check_stored(data: bytes) -> Refusal | None:
    """Decode one image of a set in full; None if it is valid."""
    header = read_header(data)
    if isinstance(header, Refusal):
        return header
    if header.kind not in STORABLE:
        return Refusal("not plain", f"{header.kind}, which a set does not contain")
    return check_data(data, header)


def tissue_share(image: np.ndarray) -> float:
    """The share of tissue among the pixels of an (H, W, 3) uint8 RGB image, 0 to 1."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]  # min(axis=-1) would take 10 times as long
    darkest = np.minimum(np.minimum(red, green), blue)
    brightest = np.maximum(np.maximum(red, green), blue)
    return float(np.count_nonzero((darkest <= _TISSUE_LEVEL) & (brightest > _BLACK_LEVEL)) / darkest.size)


def _plain_pixels(data: bytes, header: Header) -> tuple[np.ndarray, list[str]] | Refusal:
    """An image's pixels as 8-bit RGB, (H, W, 3), upright, and the conversions that this took."""
    if not header.deviations:
        image = decode_pixels(data, header.kind)
        return image if isinstance(image, Refusal) else (image, [])
    picture = header.picture or _decode_twice(data, header)
    if isinstance(picture, Refusal):
        return picture
    if header.deep and (refusal := _unused_bits(picture.pixels)):
        return refusal
    image, opaque = _over_white(picture.pixels)
    over_white = "" if opaque else " over white"
    done = [word + over_white if word in ("LA", "RGBA") else word for word in header.deviations]
    return _upright(image, header.exif.orientation or 1), done


def _decode_twice(data: bytes, header: Header) -> DecodedImage | Refusal:
    """A JPEG or PNG by Pillow, which gives the alpha channel, if nvImageCodec agrees on the colours."""
    if refusal := too_large_for_pillow(header.width, header.height):
        return refusal
    bare = remove_spans(data, header.exif.spans)
    if header.kind == "JPEG" and (refusal := check_data(bare, header)):
        return refusal
    image = decode(bare)
    if image is None:
        return damaged(data, header.kind)
    picture = decode_with_pillow(bare, header.kind)
    if isinstance(picture, Refusal) or _agree(image, picture.pixels):
        return picture
    return Refusal("undecodable", f"a {header.kind} that two decoders read differently: {WAY_OUT}")


def _agree(image: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether RGB and RGBA pixels are equal where the latter are opaque."""
    if pixels.shape[:2] != image.shape[:2]:
        return False
    for rows in strips(*pixels.shape[:2]):
        opaque = pixels[rows, :, 3] == 255
        difference = image[rows][opaque].astype(np.int16) - pixels[rows][opaque, :3]
        if np.abs(difference).max(initial=0) > _TOLERANCE:
            return False
    return True


def _unused_bits(pixels: np.ndarray) -> Refusal | None:
    """The refusal of RGBA pixels, the upper 8 bits of 16, that show that the uppermost bits are not in use.

    A factor for each file would make some patches of a slide brighter than others, and only the user knows the one for all.
    """
    visible = pixels[..., 3:] > 0
    peak = int(pixels[..., :3].max(initial=0, where=visible))
    if peak >= _LEAST_PEAK or not visible.any():
        return None
    used = f"samples that use the lower {8 + peak.bit_length()} bits of 16, as of a 12-bit camera, would turn nearly black"
    way_out = "multiply the samples of all images by one factor (16 for a 12-bit camera) and save them again"
    return Refusal("upper bits unused", f"{used}: {way_out}")


def _over_white(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """RGBA as RGB, and whether all of it is opaque.

    Slide viewers export the area off the slide as transparent. It becomes white, as bare glass is.
    """
    image, opaque = np.empty((*pixels.shape[:2], 3), np.uint8), True
    for rows in strips(*pixels.shape[:2]):
        colour, alpha = pixels[rows, :, :3], pixels[rows, :, 3:].astype(np.uint16)
        image[rows] = (colour * alpha + 255 * (255 - alpha) + 127) // 255
        opaque = opaque and bool((alpha == 255).all())
    return image, opaque


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8: from 5 on, rows are columns."""
    turned = image.swapaxes(0, 1) if orientation >= 5 else image
    down, across = (-1 if orientation in which else 1 for which in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(turned[::down, ::across])


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """Shrink the shorter side to `side` pixels. Pillow's Lanczos filter averages over all source pixels, so nothing aliases."""
    height, width, _ = image.shape
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.LANCZOS))


def _encoded(image: np.ndarray, encode: str, done: str) -> ProcessedImage:
    """Encode pixels. No time, EXIF or ICC profile is written: the same pixels give the same bytes, and DALI ignores profiles."""
    file, picture = io.BytesIO(), PIL.Image.fromarray(image)
    height, width, _ = image.shape
    if encode == "png":
        # On patches of 224 px, levels 4 to 9 save at most 5 % of level 1's 105 kB and take 2 to 4 times as long.
        picture.save(file, "PNG", compress_level=1)
        return ProcessedImage(file.getvalue(), "png", None, width, height, done, None)
    if encode == "jpeg2000":
        picture.save(file, "JPEG2000", irreversible=False, mct=1)
        data = file.getvalue()
        assert _equal(image, decode(data)), "lossless JPEG 2000 changed a pixel"
        return ProcessedImage(data, "jpeg2000", None, width, height, done, None)
    # Full chroma, in which eosin and haematoxylin differ. Optimised Huffman tables save 4 to 12 % in 0.4 ms per patch of 224 px.
    picture.save(file, "JPEG", quality=int(encode.removeprefix("jpeg:")), subsampling=0, optimize=True)
    data = file.getvalue()
    written, frame = decode(data), read_jpeg(data)
    assert written is not None and isinstance(frame, Frame)
    return ProcessedImage(data, "jpeg", frame.coding, width, height, done, _psnr(written, image))


def _equal(image: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.array_equal(image, other)


def _psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; inf if they are equal."""
    error = np.subtract(image, reference, dtype=np.float32)
    mean_square = float(np.mean(np.square(error)))
    return 10 * float(np.log10(255**2 / mean_square)) if mean_square else float("inf")
