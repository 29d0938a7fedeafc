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

from sharding.images.formats import WAY_OUT, damaged, read_jpeg, remove_spans
from sharding.images.image_checks import STORABLE, Header, Refusal, decode, read_header
from sharding.images.pillow_decoder import decode_with_pillow

# A pixel is tissue if it lets at most this much light through in its darkest channel: optical density 0.15, the threshold
# beta of Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.
_TISSUE_LEVEL = int(255 * 10**-0.15)
# A pixel with every channel below a tenth of white is no tissue but a scanner's padding, or ink: stains leave a brighter channel.
_BLACK_LEVEL = 25

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
    if options.check == "header" and not header.deviations:
        return ProcessedImage(data, STORABLE[header.kind], header.coding, header.width, header.height, None, None)
    plain = _plain_pixels(data, header)
    if isinstance(plain, Refusal):
        return plain
    image, done = plain
    if options.min_tissue and (share := tissue_share(image)) < options.min_tissue:
        return Refusal("too little tissue", f"{100 * share:.1f} % of its pixels; --min-tissue is {options.min_tissue:g}")
    if options.resize and min(image.shape[:2]) > options.resize:
        image = _resized(image, options.resize)
        done.append("resized")

    height, width, _ = image.shape
    encode, format = options.encode, STORABLE.get(header.kind)
    if not done and format and (encode in ("keep", format) or format == "jpeg"):
        return ProcessedImage(data, format, header.coding, width, height, None, None)
    done += [f"to {encode}"] * (encode != "keep")
    return _encoded(image, "png" if encode == "keep" else encode, ", ".join(done))


def check_stored(data: bytes) -> Refusal | None:
    """Decode one image of a set in full; None if it is valid."""
    header = read_header(data)
    if isinstance(header, Refusal):
        return header
    if header.kind not in STORABLE:
        return Refusal("not plain", f"{header.kind}, which a set does not contain")
    return damaged(data, header.kind) if decode(data) is None else None


def tissue_share(image: np.ndarray) -> float:
    """The share of tissue among the pixels of an (H, W, 3) uint8 RGB image, 0 to 1."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]  # min(axis=-1) would take 10 times as long
    darkest = np.minimum(np.minimum(red, green), blue)
    brightest = np.maximum(np.maximum(red, green), blue)
    return float(np.count_nonzero((darkest <= _TISSUE_LEVEL) & (brightest > _BLACK_LEVEL)) / darkest.size)


def _plain_pixels(data: bytes, header: Header) -> tuple[np.ndarray, list[str]] | Refusal:
    """An image's pixels as 8-bit RGB, (H, W, 3), upright, and the conversions that this took."""
    picture = header.picture
    if picture is None or not header.deviations:
        bare = remove_spans(data, header.exif.spans) if header.exif.spans else data
        image = decode(bare)
        if image is None:
            return damaged(data, header.kind)
        if not header.deviations:
            return image, []
        # Pillow gives the alpha channel, and must agree on the colours.
        second = decode_with_pillow(bare, header.kind)
        if isinstance(second, Refusal):
            return second
        if not _agree(image, second.pixels):
            return Refusal("undecodable", f"a {header.kind} that two decoders read differently: {WAY_OUT}")
        picture = second
    colour, alpha = picture.pixels[..., :3], picture.pixels[..., 3:].astype(np.uint16)
    # Slide viewers export the area off the slide as transparent. It becomes white, as bare glass is.
    image = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    over_white = "" if (alpha == 255).all() else " over white"
    done = [word + over_white if word in ("LA", "RGBA") else word for word in header.deviations]
    return _upright(image, header.exif.orientation or 1), done


def _agree(image: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether RGB and RGBA pixels are equal where the latter are opaque."""
    opaque = pixels[..., 3] == 255
    if opaque.shape != image.shape[:2]:
        return False
    return int(np.abs(image[opaque].astype(np.int16) - pixels[opaque, :3]).max(initial=0)) <= _TOLERANCE


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
    assert written is not None and frame is not None
    return ProcessedImage(data, "jpeg", frame.coding, width, height, done, _psnr(written, image))


def _equal(image: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.array_equal(image, other)


def _psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; inf if they are equal."""
    error = np.subtract(image, reference, dtype=np.float32)
    mean_square = float(np.mean(np.square(error)))
    return 10 * float(np.log10(255**2 / mean_square)) if mean_square else float("inf")
