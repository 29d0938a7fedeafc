"""What passes the check can be decoded; everything else is refused, with a reason, and ends no process."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from sharding.images.formats import png_chunks, read_jpeg, webp_size
from sharding.images.image_checks import Header, Refusal, decode, decode_pixels, read_header, silent_decoders
from sharding.images.image_processing import ImageOptions, check_stored, process_image
from sharding.limits import MAX_PIXELS
from tests.helpers import ROOT, encoded
from tests.sharding.images.image_files import flat_jpeg, png, png_chunk


def png_header(width, height):
    """A PNG whose header is right and asks for this size, with next to no data."""
    return png(width, height, png_chunk(b"IDAT", zlib.compress(bytes(64))))


def jpeg_with(data, *, size=None, bits=8, marker=0xC0):
    """The JPEG with another frame header."""
    data, frame = bytearray(data), data.index(b"\xff\xc0")
    data[frame + 1], data[frame + 4] = marker, bits
    if size:
        data[frame + 5 : frame + 9] = struct.pack(">HH", size[1], size[0])
    return bytes(data)


def changed(data, place, value=None):
    """The data with one byte set, or flipped."""
    data = bytearray(data)
    data[place] = data[place] ^ 0xFF if value is None else value
    return bytes(data)


def claiming(data, place, size):
    """The data with a four-byte size, most significant first."""
    return data[:place] + struct.pack(">I", size) + data[place + 4 :]


def several(format):
    """Two images in one file."""
    images = [Image.fromarray(np.full((12, 16, 3), level, np.uint8)) for level in (40, 200)]
    file = io.BytesIO()
    images[0].save(file, format, save_all=True, append_images=images[1:])
    return file.getvalue()


def of_floats():
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 192, dtype=np.float32).reshape(12, 16)).save(file, "TIFF")
    return file.getvalue()


JPEG, PNG = encoded(1, size=(64, 48)), encoded(2, size=(64, 48), format="PNG")
JP2 = encoded(3, size=(64, 48), format="JPEG2000")
CODESTREAM = encoded(3, size=(64, 48), format="JPEG2000", no_jp2=True)
TIFF = encoded(4, size=(64, 48), format="TIFF")
ZIPPED_TIFF = encoded(4, size=(64, 48), format="TIFF", compression="tiff_adobe_deflate", tiffinfo={274: 6})
WEBP = encoded(5, size=(64, 48), format="WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
BMP = encoded(6, size=(64, 48), format="BMP")
PNM = encoded(6, size=(64, 48), format="PPM")
SIZ, TILES = JP2.index(b"\xff\x51"), 22  # a codestream's size segment, and the tiles' width in it

# Name -> bytes, reason of the refusal.
ZOO = {
    "empty": (b"", "empty"),
    "one byte": (b"\xff", "not an image"),
    "text": (b"not an image at all\n" * 20, "not an image"),
    "html": (b"<!DOCTYPE html><p>404 Not Found", "not an image"),
    "zeros": (bytes(3000), "not an image"),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
    "film": (b"\0\0\0\x18ftypmp42" + bytes(20), "not an image"),
    "gif": (encoded(3, format="GIF"), "undecodable"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(40), "undecodable"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "undecodable"),
    "jpeg xl": (b"\xff\x0a" + bytes(40), "undecodable"),
    "jpeg without its last two bytes": (JPEG[:-2], "undecodable"),
    "jpeg without its last byte": (JPEG[:-1], "undecodable"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "undecodable"),
    "a jpeg's header alone": (JPEG[: JPEG.index(b"\xff\xda")], "undecodable"),
    "a jpeg whose scan is a marker alone": (JPEG[: JPEG.index(b"\xff\xda") + 2] + b"\xff\xd9", "undecodable"),
    "three bytes of a jpeg": (JPEG[:3], "undecodable"),
    "jpeg then zeros": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "undecodable"),
    "that with a thumbnail's end": (
        JPEG[:2] + b"\xff\xe2\0\x04\xff\xd9" + JPEG[2 : len(JPEG) // 2] + bytes(len(JPEG) // 2),
        "undecodable",
    ),
    "jpeg of 12 bits": (jpeg_with(JPEG, bits=12, marker=0xC1), "undecodable"),
    "lossless jpeg": (jpeg_with(JPEG, marker=0xC3), "undecodable"),
    "jpeg of 60,000 px": (jpeg_with(JPEG, size=(60_000, 60_000)), "too large"),
    "jpeg of more than 2**26 px": (jpeg_with(JPEG, size=(16_000, 16_000)), "too large"),
    "jpeg of 0 px": (jpeg_with(JPEG, size=(0, 12)), "too small"),
    "png without its last byte": (PNG[:-1], "undecodable"),
    "png without its last twelve": (PNG[:-12], "undecodable"),
    "half a png": (PNG[: len(PNG) // 2], "undecodable"),
    "a png's signature alone": (PNG[:8], "undecodable"),
    "png with a changed byte": (changed(PNG, len(PNG) // 2), "undecodable"),
    "png with a changed header": (changed(PNG, 29), "undecodable"),
    "png of too little data": (png_header(64, 64), "undecodable"),
    "png with a chunk of 4 GB": (claiming(PNG, 33, 2**32 - 1), "undecodable"),
    "png with an end of 4 GB": (claiming(PNG, len(PNG) - 12, 2**32 - 1), "undecodable"),
    "png of 60,000 px": (png_header(60_000, 60_000), "too large"),
    "png of 2**31 - 1 px": (png_header(2**31 - 1, 1), "too large"),
    "animated png": (several("PNG"), "several images"),
    "animated webp": (several("WEBP"), "several images"),
    "tiff of two pages": (several("TIFF"), "several images"),
    "tiff of floats": (of_floats(), "undecodable"),
    "tiff in CIELAB": (encoded(4, format="TIFF", mode="LAB"), "undecodable"),
    "half a tiff": (TIFF[: len(TIFF) // 2], "undecodable"),
    "half a compressed tiff": (ZIPPED_TIFF[:8] + changed(ZIPPED_TIFF, 12)[8:300] + bytes(200), "undecodable"),
    "half a webp": (WEBP[: len(WEBP) // 2], "undecodable"),
    "webp of 2**24 px": (WEBP[:24] + b"\xff\xff\xff" + WEBP[27:], "too large"),
    "half a bmp": (BMP[: len(BMP) // 2], "undecodable"),
    "bmp of 2**20 px": (BMP[:18] + struct.pack("<i", 2**20) + BMP[22:], "too large"),
    "half a pnm": (PNM[: len(PNM) // 2], "undecodable"),
    # Damaged JPEG 2000 ends the process when nvImageCodec gets it.
    "half a jpeg 2000": (JP2[: len(JP2) // 2], "undecodable"),
    "a jpeg 2000's header alone": (JP2[: SIZ + 60], "undecodable"),
    "jpeg 2000 with tiles of 0 px": (claiming(JP2, SIZ + TILES, 0), "undecodable"),
    "codestream with tiles of 0 px": (claiming(CODESTREAM, 2 + TILES, 0), "undecodable"),
    "jpeg 2000 without quantisation": (changed(JP2, JP2.index(b"\xff\x5c") + 1), "undecodable"),
    "jpeg 2000 of 20,000 px": (claiming(JP2, JP2.index(b"ihdr") + 8, 20_000), "too large"),
    "codestream of 20,000 px": (claiming(CODESTREAM, 2 + 6, 20_000), "too large"),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_bad_file_is_refused(name):
    data, reason = ZOO[name]
    with silent_decoders():
        refusal_messages = [process_image(data, ImageOptions()), check_stored(data)]
    for refusal in refusal_messages[: 1 if reason == "too small" else 2]:
        assert isinstance(refusal, Refusal), refusal
        assert refusal.reason == reason
        assert refusal.detail
        assert "0x" not in refusal.detail  # an address would differ from build to build


def test_the_detail_says_what_to_do():
    assert "GIF" in detail_of("gif") and "save it as PNG" in detail_of("gif")
    assert "12 bits" in detail_of("jpeg of 12 bits")
    assert "do not end as a JPEG" in detail_of("half a jpeg")
    assert f"{MAX_PIXELS:,}" in detail_of("jpeg of more than 2**26 px")
    assert "2 in one file" in detail_of("tiff of two pages")


def detail_of(name):
    with silent_decoders():
        return process_image(ZOO[name][0], ImageOptions()).detail


def test_the_largest_that_is_allowed_is_read():
    header = read_header(jpeg_with(JPEG, size=(16_384, 4096)) + bytes(MAX_PIXELS // 512))
    assert isinstance(header, Header) and header.width * header.height == MAX_PIXELS
    assert isinstance(read_header(jpeg_with(JPEG, size=(16_385, 1))), Refusal)


@pytest.mark.parametrize("data", [jpeg_with(JPEG, size=(16_384, 4096)), png_header(16_384, 4096)], ids=["jpeg", "png"])
def test_a_header_that_asks_for_more_pixels_than_the_bytes_can_hold_is_refused_before_memory_is_taken(data):
    refusal = read_header(data)
    assert (refusal.reason, refusal.detail.split("bytes")[1]) == ("undecodable", " cannot hold the 16384 x 4096 px of its header")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (8, 8), (9, 7), (1000, 1), (517, 300)])
def test_the_emptiest_images_are_enough_for_their_pixels(width, height):
    """A JPEG of one colour takes a bit or two for each block; a PNG of zeros is a thousandth of what it inflates to."""
    emptiest = [flat_jpeg(width, height, progressive=progressive) for progressive in (False, True)]
    emptiest.append(png(width, height, png_chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)), 9))))
    for data in emptiest:
        assert process_image(data, ImageOptions()).data == data
        assert decode(data).shape == (height, width, 3)


# What the decoders only warn of


def restarted(number):
    """A JPEG without its restart interval of this number."""
    data = encoded(1, size=(64, 48), restart_marker_rows=1)
    start, end = (data.index(bytes((0xFF, 0xD0 + i))) for i in (number, number + 1))
    return data[:start] + data[end:]


def in_tiff(change, **settings):
    """A TIFF with the bytes of its first strip changed."""
    data = encoded(4, size=(64, 48), format="TIFF", **settings)
    tags = Image.open(io.BytesIO(data)).tag_v2
    start, size = tags[273][0], tags[279][0]
    part = change(data[start : start + size])
    assert len(part) == size
    return data[:start] + part + data[start + size :]


def outside(data):
    """A TIFF whose last text would lie behind its end."""
    place = data.index(struct.pack("<HHI", 305, 2, 13)) + 8
    return data[:place] + struct.pack("<I", 10**6) + data[place + 4 :]


SCAN = JPEG.index(b"\xff\xda") + 14
PROGRESSIVE = encoded(1, size=(64, 48), progressive=True)
ROWS = b"".join(b"\0" + bytes(range(192)) for _ in range(48))
FULL = zlib.compress(ROWS)
WARNED = {
    "zeros in a scan": JPEG[: SCAN + 300] + bytes(60) + JPEG[SCAN + 360 :],
    "half a scan with an end marker": JPEG[: SCAN + 500] + b"\xff\xd9",
    "a scan without its last block": JPEG[:-6] + b"\xff\xd9",
    "a lost restart interval": restarted(0),
    "half a progressive file with an end marker": PROGRESSIVE[: len(PROGRESSIVE) // 2] + b"\xff\xd9",
    "bytes between a scan and the end marker": JPEG[:-2] + b"\0\0\0\xff\xd9",
    "a rare subsampling without its last block": flat_jpeg(64, 48, factors=(0x42, 0x11, 0x11))[:-6] + b"\xff\xd9",
    "grey, with zeros in the scan": encoded(1, size=(64, 48), mode="L")[:-400] + bytes(100) + b"\xff\xd9",
    "CMYK, half a scan": encoded(1, size=(64, 48), mode="CMYK")[:-900] + b"\xff\xd9",
    "png with a damaged end": changed(PNG, len(PNG) - 1),
    "png with a damaged text": PNG[:33] + changed(png_chunk(b"tEXt", b"Title\0of the slide"), 12) + PNG[33:],
    "png with a damaged unknown chunk": PNG[:33] + changed(png_chunk(b"slNo", b"of the slide"), 12) + PNG[33:],
    "png with rows beyond its height": png(64, 48, png_chunk(b"IDAT", zlib.compress(2 * ROWS))),
    "png with bytes after its pixels": png(64, 48, png_chunk(b"IDAT", FULL + b"more")),
    "png of a wrong checksum of zlib": png(64, 48, png_chunk(b"IDAT", changed(FULL, len(FULL) - 1))),
    "png without its checksum of zlib": png(64, 48, png_chunk(b"IDAT", FULL[:-4])),
    "tiff of a wrong checksum of zlib": in_tiff(lambda part: changed(part, len(part) - 1), compression="tiff_adobe_deflate"),
    "tiff of half a jpeg": in_tiff(lambda part: part[:700] + bytes(len(part) - 702) + b"\xff\xd9", compression="jpeg"),
    "tiff whose tags lie outside": outside(encoded(4, size=(64, 48), format="TIFF", tiffinfo={305: "of the slide"})),
}


@pytest.mark.parametrize("name", WARNED)
def test_damage_that_a_decoder_only_warns_of_is_refused(name):
    for options in (ImageOptions(), ImageOptions(min_tissue=1e-9), ImageOptions(encode="png", resize=20)):
        with silent_decoders():
            refusal = process_image(WARNED[name], options)
        assert isinstance(refusal, Refusal), name
        assert refusal.reason == "undecodable"
    if not name.startswith("tiff"):
        with silent_decoders():
            assert check_stored(WARNED[name]).reason == "undecodable"


def test_what_a_decoder_says_is_in_the_detail():
    assert process_image(WARNED["zeros in a scan"], ImageOptions()).detail.startswith("a damaged JPEG: Corrupt JPEG data: ")


def test_warnings_about_metadata_are_no_damage():
    """Colour profiles with small faults are common, and no pixel depends on them."""
    for chunk in (png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"no profile")), png_chunk(b"gAMA", bytes(4))):
        data = PNG[:33] + chunk + PNG[33:]
        with silent_decoders():
            assert process_image(data, ImageOptions()).data == data


def test_decoders_warn_on_no_terminal(capfd):
    """Not even without silent_decoders, where libpng and libjpeg-turbo decode what a set may contain."""
    for name, data in WARNED.items():
        if "tiff" not in name:
            process_image(data, ImageOptions())
            check_stored(data)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("factors", [(0x42, 0x11, 0x11), (0x31, 0x11, 0x11), (0x14, 0x11, 0x11), (0x22, 0x11, 0x21), (0x11,)])
def test_rare_subsamplings_are_packed(factors):
    data = flat_jpeg(70, 50, factors=factors)
    stored = process_image(data, ImageOptions())
    assert (stored.width, stored.height) == (70, 50)
    assert len(factors) == 1 or stored.data == data
    assert len(factors) == 1 or check_stored(data) is None


KINDS = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "restart intervals": {"restart_marker_rows": 1},
    "progressive with restart intervals": {"progressive": True, "restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True},
    "PNG": {"format": "PNG"},
    "JPEG 2000": {"format": "JPEG2000"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_accepted_nvimagecodec_decodes_to_the_same_pixels(kind):
    """Training's decoder would end at what it refuses. (JPEGs are checked by another one.)"""
    whole, rng = encoded(7, size=(72, 56), **KINDS[kind]), np.random.default_rng(8)
    accepted = 0
    with silent_decoders():
        for _ in range(120):
            data = mutated(whole, rng)
            if check_stored(data) is None:
                header = read_header(data)
                image = decode(data)
                assert image is not None and image.shape == (header.height, header.width, 3)
                assert np.array_equal(decode_pixels(data, header.kind), image)
                accepted += 1
    assert kind == "PNG" or 2 < accepted < 110


