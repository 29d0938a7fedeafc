"""What passes the check, DALI decodes; everything else is refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sharding.checks import Refusal, Verdict, check_image, silent_decoders
from tests.helpers import encoded


def png_header(width, height):
    """A PNG whose header is right and asks for this size, with next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def jpeg_with_size(width, height):
    """A JPEG whose frame header claims this size."""
    data = bytearray(encoded(1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def changed(data, place):
    """The data with one byte flipped."""
    data = bytearray(data)
    data[place] ^= 0xFF
    return bytes(data)


def sixteen_bit():
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300).save(file, "PNG")
    return file.getvalue()


JPEG, PNG = encoded(1, size=(64, 48)), encoded(2, size=(64, 48), format="PNG")

# Name -> bytes, reason of the refusal.
ZOO = {
    "empty": (b"", "empty"),
    "text": (b"not an image at all\n" * 20, "not a JPEG or PNG"),
    "gif": (encoded(3, format="GIF"), "not a JPEG or PNG"),
    "tiff": (encoded(3, format="TIFF"), "not a JPEG or PNG"),
    "bmp": (encoded(3, format="BMP"), "not a JPEG or PNG"),
    "webp": (encoded(3, format="WEBP"), "not a JPEG or PNG"),
    "html": (b"<!DOCTYPE html><p>404 Not Found", "not a JPEG or PNG"),
    "zeros": (bytes(3000), "not a JPEG or PNG"),
    "jpeg without its last two bytes": (JPEG[:-2], "undecodable"),
    "jpeg without its last byte": (JPEG[:-1], "undecodable"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "undecodable"),
    "a jpeg's header alone": (JPEG[: JPEG.index(b"\xff\xda")], "undecodable"),
    "three bytes of a jpeg": (JPEG[:3], "undecodable"),
    "jpeg then zeros": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "undecodable"),
    "png without its last byte": (PNG[:-1], "undecodable"),
    "png without its last twelve": (PNG[:-12], "undecodable"),
    "half a png": (PNG[: len(PNG) // 2], "undecodable"),
    "a png's signature alone": (PNG[:8], "undecodable"),
    "png with a changed byte": (changed(PNG, len(PNG) // 2), "undecodable"),
    "png with a changed header": (changed(PNG, 29), "undecodable"),
    "png of too little data": (png_header(64, 64), "undecodable"),
    "png of 60,000 px": (png_header(60_000, 60_000), "too large"),
    "png of 2**31 - 1 px": (png_header(2**31 - 1, 1), "too large"),
    "jpeg of 60,000 px": (jpeg_with_size(60_000, 60_000), "too large"),
    "jpeg of 0 px": (jpeg_with_size(0, 12), "too small"),
}

# Name -> bytes, format, width, height.
GOOD = {
    "jpeg": (JPEG, "jpeg", 64, 48),
    "png": (PNG, "png", 64, 48),
    "grey jpeg": (encoded(4, mode="L"), "jpeg", 16, 12),
    "progressive jpeg": (encoded(4, progressive=True), "jpeg", 16, 12),
    "jpeg 4:4:4": (encoded(4, subsampling=0), "jpeg", 16, 12),
    "cmyk jpeg": (encoded(4, mode="CMYK"), "jpeg", 16, 12),
    "rotated jpeg": (encoded(4, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"), "jpeg", 12, 16),
    "jpeg with a tail": (JPEG + bytes(50), "jpeg", 64, 48),
    "grey png": (encoded(4, format="PNG", mode="L"), "png", 16, 12),
    "palette png": (encoded(4, format="PNG", mode="P"), "png", 16, 12),
    "rgba png": (encoded(4, format="PNG", mode="RGBA"), "png", 16, 12),
    "16-bit png": (sixteen_bit(), "png", 16, 12),
    "1x1 png": (encoded(4, format="PNG", size=(1, 1)), "png", 1, 1),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_bad_file_is_refused(name):
    data, reason = ZOO[name]
    with silent_decoders():
        refusal = check_image(data)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.reason == reason
    assert refusal.detail
    assert "0x" not in refusal.detail  # an address would differ from build to build


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_is_measured_as_displayed(name):
    data, *expected = GOOD[name]
    assert check_image(data) == Verdict(*expected)


def test_min_size_is_the_smaller_side():
    assert isinstance(check_image(JPEG, min_size=48), Verdict)
    refusal = check_image(JPEG, min_size=49)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "too small"


def damaged_files(count):
    """JPEGs and PNGs with a piece cut out, a byte changed, or the end cut off."""
    rng = np.random.default_rng(5)
    for i in range(count):
        data = bytearray(JPEG if i % 2 else PNG)
        place = int(rng.integers(2, len(data)))
        kind = i % 3
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data[place] = int(rng.integers(256))
        else:
            del data[place : place + int(rng.integers(1, 40))]
        yield bytes(data)


def dali_decodes(data):
    """Whether DALI's CPU pipeline decodes this one file, and the (height, width) that it gives."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode():
        return fn.decoders.image(fn.external_source(source=[[np.frombuffer(data, np.uint8)]]), output_type=types.RGB)

    try:
        pipeline = decode()
        pipeline.build()
        return tuple(pipeline.run()[0].at(0).shape[:2])
    except RuntimeError:
        return None


def test_whatever_passes_dali_decodes_to_the_same_size():
    """A file that passed and then killed the training would be the worst that this module can do."""
    passed = refused = 0
    with silent_decoders():
        for data in [*(good[0] for good in GOOD.values()), *damaged_files(60)]:
            verdict = check_image(data)
            if isinstance(verdict, Verdict):
                assert dali_decodes(data) == (verdict.height, verdict.width)
                passed += 1
            else:
                refused += 1
    assert passed > len(GOOD)
    assert refused > 20
