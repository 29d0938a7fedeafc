"""Every readable kind of image becomes a plain one with the right pixels, which DALI decodes; no bytes raise anything."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sharding.drawn_patches.patches import draw_patch
from sharding.images.image_checks import Refusal, read_header, silent_decoders
from sharding.images.image_processing import ImageOptions, ProcessedImage, check_stored, process_image, tissue_share
from sharding.images.pillow_decoder import decode_with_pillow
from tests.helpers import encoded

KEEP = ImageOptions()


def smooth(mode="RGBA", *, size=(64, 48)):
    """An image with every alpha from 0 to 255, that survives JPEG."""
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 4), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")


def saved(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def oriented(number):
    exif = Image.Exif()
    exif[0x112] = number
    return exif


def opaque():
    image = smooth()
    image.putalpha(255)
    return image


def png_of(samples, colour, *, order=">u2"):
    """A PNG of 16 bits, which Pillow does not write in colour. samples: (H, W, channels)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(order).tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP = np.random.default_rng(4).integers(0, 2**16, (12, 16, 4), np.uint16)
GREY16 = Image.fromarray(DEEP[..., 0])
PALETTE = smooth("RGB").quantize(16)


def tiff16(planar=1, samples=DEEP):
    """A TIFF of 16-bit RGB, which Pillow does not write: one strip, chunky."""
    samples = samples[..., :3].astype("<u2").tobytes()
    tags = [(256, 16), (257, 12), (259, 1), (262, 2), (273, 8), (277, 3), (278, 12), (279, len(samples)), (284, planar)]
    entries = sorted([*((tag, 4, 1, value) for tag, value in tags), (258, 3, 3, 8 + len(samples) + 2 + 10 * 12 + 4)])
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + directory + struct.pack("<HHH", 16, 16, 16)