def mutated(data, rng):
    """A bit flipped, a byte set, a span of zeros, something cut out, cut off or doubled."""
    data, kind = bytearray(data), rng.integers(6)
    place, length = int(rng.integers(2, len(data))), int(rng.integers(1, 100))
    if kind == 0:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[place] = int(rng.integers(256))
    elif kind == 2:
        data[place : place + length] = bytes(min(length, len(data) - place))
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        data[place:] = b"\xff\xd9"
    else:
        data[place:place] = data[place : place + length]
    return bytes(data)


def run_apart(script):
    """What a process of its own prints, which it would not if it ended in a decoder."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_claim_of_4_GB_takes_no_memory():
    """nvImageCodec would take 4 GB for the PNG, and Pillow 16 for the WebP."""
    script = """
import resource
from tests.sharding.images.test_image_checks import PNG, WEBP, claiming
from sharding.images.image_processing import ImageOptions, process_image
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in (PNG, WEBP):
    process_image(data, ImageOptions())
before = used()
bad = [claiming(PNG, 33, 2**32 - 1), claiming(PNG, len(PNG) - 12, 2**32 - 1), WEBP[:24] + b"\\xff\\xff\\0" * 2 + WEBP[30:]]
print([process_image(data, ImageOptions()).reason for data in bad], used() - before < 50_000)
"""
    assert run_apart(script) == "['undecodable', 'undecodable', 'too large'] True\n"


@pytest.mark.parametrize(
    ("settings", "coding"),
    [
        ({"subsampling": 0}, "baseline 4:4:4"),
        ({"subsampling": 1}, "baseline 4:2:2"),
        ({"subsampling": 2}, "baseline 4:2:0"),
        ({"subsampling": 2, "progressive": True}, "progressive 4:2:0"),
        ({"mode": "L"}, "baseline"),
    ],
)
def test_coding_is_the_process_and_the_subsampling(settings, coding):
    assert read_header(encoded(4, size=(64, 48), **settings)).coding == coding


@pytest.mark.parametrize(
    ("factors", "subsampling"),
    [
        (b"\x12\x11\x11", "4:4:0"),
        (b"\x41\x11\x11", "4:1:1"),
        (b"\x42\x11\x11", "4:1:0"),
        (b"\x22\x22\x22", "4:4:4"),
        (b"\x22\x21\x21", "4:4:0"),
        (b"\x31\x11\x11", "other"),
        (b"\x22\x11\x21", "other"),
        (b"\x22\x00\x00", "other"),
    ],
)
def test_rare_subsamplings(factors, subsampling):
    data = bytearray(jpeg_with(JPEG, marker=0xC9))
    frame = data.index(b"\xff\xc9")
    data[frame + 11 : frame + 20 : 3] = factors
    assert read_jpeg(bytes(data)).coding == f"SOF9 {subsampling}"


def test_bytes_that_fill_the_space_before_a_marker():
    filled = JPEG[:2] + b"\xff\xff" + JPEG[2:]
    assert read_jpeg(filled) == read_jpeg(JPEG) is not None


@pytest.mark.parametrize("settings", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}, {"mode": "RGBA"}])
def test_the_size_of_each_kind_of_webp(settings):
    assert webp_size(encoded(3, size=(517, 300), format="WEBP", **settings)) == (517, 300)


def test_a_header_is_read_as_the_decoder_reads_it():
    for data in (JPEG, PNG, JP2, encoded(4, size=(7, 9), mode="L"), encoded(4, size=(1, 1), format="PNG")):
        header, image = read_header(data), decode(data)
        assert image.shape == (header.height, header.width, 3)


def test_decoders_write_nothing_on_the_terminal(capfd):
    with silent_decoders():
        for name in ("half a compressed tiff", "png with a changed header", "half a jpeg 2000"):
            process_image(ZOO[name][0], ImageOptions())
    print("afterwards", file=sys.stderr)
    assert capfd.readouterr().err == "afterwards\n"


def directory(*orientations, order="<", kind=3, count=1):
    """EXIF data that give these orientations."""
    entries = b"".join(struct.pack(order + "HHIHH", 0x112, kind, count, value, 0) for value in orientations)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IH", 8, len(orientations)) + entries + bytes(4)


def segment(body, name=b"Exif\0\0", marker=b"\xff\xe1"):
    return marker + struct.pack(">H", 2 + len(name) + len(body)) + name + body


# Name -> segments of a JPEG, the orientation that they give for sure.
EXIF = {
    "none": (b"", 1),
    "no entries": (segment(directory()), 1),
    "upright": (segment(directory(1)), 1),
    "unknown": (segment(directory(0)), 1),
    "turned": (segment(directory(6)), 6),
    "most significant byte first": (segment(directory(8, order=">")), 8),
    "other metadata": (segment(b"<x:xmpmeta/>", name=b"http://ns.adobe.com/xap/1.0/\0"), 1),
    "turned in another segment": (segment(directory(6), marker=b"\xff\xe2"), 1),
    "twice the entry": (segment(directory(1, 6)), None),
    "twice the segment": (segment(directory(6)) + segment(directory(1)), None),
    "no such orientation": (segment(directory(9)), None),
    "of another type": (segment(directory(6, kind=4)), None),
    "two numbers": (segment(directory(6, count=2)), None),
    "cut short": (segment(directory(6)[:18]), None),
    "without a directory": (segment(directory(6)[:8]), None),
    "no byte order": (segment(b"IM" + directory(6)[2:]), None),
    "a changed name": (segment(directory(6), name=b"Exig\0\0"), None),
    "another changed name": (segment(b"IM" + directory(6)[2:], name=b"Exif\0\1"), None),
}


@pytest.mark.parametrize("name", EXIF)
def test_an_orientation_is_believed_where_it_is_clear(name):
    """Two decoders inside nvImageCodec that disagree on it overwrite memory."""
    segments, orientation = EXIF[name]
    assert read_jpeg(JPEG[:2] + segments + JPEG[2:]).exif.orientation == orientation


@pytest.mark.parametrize(
    ("bodies", "orientation"),
    [([], 1), ([directory(6)], 6), ([directory(6), directory(1)], None), ([b"Exif\0\0" + directory(6)], None)],
)
def test_an_orientation_in_a_png(bodies, orientation):
    names, exif = png_chunks(PNG[:33] + b"".join(png_chunk(b"eXIf", body) for body in bodies) + PNG[33:])
    assert exif.orientation == orientation
    assert b"IDAT" in names


def test_an_unclear_orientation_reaches_no_decoder():
    """This file, in nvImageCodec, overwrites memory: one of its parts sees 6, and the one that it turns to then sees 1."""
    script = """
import numpy as np
from tests.sharding.images.test_image_checks import EXIF, JPEG
from sharding.images.image_checks import silent_decoders
from sharding.images.image_processing import ImageOptions, process_image
scan = JPEG.index(b"\\xff\\xda") + 200
data = JPEG[:2] + EXIF["twice the segment"][0] + JPEG[2:scan] + b"\\xff\\x6f" + JPEG[scan + 2 :]
with silent_decoders():
    found = {type(process_image(data, ImageOptions())).__name__ for _ in range(100)}
print(found)
"""
    assert run_apart(script) == "{'Refusal'}\n"


def test_other_kinds_are_not_good_in_a_set():
    assert check_stored(JPEG) is check_stored(PNG) is check_stored(JP2) is None
    assert check_stored(TIFF).reason == "not plain"
