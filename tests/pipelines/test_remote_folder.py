"""Writing, listing and removing files at a URL, whatever the driver; and what is said where that cannot be."""

import itertools
import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.remote_folder import NotThere, RemoteFolder

pytestmark = pytest.mark.timeout(60)

_ROOMS = itertools.count()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3")(tmp_path, f"writing-{next(_ROOMS)}/runs") + "/kidney"
    if request.param == "memory":
        return f"memory://writing-{next(_ROOMS)}/runs/kidney"
    return f"file://{tmp_path}/runs/kidney"


def opened(url, **settings):
    return RemoteFolder(url, tries=3, sleep=lambda _: None, **settings)


def test_what_is_written_is_there(url, tmp_path):
    folder = opened(url)
    opened(url + "-breast").write("run.json", b"of another run")
    assert folder.names() == {}
    folder.write("run.json", b"{}")
    (tmp_path / "local").write_bytes(b"a" * 100_000)
    folder.write("checkpoints/step-3/checkpoint.pt", tmp_path / "local")
    found = folder.names()
    assert {name: each.size for name, each in found.items()} == {"run.json": 2, "checkpoints/step-3/checkpoint.pt": 100_000}
    now = os.stat(tmp_path / "local").st_mtime_ns
    assert all(each.written_ns is not None and abs(each.written_ns - now) < 60 * 10**9 for each in found.values())
    assert folder.read("checkpoints/step-3/checkpoint.pt", 0, 10**6) == b"a" * 100_000
    assert list(folder.names("checkpoints")) == ["checkpoints/step-3/checkpoint.pt"]
    folder.write("run.json", b"other")  # and seen by who listed before
    assert folder.read("run.json", 0, 100) == b"other" and folder.names()["run.json"].size == 5
    assert opened(url).names() == folder.names()
    folder.remove("run.json")
    folder.remove("run.json")  # that it has gone is what was wanted
    assert list(folder.names()) == ["checkpoints/step-3/checkpoint.pt"]
    with pytest.raises(NotThere):
        folder.read("run.json", 0, 1)


def test_a_file_is_created_once(url):
    folder = opened(url)
    assert folder.entries() == []
    folder.create("lock", b"one")
    with pytest.raises(FileExistsError, match="lock is there already"):
        folder.create("lock", b"two")
    assert folder.read("lock", 0, 100) == b"one" and folder.entries() == ["lock"] and list(folder.names()) == ["lock"]
    folder.write("checkpoints/step-3", b"")
    folder.remove("lock")
    assert folder.entries() == ["checkpoints"]
    folder.create("lock", b"two")


def test_a_local_file_that_is_not_there_is_no_fault_of_the_store(url, tmp_path):
    with pytest.raises(FileNotFoundError):
        opened(url).write("x", tmp_path / "none")


@given(st.binary(max_size=50), st.binary(max_size=50))
@settings(max_examples=20, deadline=None)
def test_any_bytes(one, other):
    folder = opened("memory://any/bytes")
    folder.write("x", one)
    folder.write("x", other)
    assert folder.read("x", 0, 1000) == other and folder.names()["x"].size == len(other)


def test_a_folder_never_has_half_a_file(tmp_path, monkeypatch):
    """A copy that breaks off leaves what was there before."""
    folder = opened(f"file://{tmp_path}/runs")
    folder.write("x", b"before")

    def half(self, lpath, rpath, **_):
        Path(rpath).write_bytes(Path(lpath).read_bytes()[:3])
        raise OSError("cable")

    (tmp_path / "local").write_bytes(b"afterwards")
    monkeypatch.setattr(type(fsspec.filesystem("file")), "put_file", half)
    with pytest.raises(ValueError, match=r"runs/x cannot be written: 3 tries failed, the last with cable; .* start again$"):
        folder.write("x", tmp_path / "local")
    assert folder.read("x", 0, 100) == b"before"


def test_what_fails_once_is_tried_again(monkeypatch):
    folder, real, tried = opened("memory://faulty/runs"), MemoryFileSystem.pipe_file, []

    def twice(self, path, value, **settings):
        tried.append(path)
        if len(tried) < 3:
            raise OSError("busy")
        return real(self, path, value, **settings)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", twice)
    folder.write("x", b"1")
    assert len(tried) == 3 and folder.read("x", 0, 9) == b"1"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("Access Denied"), r"x may not be written \(Access Denied\): set credentials"),
        (NotImplementedError(), "x cannot be written: this store or its driver cannot do that"),
    ],
)
def test_what_will_not_get_better_is_not_tried_again(monkeypatch, error, words):
    tried = []

    def refuse(*_, **__):
        tried.append(1)
        raise error

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(ValueError, match=words):
        opened("memory://refusing/runs").write("x", b"1")
    assert len(tried) == 1


def test_a_bucket_that_is_not_there(s3, tmp_path):
    s3(tmp_path, "there/runs")
    folder = opened("s3://not-there/runs")
    assert folder.names() == {}
    with pytest.raises(ValueError, match=r"s3://not-there/runs/x does not exist \(.*\): check that the bucket exists$"):
        folder.write("x", b"1")