# Name -> bytes, what is noted. What it should look like is Pillow's business, but for 16 bits.
CONVERTED = {
    "grey jpeg": (saved(smooth("L"), "JPEG"), "grey"),
    "cmyk jpeg": (saved(smooth("CMYK"), "JPEG"), "CMYK"),
    "progressive cmyk jpeg": (saved(smooth("CMYK"), "JPEG", progressive=True), "CMYK"),
    "rgb jpeg": (saved(smooth("RGB"), "JPEG", keep_rgb=True), "JPEG of RGB"),
    "rotated cmyk jpeg": (saved(smooth("CMYK"), "JPEG", exif=oriented(8)), "CMYK, rotated by EXIF"),
    "grey png": (saved(smooth("L"), "PNG"), "grey"),
    "1-bit png": (saved(smooth("1"), "PNG"), "grey"),
    "palette png": (saved(PALETTE, "PNG"), "palette"),
    "palette png with a transparent colour": (saved(PALETTE, "PNG", transparency=3), "palette, RGBA over white"),
    "palette png with alphas": (saved(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))), "palette, RGBA over white"),
    "grey png with a transparent level": (saved(smooth("L"), "PNG", transparency=130), "LA over white"),
    "rgb png with a transparent colour": (
        saved(smooth("RGB"), "PNG", transparency=smooth("RGB").getpixel((5, 5))),
        "RGBA over white",
    ),
    "grey and alpha png": (saved(smooth("LA"), "PNG"), "LA over white"),
    "rgba png": (saved(smooth(), "PNG"), "RGBA over white"),
    "opaque rgba png": (saved(opaque(), "PNG"), "RGBA"),
    "rotated rgba png": (saved(smooth(), "PNG", exif=oriented(5)), "RGBA over white, rotated by EXIF"),
    "tiff": (saved(smooth("RGB"), "TIFF"), "TIFF"),
    "compressed tiff": (saved(smooth("RGB"), "TIFF", compression="tiff_lzw"), "TIFF"),
    "jpeg in tiff": (saved(smooth("RGB"), "TIFF", compression="jpeg"), "TIFF"),
    "grey tiff": (saved(smooth("L"), "TIFF"), "TIFF, grey"),
    "fax tiff": (saved(smooth("1"), "TIFF", compression="group4"), "TIFF, grey"),
    "palette tiff": (saved(PALETTE, "TIFF"), "TIFF, palette"),
    "cmyk tiff": (saved(smooth("CMYK"), "TIFF"), "TIFF, CMYK"),
    "rgba tiff": (saved(smooth(), "TIFF"), "TIFF, RGBA over white"),
    "grey and alpha tiff": (saved(smooth("LA"), "TIFF"), "TIFF, LA over white"),
    "rotated tiff": (saved(smooth("RGB"), "TIFF", exif=oriented(6)), "TIFF, rotated by EXIF"),
    "bmp": (saved(smooth("RGB"), "BMP"), "BMP"),
    "palette bmp": (saved(PALETTE, "BMP"), "BMP, palette"),
    "webp": (saved(smooth("RGB"), "WEBP"), "WebP"),
    "lossless webp": (saved(smooth("RGB"), "WEBP", lossless=True), "WebP"),
    "rgba webp": (saved(smooth(), "WEBP", lossless=True), "WebP, RGBA over white"),
    "rotated webp": (saved(smooth("RGB"), "WEBP", exif=oriented(3)), "WebP, rotated by EXIF"),
    "pnm": (saved(smooth("RGB"), "PPM"), "PNM"),
    "grey pnm": (saved(smooth("L"), "PPM"), "PNM, grey"),
    "grey jpeg 2000": (saved(smooth("L"), "JPEG2000"), "JPEG 2000, grey"),
    "rgba jpeg 2000": (saved(smooth(), "JPEG2000"), "JPEG 2000, RGBA over white"),
    "sYCC jpeg 2000": (saved(smooth("YCbCr"), "JPEG2000"), "JPEG 2000"),
    "jpeg 2000 codestream": (saved(smooth("RGB"), "JPEG2000", no_jp2=True), "JPEG 2000 codestream"),
}
# Name -> bytes, what is noted, the samples of 16 bits.
DEEPER = {
    "grey png": (saved(GREY16, "PNG"), "16-bit, grey", DEEP[..., [0, 0, 0]]),
    "rgb png": (png_of(DEEP[..., :3], 2), "16-bit", DEEP[..., :3]),
    "grey tiff": (saved(GREY16, "TIFF"), "TIFF, 16-bit, grey", DEEP[..., [0, 0, 0]]),
    "compressed grey tiff": (saved(GREY16, "TIFF", compression="tiff_lzw"), "TIFF, 16-bit, grey", DEEP[..., [0, 0, 0]]),
    "rgb tiff": (tiff16(), "TIFF, 16-bit", DEEP[..., :3]),
    "grey jpeg 2000": (saved(GREY16, "JPEG2000"), "JPEG 2000, 16-bit, grey", DEEP[..., [0, 0, 0]]),
}
# Name -> bytes, format, coding. All of 64 x 48 px.
PLAIN = {
    "jpeg": (encoded(1, size=(64, 48)), "jpeg", "baseline 4:2:0"),
    "progressive jpeg": (encoded(1, size=(64, 48), progressive=True), "jpeg", "progressive 4:2:0"),
    "jpeg 4:4:4": (encoded(1, size=(64, 48), subsampling=0), "jpeg", "baseline 4:4:4"),
    "jpeg with a tail": (encoded(1, size=(64, 48)) + bytes(50), "jpeg", "baseline 4:2:0"),
    "upright jpeg": (encoded(1, size=(64, 48), exif=oriented(1)), "jpeg", "baseline 4:2:0"),
    "png": (encoded(2, size=(64, 48), format="PNG"), "png", None),
    "upright png": (encoded(2, size=(64, 48), format="PNG", exif=oriented(1)), "png", None),
    "jpeg 2000": (encoded(3, size=(64, 48), format="JPEG2000"), "jpeg2000", None),
    "lossy jpeg 2000": (
        saved(smooth("RGB"), "JPEG2000", irreversible=True, quality_layers=[20]),
        "jpeg2000",
        None,
    ),
}


def by_pillow(data):
    """(H, W, 3): what the image looks like on a white page."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def by_dali(data):
    """(H, W, 3) by DALI's CPU pipeline."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decoding():
        return fn.decoders.image(fn.external_source(source=[[np.frombuffer(data, np.uint8)]]), output_type=types.RGB)

    pipeline = decoding()
    pipeline.build()
    return np.array(pipeline.run()[0].at(0))


@pytest.mark.parametrize("name", CONVERTED)
def test_a_kind_that_a_set_does_not_hold_is_converted(name):
    data, note = CONVERTED[name]
    stored = process_image(data, KEEP)
    assert stored[1:3] == ("png", None)
    assert stored.converted == note
    assert stored.psnr is None
    expected, found = by_pillow(data), by_pillow(stored.data)
    assert found.shape == expected.shape == (stored.height, stored.width, 3)
    assert np.array_equal(found, expected)
    assert read_header(stored.data).deviations == ()


