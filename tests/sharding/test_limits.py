"""No single file stops a build: it is quarantined for what it would have taken, before it takes it."""

import errno
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sharding import shard_writer
from sharding.images.image_checks import silent_decoders
from sharding.images.image_processing import ImageOptions, check_stored, process_image
from sharding.limits import MAX_CHUNKS, MAX_COMPRESSED_TEXTS, MAX_FILE_BYTES, MAX_IMAGES, MAX_PILLOW_PIXELS, MAX_SCANS
from sharding.packing import build_shards
from sharding.sources.archives import FileReader
from tests.helpers import ROOT, encoded, write_tree
from tests.sharding.images.image_files import SIGNATURE, flat_jpeg, jpeg_segment, png, png_chunk

JPEG = encoded(1)
PIXELS = png_chunk(b"IDAT", zlib.compress(bytes(12 * (1 + 3 * 16))))
LARGE = 6 * 2**30  # bytes


def saved(format, *images, **settings):
    file = io.BytesIO()
    images[0].save(file, format, save_all=len(images) > 1, append_images=images[1:], **settings)
    return file.getvalue()


def tiles_of(side):
    """A TIFF of a few pixels that says that its tiles have this side."""
    tags = [(256, 16), (257, 12), (258, 8), (259, 1), (262, 1), (277, 1), (322, side), (323, side), (324, 8), (325, 192)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + 192) + bytes(192) + directory


# Name -> bytes, reason, word in the detail.
HOSTILE = {
    "png of zeros": (lambda: SIGNATURE + bytes(60_000_000), "undecodable", "do not end as a PNG"),
    "png of many chunks": (
        lambda: png(16, 12, *[png_chunk(b"teXt", b"")] * MAX_CHUNKS, PIXELS),
        "too complex",
        f"more than {MAX_CHUNKS:,} chunks",
    ),
    "png of many texts": (
        lambda: png(
            16, 12, *[png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8_000_000)))] * (MAX_COMPRESSED_TEXTS + 1), PIXELS
        ),
        "too complex",
        f"more than {MAX_COMPRESSED_TEXTS} compressed texts",
    ),
    "jpeg of many segments": (
        lambda: JPEG[:2] + MAX_CHUNKS * jpeg_segment(0xFE, b"") + JPEG[2:],
        "too complex",
        f"more than {MAX_CHUNKS:,} segments",
    ),
    "jpeg of many fill bytes": (
        lambda: JPEG[:2] + MAX_CHUNKS * b"\xff" + JPEG[2:],
        "too complex",
        f"more than {MAX_CHUNKS:,} segments",
    ),
    "jpeg of many scans": (lambda: flat_jpeg(64, 48, progressive=True, scans=2000), "too complex", "2,000 scans of 64 x 48 px"),
    "large jpeg of some scans": (
        lambda: flat_jpeg(8192, 4096, progressive=True, scans=33),
        "too complex",
        "33 scans of 8192 x 4096 px",
    ),
    "tiff of many images": (
        lambda: saved("TIFF", *[Image.new("L", (1, 1))] * (MAX_IMAGES + 2)),
        "several images",
        f"over {MAX_IMAGES} in one file",
    ),
    "tiff of large tiles": (lambda: tiles_of(2**16), "too large", "65536 x 65536 px"),
    "png to convert": (
        lambda: png(8192, 4097, png_chunk(b"IDAT", zlib.compress(bytes(8192 * 4097 + 4097))), colour=0),
        "too large",
        f"{MAX_PILLOW_PIXELS:,} in all unless it is a plain JPEG or PNG",
    ),
    "webp to convert": (
        lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + ((8192 - 1) | (4097 - 1) << 14).to_bytes(4, "little") + bytes(8),
        "too large",
        "8192 x 4097 px",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_asks_for_too_much_is_refused_before_it_gets_it(name):
    make, reason, words = HOSTILE[name]
    data = make()
    started = time.process_time()
    with silent_decoders():
        refusal = process_image(data, ImageOptions())
        header_only = process_image(data, ImageOptions(check="header"))
    assert (refusal.reason, words in refusal.detail) == (reason, True), refusal
    assert header_only == refusal
    assert time.process_time() - started < 2


def test_what_lies_just_within_the_limits_is_packed():
    within = [
        png(16, 12, *[png_chunk(b"teXt", b"")] * (MAX_CHUNKS - 3), PIXELS),
        png(16, 12, *[png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"text"))] * MAX_COMPRESSED_TEXTS, PIXELS),
        flat_jpeg(64, 48, progressive=True, scans=MAX_SCANS),
        JPEG[:2] + 1000 * jpeg_segment(0xFE, b"comment") + JPEG[2:],
    ]
    for data in within:
        assert process_image(data, ImageOptions()).data == data
        assert check_stored(data) is None


