"""Zips are read as zipfile reads them, without its memory: members, sizes, names, and what cannot be read."""

import io
import os
import struct
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.sources.file_listing import SkippedFiles
from sharding.sources.zips import is_zip, read_zip_member, zip_members
from tests.sharding.sources.archive_files import write_zip


def members(path) -> tuple[dict[bytes, bytes | str], SkippedFiles]:
    """The bytes of each member, or why they cannot be read."""
    skipped = SkippedFiles()
    file = os.open(path, os.O_RDONLY)
    contents: dict[bytes, bytes | str] = {}
    try:
        assert is_zip(file)
        for name, offset, size in zip_members(file, str(path), skipped):
            try:
                contents[name] = read_zip_member(file, offset, size)
            except OSError as error:
                contents[name] = error.strerror
    finally:
        os.close(file)
    return contents, skipped


FILES = {"a/1.jpg": b"one" * 100, "a/2.jpg": b"", "종양/3.jpg": bytes(range(256)) * 300, "4": b"4"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_member_with_its_bytes(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.mkdir("a")
        for name, data in FILES.items():
            archive.writestr(name, data)
        archive.comment = b"said of the whole"
    assert members(tmp_path / "x.zip")[0] == {name.encode(): data for name, data in FILES.items()}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_was_written_to_a_pipe(tmp_path, method):
    """Sizes and checksums then follow the data, because nobody could go back and write them in front."""
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as pipe, zipfile.ZipFile(pipe, "w", method) as archive:
        for name in ("a/1.jpg", "4"):
            archive.writestr(name, FILES[name])
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    assert data[6] & 8
    (tmp_path / "x.zip").write_bytes(data)
    assert members(tmp_path / "x.zip")[0] == {b"a/1.jpg": FILES["a/1.jpg"], b"4": b"4"}
    changed = bytearray(data)
    changed[data.index(b"PK\7\x08") + 4] ^= 1  # the checksum
    (tmp_path / "y.zip").write_bytes(changed)
    assert "checksum" in members(tmp_path / "y.zip")[0][b"a/1.jpg"]


def test_a_checksum_that_follows_without_its_signature(tmp_path):
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 8, 0, 0, 0, 0, 0, 0, 1, 0)
    (tmp_path / "part.zip").write_bytes(header + b"n" + b"data" + struct.pack("<L", zlib.crc32(b"data")) + bytes(8))
    with open(tmp_path / "part.zip", "rb") as file:
        assert read_zip_member(file.fileno(), 0, 4) == b"data"


def test_a_zip_behind_something_else(tmp_path):
    """A program that unpacks itself, for example."""
    write_zip(tmp_path / "x.zip", {b"long enough.jpg": b"one"})
    (tmp_path / "x.exe").write_bytes(b"MZ a program" + (tmp_path / "x.zip").read_bytes())
    assert members(tmp_path / "x.exe")[0] == {b"long enough.jpg": b"one"}


def test_a_zip_of_the_large_kind(tmp_path, monkeypatch):
    """zip64: what 4 GB or 65,536 members need, made from few bytes by lowering the limits of who writes it."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    data = (tmp_path / "x.zip").read_bytes()
    assert data.count(b"PK\6\6") == 1
    expected = {name.encode(): content for name, content in FILES.items()}
    assert members(tmp_path / "x.zip")[0] == expected
    (tmp_path / "y.zip").write_bytes(b"in front" + data)
    assert members(tmp_path / "y.zip")[0] == expected


def test_what_is_no_file_is_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.mkdir("folder.jpg")
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "1.jpg")
        archive.writestr("1.jpg", b"one")
    contents, skipped = members(tmp_path / "x.zip")
    assert contents == {b"1.jpg": b"one"}
    assert skipped.special == 1


def test_what_cannot_be_read_is_said_of_the_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("good.jpg", b"good")
        archive.writestr("locked.jpg", b"secret")
        archive.writestr("packed.jpg", b"x" * 100, zipfile.ZIP_BZIP2)
        archive.writestr("flipped.jpg", b"flip me")
        archive.writestr("gone.jpg", b"gone")
        archive.writestr("deflated.jpg", b"x" * 1000, zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(b"locked.jpg") - 24] |= 1  # the flag of encryption
    data[data.index(b"flip me")] ^= 1
    data[data.index(b"gone.jpg") - 30] ^= 1  # the signature
    data[data.index(b"deflated.jpg") + 12] = 0xFF
    (tmp_path / "x.zip").write_bytes(data)
    assert members(tmp_path / "x.zip")[0] == {
        b"good.jpg": b"good",
        b"locked.jpg": "encrypted",
        b"packed.jpg": "compressed in a way that is not supported (method 12)",
        b"flipped.jpg": "damaged zip: its data do not fit their checksum",
        b"gone.jpg": "damaged zip: no file where its directory says",
        b"deflated.jpg": "damaged zip: its data cannot be inflated",
    }


# Names


@pytest.mark.parametrize(
    ("names", "read", "words"),
    [
        (["종양/1.jpg".encode()], ["종양/1.jpg".encode()], None),  # a Mac does not say that it is UTF-8
        (
            ["종양/1.jpg".encode("cp949"), b"and/2.jpg"],
            ["종양/1.jpg".encode(), b"and/2.jpg"],
            "(1 that are not ASCII); they were read as Korean",
        ),
        (
            ["종양/1.jpg".encode("cp949"), b"\xff\xff/33.jpg"],
            ["종양/1.jpg".encode("cp949"), b"\xff\xff/33.jpg"],
            "'\\\\xc1\\\\xbe",
        ),
    ],
)
def test_names_that_do_not_say_how_they_are_encoded(tmp_path, names, read, words):
    write_zip(tmp_path / "x.zip", dict.fromkeys(names, b"x"))
    contents, skipped = members(tmp_path / "x.zip")
    assert list(contents) == read
    if words is None:
        assert skipped.remarks == []
    else:
        (remark,) = skipped.remarks
        assert words in remark
        assert "zip it again in UTF-8" in remark


def test_names_that_say_that_they_are_utf8_are_left_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("가.jpg", b"x")
        archive.writestr("나.jpg", b"y")
    data = (tmp_path / "x.zip").read_bytes().replace("나".encode(), "\xff나".encode("cp949", "ignore") + b"\xc0")
    (tmp_path / "x.zip").write_bytes(data)
    contents, skipped = members(tmp_path / "x.zip")
    assert list(contents.values()) == [b"x", b"y"]
    assert next(iter(contents)) == "가.jpg".encode()
    assert skipped.remarks == []


# Damage


def test_a_zip_that_was_cut_short_is_refused_wherever_it_was_cut(tmp_path):
    write_zip(tmp_path / "x.zip", {b"a/1.jpg": b"one", b"a/2.jpg": b"two"})
    data = (tmp_path / "x.zip").read_bytes()
    for length in range(4, len(data)):
        (tmp_path / "cut.zip").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.zip is a zip that is damaged or was cut short"):
            members(tmp_path / "cut.zip")
    for start in range(1, 60):  # the front is missing
        (tmp_path / "cut.zip").write_bytes(data[start:])
        with pytest.raises(ValueError, match="damaged or was cut short"):
            members(tmp_path / "cut.zip")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"PX\1\2"),  # the signature of the first entry
        (24, b"\xf0\xff\xff\xff"),  # 4 GB of so few bytes
        (24, b"\xff\xff\xff\xff"),  # zip64, but the size is nowhere
        (42, b"\xf0\xff\xff\xff"),  # begins behind the end
    ],
)
def test_a_directory_that_cannot_be_true_is_refused(tmp_path, place, value):
    write_zip(tmp_path / "x.zip", {b"long enough.jpg": b"one"})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    start = data.index(b"PK\1\2") + place
    data[start : start + 4] = value
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ValueError, match="damaged or was cut short"):
        members(tmp_path / "x.zip")


def test_a_large_entry_without_its_numbers_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("1.jpg")
        info.extra = struct.pack("<2H", 1, 0)
        archive.writestr(info, b"one")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    start = data.index(b"PK\1\2") + 24
    data[start : start + 4] = b"\xff" * 4
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ValueError, match="damaged or was cut short"):
        members(tmp_path / "x.zip")


def _to_damage() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.jpg", "종양/2.jpg"):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(b"content " * 5)
    return file.getvalue()


DAMAGED = _to_damage()


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from((0, 1, 8, 0x7F, 0x80, 0xFF))), min_size=1, max_size=6))
def test_any_damage_is_a_value_error_or_said_of_the_member(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    data = bytearray(DAMAGED)
    for place, value in changes:
        data[place % len(data)] = value
    data[:4] = b"PK\3\4"
    path.write_bytes(data)
    refused, contents = "", {}
    try:
        contents, _ = members(path)
    except ValueError as error:
        refused = str(error)
    assert not refused or "damaged or was cut short" in refused
    assert set(map(type, contents.values())) <= {bytes, str}