@pytest.mark.parametrize("name", DEEPER)
def test_of_16_bits_the_upper_8_are_kept(name):
    """As DALI does it with a PNG: never more than a level from v / 257, and 257 k is k."""
    data, note, samples = DEEPER[name]
    stored = process_image(data, KEEP)
    assert stored.converted == note
    assert np.array_equal(by_pillow(stored.data), samples >> 8)


def test_16_bits_with_alpha():
    stored = process_image(png_of(DEEP, 6), KEEP)
    assert stored.converted == "16-bit, RGBA over white"
    alpha = DEEP[..., 3:] / 65535
    expected = DEEP[..., :3] / 257 * alpha + 255 * (1 - alpha)
    assert np.abs(by_pillow(stored.data) - expected).max() < 2


def test_16_bits_with_a_transparent_colour():
    """Pillow would compare the colour's 16 bits with the pixels' 8."""
    data = png_of(DEEP[..., :3], 2)
    body = b"tRNS" + DEEP[0, 0, :3].astype(">u2").tobytes()
    refusal = process_image(data[:33] + struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body)) + data[33:], KEEP)
    assert refusal.reason == "undecodable" and "transparent colour" in refusal.detail


def of_camera(bits, *, brightest=1.0):
    """RGBA samples of 16 bits as a camera of fewer bits gives them: white is 2**bits - 1."""
    samples = np.random.default_rng(6).integers(0, int(brightest * (2**bits - 1)), (12, 16, 4), endpoint=True)
    samples[0, 0] = int(brightest * (2**bits - 1))
    samples[..., 3] = 2**16 - 1
    return samples.astype(np.uint16)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize(
    "as_file",
    [
        lambda samples: png_of(samples[..., :3], 2),
        lambda samples: png_of(samples, 6),
        lambda samples: png_of(samples[..., :1], 0),
        lambda samples: saved(Image.fromarray(samples[..., 0]), "TIFF"),
        lambda samples: tiff16(samples=samples),
        lambda samples: saved(Image.fromarray(samples[..., 0]), "JPEG2000"),
    ],
    ids=["rgb png", "rgba png", "grey png", "grey tiff", "rgb tiff", "grey jpeg 2000"],
)
def test_data_of_fewer_bits_in_16_are_refused(bits, as_file):
    """They would turn black: of 12 bits, the upper 8 of 16 hold 4. The right factor is the same for all, and no file knows it."""
    for options in (KEEP, ImageOptions(check="header"), ImageOptions(encode="jpeg:95")):
        refusal = process_image(as_file(of_camera(bits)), options)
        assert refusal.reason == "upper bits unused"
        assert f"the lower {bits} bits of 16" in refusal.detail and "by one factor" in refusal.detail
    assert isinstance(process_image(as_file(of_camera(16)), KEEP), ProcessedImage)
    assert isinstance(process_image(as_file(of_camera(16, brightest=0.3)), KEEP), ProcessedImage)


def test_dark_images_of_8_bits_and_transparent_ones_of_16_are_packed():
    assert isinstance(process_image(saved(Image.new("RGB", (16, 12), (3, 2, 1)), "TIFF"), KEEP), ProcessedImage)
    clear = of_camera(12)
    clear[..., 3] = 0
    assert process_image(png_of(clear, 6), KEEP).converted == "16-bit, RGBA over white"


@pytest.mark.parametrize(("levels", "kept"), [(2, True), (3, False)])
def test_two_decoders_must_agree(monkeypatch, levels, kept):
    def off(data, kind):
        picture = decode_with_pillow(data, kind)
        pixels = picture.pixels.copy()
        pixels[7, 5, 1] ^= levels  # of the last bits: up or down
        return picture._replace(pixels=pixels)

    data = saved(Image.new("L", (16, 12), 128), "PNG")
    monkeypatch.setattr("sharding.images.image_processing.decode_with_pillow", off)
    assert isinstance(process_image(data, KEEP), ProcessedImage) == kept


def test_a_deep_tiff_that_pillow_would_misread_is_refused():
    grey, entry = saved(GREY16, "TIFF"), struct.pack("<HHI", 262, 3, 1)
    white_is_zero = grey.replace(entry + b"\1", entry + b"\0")
    assert white_is_zero != grey
    for data in (white_is_zero, tiff16(planar=2)):
        refusal = process_image(data, KEEP)
        assert refusal.reason == "undecodable" and "not read reliably" in refusal.detail


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("options", [KEEP, ImageOptions(check="header")])
def test_a_plain_file_is_stored_byte_for_byte(name, options):
    data, format, coding = PLAIN[name]
    assert process_image(data, options) == ProcessedImage(data, format, coding, 64, 48, None, None)
    assert check_stored(data) is None


