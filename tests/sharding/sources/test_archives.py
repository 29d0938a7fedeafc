"""Tars and zips are read in place: the same images as in the folder that they were made of."""

import errno
import gzip
import io
import os
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharding.sources import archives
from sharding.sources.archives import FileReader, images_in
from sharding.sources.file_listing import SkippedFiles, split_path
from sharding.sources.folders import images_under
from tests.helpers import write_tree
from tests.sharding.sources.archive_files import NAMES, write_tar, write_zip


def contents(archive: Path) -> tuple[dict[bytes, bytes | str], SkippedFiles]:
    """The bytes of each image, in order, or why they cannot be read; and what was skipped."""
    skipped = SkippedFiles()
    read: dict[bytes, bytes | str] = {}
    with FileReader() as reader:
        for found in images_in(os.fsencode(archive), skipped):
            for name, offset, size in zip(found.names, found.offsets, found.sizes, strict=True):
                path = found.folder + b"/" + name if found.folder else name
                assert path not in read
                try:
                    read[path] = reader.read(os.fsencode(archive), path, offset, size)
                except OSError as error:
                    read[path] = error.strerror
    assert all(read[path] is not None for path in read)
    return read, skipped


IMAGES = {"a/1.jpg": b"one", "a b/2.png": b"two" * 5000, "종양/S 1/3.jpg": b"", "0.jpg": b"x" * 512}
TREE = IMAGES | {"a/notes.txt": b"", "a/.4.jpg": b"4"}


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "tree", TREE)


@pytest.mark.parametrize("kind", ["gnu.tar", "pax.tar", "ustar.tar", "stored.zip", "deflated.zip"])
def test_an_archive_holds_the_images_of_the_folder_that_it_was_made_of(tree, tmp_path, kind):
    archive = tmp_path / kind
    if kind.endswith(".tar"):
        formats = {"gnu.tar": tarfile.GNU_FORMAT, "pax.tar": tarfile.PAX_FORMAT, "ustar.tar": tarfile.USTAR_FORMAT}
        with tarfile.open(archive, "w", format=formats[kind]) as tar:
            tar.add(tree, ".")  # members are ./a/1.jpg
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED if kind == "stored.zip" else zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(tree.rglob("*"), reverse=True):
                packed.write(path, path.relative_to(tree))
    read, skipped = contents(archive)
    assert read == {name.encode(): data for name, data in IMAGES.items()}
    of_folder = SkippedFiles()
    in_folder = [(found.folder, name) for found in images_under(os.fsencode(tree), set(), of_folder) for name in found.names]
    assert list(map(split_path, read)) == in_folder  # in the same order
    assert skipped.notes() == of_folder.notes()


def test_names_as_they_come(tmp_path):
    names = [b"/abs/1.jpg", b"./a//2.jpg", b"../up/3.jpg", b"a/./4.jpg", b".hidden/5.jpg", b"a/.6.jpg", b"n" * 300 + b".jpg"]
    read, skipped = contents(write_tar(tmp_path / "x.tar", [(name, name) for name in names]))
    assert read == {
        b"../up/3.jpg": b"../up/3.jpg",
        b"a/2.jpg": b"./a//2.jpg",
        b"a/4.jpg": b"a/./4.jpg",
        b"abs/1.jpg": b"/abs/1.jpg",
        b"n" * 300 + b".jpg": b"n" * 300 + b".jpg",
    }
    assert skipped.hidden == 2


def test_of_a_name_that_comes_twice_the_last_one_counts(tmp_path):
    files = [(b"a/1.jpg", b"old"), (b"a/2.jpg", b"2"), (b"./a/1.jpg", b"older"), (b"a/3.jpg", b"3"), (b"a/1.jpg", b"new")]
    write_tar(tmp_path / "x.tar", files)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for name, data in files:
            packed.writestr(name.decode(), data)
    for archive in (tmp_path / "x.tar", tmp_path / "x.zip"):
        read, skipped = contents(archive)
        assert read == {b"a/1.jpg": b"new", b"a/2.jpg": b"2", b"a/3.jpg": b"3"}
        assert skipped.remarks == [f"{archive} has 2 files again under the same name: the last one counts"]