def test_a_build_goes_on_past_what_is_too_large(tmp_path):
    """A sparse file and members of gigabytes are not read: not even their size on the disk is asked for."""
    write_tree(tmp_path / "tree", {f"a/{i}.jpg": encoded(i) for i in range(4)})
    (tmp_path / "tree/a/sparse.jpg").touch()
    os.truncate(tmp_path / "tree/a/sparse.jpg", LARGE)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/5.jpg", encoded(5))
        with archive.open("a/zeros.png", "w", force_zip64=True) as file:
            for _ in range(MAX_FILE_BYTES // 2**24 + 1):
                file.write(bytes(2**24))
    info = tarfile.TarInfo("a/zeros.tif")
    info.size = LARGE
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "x.tar", 512 + LARGE + 1024)
    sources = [tmp_path / "tree", tmp_path / "x.zip", tmp_path / "x.tar"]
    summary = build_shards(sources, tmp_path / "set")
    assert (summary.found, summary.packed, summary.quarantined) == (8, 5, 3)
    refused = pq.read_table(tmp_path / "set/quarantine.parquet").to_pylist()
    assert {os.path.basename(row["source"]): row["reason"] for row in refused} == dict.fromkeys(
        ("sparse.jpg", "zeros.png", "zeros.tif"), "too large"
    )
    assert all(row["detail"].endswith(f"bytes; at most {MAX_FILE_BYTES:,}") for row in refused)
    assert build_shards(sources, tmp_path / "set").was_there


def test_a_file_that_grew_is_not_read_beyond_the_limit(tmp_path):
    path = tmp_path / "1.jpg"
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)
    with FileReader() as reader:
        for size in (5, MAX_FILE_BYTES + 1):
            with pytest.raises(OSError, match="at most") as caught:
                reader.read(None, os.fsencode(path), -1, size)
            assert caught.value.errno == errno.EFBIG


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "1.jpg")
    with FileReader() as reader:
        assert reader.read(None, os.fsencode(tmp_path / "1.jpg"), -1, 100) == b""


def test_a_conversion_takes_a_few_bytes_per_pixel():
    """Of a PNG of 30 KB. It took 25 bytes per pixel, 1.5 GB for the largest."""
    script = """
import resource, zlib
from sharding.images.image_processing import ImageOptions, process_image
from tests.sharding.images.image_files import png, png_chunk
def rgba(width, height):
    return png(width, height, png_chunk(b"IDAT", zlib.compress(bytes(height * (1 + 4 * width)))), colour=6)
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
data = rgba(4096, 2048)
process_image(rgba(2048, 1024), ImageOptions())
before = used()
print(process_image(data, ImageOptions()).converted, (used() - before) / 2**23)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("RGBA over white ")
    assert float(done.stdout.split()[-1]) < 13


# Time and memory that no limit foresees


def test_an_image_that_takes_too_long_is_quarantined_and_the_next_one_is_not(tmp_path, monkeypatch):
    slow = encoded(3)

    def process(data, options):
        if data == slow:
            try:
                while True:
                    np.zeros(10).sum()
            except Exception:  # as around decoders
                return process_image(JPEG, options)
        return process_image(data, options)

    write_tree(tmp_path / "tree", {f"a/{i}.jpg": encoded(i) for i in range(6)})
    monkeypatch.setattr(shard_writer, "process_image", process)
    monkeypatch.setattr(shard_writer, "MAX_SECONDS", 0.2)
    summary = build_shards([tmp_path / "tree"], tmp_path / "set")
    assert (summary.packed, summary.quarantined) == (5, 1)
    (row,) = pq.read_table(tmp_path / "set/quarantine.parquet").to_pylist()
    assert (os.path.basename(row["source"]), row["reason"]) == ("3.jpg", "too complex")
    assert row["detail"] == "takes more than 0.2 s of processor time"


def test_a_build_outside_the_main_thread_has_no_limit_of_time(tmp_path):
    """There is no signal for it."""
    write_tree(tmp_path / "tree", {f"a/{i}.jpg": encoded(i) for i in range(3)})
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(build_shards([tmp_path / "tree"], tmp_path / "set")))
    thread.start()
    thread.join()
    assert summaries[0].packed == 3


def test_a_lack_of_memory_names_the_file(tmp_path, monkeypatch):
    def process(data, options):
        raise MemoryError

    write_tree(tmp_path / "tree", {"a/1.jpg": JPEG})
    monkeypatch.setattr(shard_writer, "process_image", process)
    with pytest.raises(ValueError, match=r"not enough memory to read and decode .*/a/1\.jpg: try again with fewer --workers"):
        build_shards([tmp_path / "tree"], tmp_path / "set")