@pytest.mark.parametrize("name", ["grey jpeg", "rotated tiff", "rgba png"])
def test_check_header_still_converts(name):
    assert process_image(CONVERTED[name][0], ImageOptions(check="header")) == process_image(CONVERTED[name][0], KEEP)


def test_check_header_believes_the_data():
    data = bytearray(PLAIN["png"][0])
    data[len(data) // 2] ^= 0xFF
    with silent_decoders():
        assert process_image(bytes(data), ImageOptions(check="header")).converted is None
        assert process_image(bytes(data), KEEP).reason == "undecodable"
        cut = bytes(PLAIN["jpeg"][0][:-2])
        assert process_image(cut, ImageOptions(check="header")).reason == "undecodable"


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation(format, number):
    data = saved(smooth("RGB"), format, exif=oriented(number))
    stored = process_image(data, KEEP)
    assert np.array_equal(by_pillow(stored.data), by_pillow(data))
    assert ("rotated by EXIF" in (stored.converted or "")) == (number != 1)


@pytest.mark.parametrize("encode", ["keep", "png", "jpeg:90", "jpeg2000"])
def test_what_dali_decodes_is_what_was_stored(encode):
    """A file that passed and then killed the training, or looked different there, would be the worst that can happen here."""
    kinds = {**CONVERTED, **DEEPER, **PLAIN} if encode == "keep" else {name: PLAIN[name] for name in ("jpeg", "png", "jpeg 2000")}
    with silent_decoders():
        for name, (data, *_) in kinds.items():
            stored = process_image(data, ImageOptions(encode=encode))
            assert np.array_equal(by_dali(stored.data), by_pillow(stored.data)), name
            assert by_dali(stored.data).shape == (stored.height, stored.width, 3)


def test_whatever_passes_dali_decodes_to_the_same_size():
    passed = refused = 0
    rng = np.random.default_rng(5)
    sources = [PLAIN[name][0] for name in ("jpeg", "png", "jpeg 2000")]
    with silent_decoders():
        for i in range(75):
            stored = process_image(damage(sources[i % 3], rng), KEEP)
            if isinstance(stored, ProcessedImage):
                assert by_dali(stored.data).shape == (stored.height, stored.width, 3)
                passed += 1
            else:
                refused += 1
    assert passed > 8
    assert refused > 20


def damage(data, rng):
    """A piece cut out, a byte changed, or the end cut off."""
    data = bytearray(data)
    place, kind = int(rng.integers(2, len(data))), rng.integers(3)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] = int(rng.integers(256))
    else:
        del data[place : place + int(rng.integers(1, 40))]
    return bytes(data)


# Encoding

PATCH = draw_patch("breast", "invasive", index=1, slide=1, size=96, seed=7)
PATCH_PNG = saved(Image.fromarray(PATCH), "PNG")


def test_png_and_jpeg_2000_are_lossless():
    for encode, format in (("png", "png"), ("jpeg2000", "jpeg2000")):
        stored = process_image(saved(Image.fromarray(PATCH), "TIFF"), ImageOptions(encode=encode))
        assert stored[1:] == (format, None, 96, 96, f"TIFF, to {encode}", None)
        assert np.array_equal(by_dali(stored.data), PATCH)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 31, 33, 64])
def test_jpeg_2000_of_any_size(side):
    pixels = np.random.default_rng(side).integers(0, 256, (side, 2 * side + 1, 3), np.uint8)
    stored = process_image(saved(Image.fromarray(pixels), "PNG"), ImageOptions(encode="jpeg2000"))
    with silent_decoders():
        assert np.array_equal(by_dali(stored.data), pixels)


def test_jpeg_has_full_chroma_and_says_what_it_lost():
    worse, better = (process_image(PATCH_PNG, ImageOptions(encode=f"jpeg:{quality}")) for quality in (50, 95))
    assert better[1:6] == ("jpeg", "baseline 4:4:4", 96, 96, "to jpeg:95")
    error = by_dali(better.data).astype(float) - PATCH
    assert better.psnr == pytest.approx(10 * np.log10(255**2 / np.mean(error**2)), rel=1e-6)
    assert worse.psnr < better.psnr < 60
    assert len(worse.data) < len(better.data) < len(PATCH_PNG)