def test_links_and_devices_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in {"s": tarfile.SYMTYPE, "h": tarfile.LNKTYPE, "p": tarfile.FIFOTYPE, "c": tarfile.CHRTYPE}.items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "1.jpg"
            archive.addfile(info)
        sparse = tarfile.TarInfo("sparse.jpg")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    read, skipped = contents(tmp_path / "x.tar")
    assert read == {b"1.jpg": b"one"}
    assert skipped.special == 5


@pytest.mark.parametrize("head", [b"\x1f\x8b", b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!"])
def test_what_is_compressed_as_a_whole_is_refused(tmp_path, head):
    (tmp_path / "x.tar.z").write_bytes(head + bytes(1000))
    with pytest.raises(ValueError, match=r"x\.tar\.z is compressed as a whole .* unpack it"):
        contents(tmp_path / "x.tar.z")


def test_a_compressed_tar_is_refused(tree, tmp_path):
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        archive.add(tree, "a")
    with pytest.raises(ValueError, match="unpack it"):
        contents(tmp_path / "x.tgz")
    (tmp_path / "x.tar").write_bytes(gzip.decompress((tmp_path / "x.tgz").read_bytes()))
    assert len(contents(tmp_path / "x.tar")[0]) == 4


@pytest.mark.parametrize("data", [b"", b"an image", b"x" * 2000, b"\0" * 100])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.png is a file, and neither a tar nor a zip"):
        contents(tmp_path / "x.png")


# Damage


def test_a_tar_that_was_cut_short_is_refused_wherever_it_was_cut(tmp_path):
    files = [(b"a/1.jpg", b"one"), (b"n" * 200 + b".jpg", b"x" * 700), ("종.jpg".encode(), b"")]
    data = write_tar(tmp_path / "x.tar", files).read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in (*range(512, end + 512, 128), end + 511):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is a tar that is damaged, was cut short"):
            contents(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(data[: end + 512])  # one block of zeros is an end
    assert len(contents(tmp_path / "cut.tar")[0]) == 3


def test_a_tar_that_goes_on_behind_its_end_is_refused(tmp_path):
    """As `cat one.tar two.tar` makes them, of which tar itself would silently read the first."""
    one = write_tar(tmp_path / "1.tar", [(b"1.jpg", b"one")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + one)
    with pytest.raises(ValueError, match="several in a row"):
        contents(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(one + bytes(1_000_000))
    assert list(contents(tmp_path / "x.tar")[0]) == [b"1.jpg"]


def test_a_bad_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "x.tar", [(b"1.jpg", b"one"), (b"2.jpg", b"two")]).read_bytes())
    data[1024 + 10] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        contents(tmp_path / "x.tar")


def test_a_size_below_zero_ends(tmp_path):
    """It would send the reader back to the same header for ever."""
    data = bytearray(write_tar(tmp_path / "x.tar", [(b"1.jpg", b"one"), (b"2.jpg", b"two")]).read_bytes())
    data[1024 + 124 : 1024 + 136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[1024:1536]))[0]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        contents(tmp_path / "x.tar")


NUMBERS = (0, 1, ord("0"), ord("7"), ord("x"), ord("L"), ord("g"), ord("S"), 0x80, 0xFF)


def _checked(block: bytearray) -> bytearray:
    """A tar header with its checksum put right, so that damage gets past it."""
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return block


@given(
    changes=st.lists(st.tuples(st.integers(0, 511), st.sampled_from(NUMBERS)), min_size=1, max_size=5),
    header=st.integers(0, 5),
    format=st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
)
def test_any_damage_is_a_value_error_or_said_of_the_image(changes, header, format):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.tar")
        data = bytearray(write_tar(path, [("종.jpg".encode(), b"one"), (b"n" * 150 + b".jpg", b"2")], format=format).read_bytes())
        start = header * 512
        for place, value in changes:
            data[start + place] = value
        data[start : start + 512] = _checked(data[start : start + 512])
        path.write_bytes(data)
        refused = ""
        try:
            contents(path)
        except ValueError as error:
            refused = str(error)
        assert not refused or "damaged, was cut short" in refused or "neither a tar nor a zip" in refused


# Any names

PATHS = st.lists(
    st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: b"/".join(parts) + b".jpg"), min_size=1, max_size=5, unique=True
)


@given(paths=PATHS, format=st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
@example(paths=[b"BZh.jpg"], format=tarfile.GNU_FORMAT)  # as a compressed file begins
@example(paths=[b"Rar!.jpg"], format=tarfile.PAX_FORMAT)
def test_any_names_in_a_tar(paths, format):
    files = {path: b"bytes of %d" % number for number, path in enumerate(paths)}
    with tempfile.TemporaryDirectory() as folder:
        assert contents(write_tar(Path(folder, "x.tar"), files.items(), format=format))[0] == files


@given(paths=PATHS, method=st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
def test_any_names_in_a_zip(paths, method):
    """Names are read as what they can be: the bytes of the images are those that were put in, under as many names."""
    files = {path: b"bytes of %d" % number for number, path in enumerate(paths)}
    with tempfile.TemporaryDirectory() as folder:
        read = contents(write_zip(Path(folder, "x.zip"), files, method=method))[0]
    if all(path.isascii() for path in files):
        assert read == files
    assert sorted(read.values()) == sorted(files.values())


# Reading


def test_a_plain_file_is_read_as_it_is_now(tmp_path):
    path = tmp_path / "1.jpg"
    with FileReader() as reader:
        for size in (0, 3, 100_000, 2_000_000):
            path.write_bytes(bytes(size))
            for expected in (size, size - 1 if size else 0, size + 1, 0):  # it may have changed since the scan
                assert reader.read(None, os.fsencode(path), -1, expected) == bytes(size)


def test_what_cannot_be_read_says_why(tmp_path):
    (tmp_path / "now.jpg").write_bytes(b"x")
    tar = os.fsencode(write_tar(tmp_path / "x.tar", [(b"1.jpg", b"one")]))
    zipped = os.fsencode(write_zip(tmp_path / "x.zip", {b"1.jpg": b"one"}))
    with FileReader() as reader:
        for place, number in (
            ((None, b"/nowhere/1.jpg", -1, 3), errno.ENOENT),
            ((None, b"/nowhere/1.jpg", -1, -1), errno.ENOENT),
            ((None, os.fsencode(tmp_path / "now.jpg"), -1, -1), errno.ENOENT),  # came after the scan, or is no image of it
            ((None, os.fsencode(tmp_path), -1, 3), errno.EISDIR),
            ((tar, b"2.jpg", -1, -1), errno.ENOENT),
            ((tar, b"1.jpg", 10**6, 3), errno.EIO),
            ((zipped, b"2.jpg", -1, -1), errno.ENOENT),
            ((zipped, b"1.jpg", 5, 3), errno.EIO),
            ((b"/nowhere/x.tar", b"1.jpg", 512, 3), errno.ENOENT),
        ):
            with pytest.raises(OSError, match=r"Errno") as caught:
                reader.read(*place)
            assert (caught.value.errno, bool(caught.value.strerror)) == (number, True)


def test_only_a_few_archives_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MOST_OPEN", 2)
    paths = [os.fsencode(write_tar(tmp_path / f"{i}.tar", [(b"1.jpg", b"%d" % i)])) for i in range(5)]
    before = len(os.listdir("/proc/self/fd"))
    with FileReader() as reader:
        for i in (0, 1, 2, 0, 3, 4, 4, 0):
            assert reader.read(paths[i], b"1.jpg", 512, 1) == b"%d" % i
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(os.listdir("/proc/self/fd")) == before
