"""Image files that a stranger sends: packed as what training decodes to the same pixels, or refused, never a crash or a hang."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from pipelines.torchvision_reference import decode as decode_by_pillow
from sharding.images.formats import Refusal
from sharding.images.image_checks import decode, read_header, silent_decoders
from sharding.images.image_processing import ImageOptions, process_image
from tests.fuzz.child import outcome_of
from tests.fuzz.conftest import PROFILE
from tests.helpers import encoded
from tests.sharding.images.test_image_checks import KINDS, mutated
from tests.sharding.images.test_image_processing import mend

FORMATS = KINDS | {
    "WebP": {"format": "WEBP"},
    "lossless WebP": {"format": "WEBP", "lossless": True},
    "TIFF": {"format": "TIFF"},
    "TIFF with LZW": {"format": "TIFF", "compression": "tiff_lzw"},
    "TIFF with JPEG": {"format": "TIFF", "compression": "jpeg"},
    "TIFF with Deflate": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
    "BMP": {"format": "BMP"},
    "PNM": {"format": "PPM"},
    "grey PNG": {"format": "PNG", "mode": "L"},
    "PNG with a palette": {"format": "PNG", "mode": "P"},
    "PNG with alpha": {"format": "PNG", "mode": "RGBA"},
    "CMYK JPEG": {"mode": "CMYK"},
}
OPTIONS = [
    ImageOptions(),
    ImageOptions(encode="jpeg:80", min_tissue=0.01),
    ImageOptions(encode="png", resize=20),
    ImageOptions(encode="jpeg2000"),
]
AT_ONCE = 50  # images in one process


def pack(kind: str, options: ImageOptions, seed: int) -> None:
    """Change an image AT_ONCE times, at one to three places, and pack each."""
    rng = np.random.default_rng(seed)
    whole = encoded(seed % 5, size=(int(rng.integers(1, 80)), int(rng.integers(1, 80))), **FORMATS[kind])
    with silent_decoders():
        for _ in range(AT_ONCE):
            data = whole
            for _ in range(rng.integers(1, 4)):
                data = mutated(data, rng) if len(data) > 2 else data
            if data.startswith(b"\x89PNG") and rng.integers(2):  # or every change ends at a checksum
                changed = bytearray(data)
                mend(changed)
                data = bytes(changed)
            stored = process_image(data, options)
            if isinstance(stored, Refusal):
                assert stored.reason and "\n" not in stored.detail, stored
                continue
            header = read_header(stored.data)
            image = decode(stored.data)
            assert not isinstance(header, Refusal) and header.deviations == (), header
            assert image is not None and image.shape == (stored.height, stored.width, 3), (stored.height, stored.width)
            if stored.format == "png":
                assert np.array_equal(decode_by_pillow(np.frombuffer(stored.data, np.uint8)).permute(1, 2, 0).numpy(), image)


@PROFILE
@hypothesis.given(st.sampled_from(list(FORMATS)), st.sampled_from(OPTIONS), st.integers(0, 2**32 - 1))
def test_any_bytes_of_an_image(kind, options, seed):
    """By `make fuzz` with FUZZ_EXAMPLES=20000, a million images."""
    assert outcome_of(lambda: pack(kind, options, seed)).error is None