def test_jpeg_of_one_colour_loses_nothing():
    stored = process_image(saved(Image.new("RGB", (16, 16), (128, 128, 128)), "PNG"), ImageOptions(encode="jpeg:95"))
    assert stored.psnr == float("inf")


@pytest.mark.parametrize(
    ("encode", "kept"),
    [("keep", "jpeg png jpeg2000"), ("png", "jpeg png"), ("jpeg:95", "jpeg"), ("jpeg2000", "jpeg jpeg2000")],
)
def test_what_is_encoded_already_is_not_encoded_again(encode, kept):
    for name in ("jpeg", "progressive jpeg", "png", "jpeg 2000"):
        data, format, _ = PLAIN[name]
        stored = process_image(data, ImageOptions(encode=encode))
        assert (stored.data == data) == (stored.converted is None) == (format in kept.split())


def test_encoding_carries_nothing_over_and_is_the_same_again():
    """A profile or EXIF data would be in the bytes, and DALI would not heed the one and apply the other."""
    data = saved(Image.fromarray(PATCH), "TIFF", icc_profile=b"profile" * 50, exif=oriented(1), dpi=(300, 300))
    for encode in ("keep", "png", "jpeg:90", "jpeg2000"):
        stored = process_image(data, ImageOptions(encode=encode))
        assert stored == process_image(data, ImageOptions(encode=encode))
        assert stored.data == process_image(saved(Image.fromarray(PATCH), "BMP"), ImageOptions(encode=encode)).data
        assert b"profile" not in stored.data


# Sizes


@pytest.mark.parametrize(
    ("size", "resize", "expected"), [((64, 48), 24, (32, 24)), ((48, 64), 24, (24, 32)), ((65, 49), 10, (13, 10))]
)
def test_the_shorter_side_is_resized(size, resize, expected):
    stored = process_image(saved(smooth("RGB", size=size), "PNG"), ImageOptions(encode="png", resize=resize))
    assert (stored.width, stored.height) == expected
    assert stored.converted == "resized, to png"


def test_resizing_averages():
    """Every second pixel black and white becomes grey, not a pattern."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    pixels = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    stored = process_image(saved(Image.fromarray(pixels), "PNG"), ImageOptions(encode="png", resize=16))
    inner = by_pillow(stored.data)[4:-4, 4:-4]
    assert np.abs(inner.astype(int) - 127).max() < 10


def test_nothing_is_enlarged():
    data = PLAIN["jpeg"][0]
    for resize in (48, 400):
        assert process_image(data, ImageOptions(encode="png", resize=resize)).data == data


def test_a_jpeg_that_is_resized_is_encoded():
    stored = process_image(PLAIN["jpeg"][0], ImageOptions(encode="jpeg2000", resize=24))
    assert (stored.format, stored.converted) == ("jpeg2000", "resized, to jpeg2000")


def test_min_size_is_the_smaller_side():
    assert isinstance(process_image(PLAIN["jpeg"][0], ImageOptions(min_size=48)), ProcessedImage)
    for name in ("jpeg", "png", "jpeg 2000"):
        refusal = process_image(PLAIN[name][0], ImageOptions(min_size=49))
        assert refusal.reason == "too small" and "--min-size is 49" in refusal.detail


def test_min_size_means_the_source():
    assert isinstance(process_image(PLAIN["png"][0], ImageOptions(min_size=48, encode="png", resize=10)), ProcessedImage)


# Tissue


@pytest.mark.parametrize(
    ("colour", "tissue"),
    [
        ((255, 255, 255), 0),  # glass
        ((240, 236, 243), 0),
        ((181, 220, 220), 0),
        ((180, 220, 220), 1),  # optical density 0.15 in one channel
        ((120, 60, 140), 1),  # haematoxylin
        ((230, 140, 180), 1),  # eosin
        ((26, 10, 10), 1),
        ((25, 25, 25), 0),  # what a scanner fills in
        ((0, 0, 0), 0),
    ],
)
def test_what_tissue_is(colour, tissue):
    assert tissue_share(np.full((4, 5, 3), colour, np.uint8)) == tissue


def test_tissue_is_a_share_of_the_pixels():
    pixels = np.full((10, 10, 3), 245, np.uint8)
    pixels[:3] = (150, 80, 160)
    data = saved(Image.fromarray(pixels), "PNG")
    assert tissue_share(pixels) == pytest.approx(0.3)
    assert isinstance(process_image(data, ImageOptions(min_tissue=0.3)), ProcessedImage)
    refusal = process_image(data, ImageOptions(min_tissue=0.31))
    assert refusal.reason == "too little tissue"
    assert "30.0 %" in refusal.detail and "0.31" in refusal.detail


def test_what_is_transparent_is_no_tissue():
    stained = Image.new("RGBA", (10, 10), (150, 80, 160, 255))
    clear = Image.new("RGBA", (10, 10), (150, 80, 160, 0))
    assert isinstance(process_image(saved(stained, "PNG"), ImageOptions(min_tissue=0.9)), ProcessedImage)
    assert process_image(saved(clear, "PNG"), ImageOptions(min_tissue=0.1)).reason == "too little tissue"


def test_drawn_patches_are_tissue():
    assert tissue_share(PATCH) > 0.5


# What a user asks for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"encode": "jpg"}, "--encode jpg"),
        ({"encode": "jpeg"}, "--encode jpeg "),
        ({"encode": "jpeg:0"}, "--encode jpeg:0"),
        ({"encode": "jpeg:101"}, "from 1 to 100"),
        ({"encode": "jpeg:095"}, "--encode"),
        ({"check": "none"}, "--check none"),
        ({"min_size": 0}, "--min-size 0"),
        ({"min_tissue": 1.5}, "--min-tissue 1.5"),
        ({"min_tissue": float("nan")}, "--min-tissue nan"),
        ({"resize": 0, "encode": "png"}, "--resize 0"),
        ({"resize": 100}, "--encode png or jpeg:95"),
        ({"check": "header", "encode": "jpeg:95"}, "--encode jpeg:95"),
        ({"check": "header", "min_tissue": 0.1}, "--min-tissue"),
        ({"check": "header", "encode": "png", "resize": 100}, "--check header"),
    ],
)
def test_what_cannot_be_meant(arguments, words):
    with pytest.raises(ValueError, match="--") as error:
        ImageOptions(**arguments)
    assert words in str(error.value)


def test_a_treatment_travels_to_a_worker():
    options = ImageOptions(encode="jpeg:100", min_size=3, min_tissue=1, resize=9)
    assert pickle.loads(pickle.dumps(options)) == options


# No bytes raise anything

SOURCES = [data for data, *_ in (*CONVERTED.values(), *DEEPER.values(), *PLAIN.values())]
TREATMENTS = [
    KEEP,
    ImageOptions(check="header"),
    ImageOptions(encode="jpeg:80", min_tissue=0.01),
    ImageOptions(encode="png", resize=20),
]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 4),  # set a byte, set a length, cut out, double, cut off
        st.one_of(st.integers(0, 60), st.integers(0, 700), st.integers(0, 10_000)),
        st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFE, 0xFF]), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=3,
)


def edited(data, edits):
    data = bytearray(data)
    for kind, place, value in edits:
        place %= max(len(data), 1)
        if kind == 0:
            data[place : place + 1] = [value]
        elif kind == 1:
            data[place : place + 4] = bytes([value]) * 4
        elif kind == 2:
            del data[place : place + value]
        elif kind == 3:
            data[place:place] = data[place : place + value]
        else:
            del data[place:]
    if data.startswith(b"\x89PNG"):  # or every change ends at a checksum
        mend(data)
    return bytes(data)


def mend(data):
    """Make a PNG's checksums right."""
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        data[end : end + 4] = (
            zlib.crc32(data[place + 4 : end]).to_bytes(4, "big") if end + 4 <= len(data) else data[end : end + 4]
        )
        place = end + 4


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SOURCES), EDITS, st.sampled_from(TREATMENTS))
def test_nothing_is_raised_for_any_bytes(source, edits, options):
    with silent_decoders():
        stored = process_image(edited(source, edits), options)
        if isinstance(stored, Refusal):
            assert stored.reason in (
                "empty",
                "not an image",
                "undecodable",
                "too large",
                "too complex",
                "upper bits unused",
                "several images",
                "too small",
                "too little tissue",
            )
        else:
            assert read_header(stored.data).deviations == ()
            if options.check == "decode":
                assert check_stored(stored.data) is None


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([b"", *(source[:16] for source in SOURCES)]), st.binary(max_size=200))
def test_nothing_is_raised_for_a_good_beginning(begin, rest):
    with silent_decoders():
        assert isinstance(process_image(begin + rest, KEEP), Refusal | ProcessedImage)
