"""A folder is walked once, in the order of whole paths, whatever its files are called."""

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.sources import folders
from sharding.sources.file_listing import SkippedFiles
from sharding.sources.folders import images_under
from tests.helpers import write_tree
from tests.sharding.sources.archive_files import NAMES


def walk(root) -> tuple[list[bytes], list[int], SkippedFiles]:
    """Relative paths, sizes and what was skipped."""
    skipped = SkippedFiles()
    found = list(images_under(os.fsencode(root), set(), skipped))
    paths = [batch.folder + b"/" + name if batch.folder else name for batch in found for name in batch.names]
    return paths, [size for batch in found for size in batch.sizes], skipped


def test_images_come_in_the_order_of_their_whole_paths_with_their_sizes(tmp_path):
    # A blank sorts before the slash: `a b` comes before what is in `a`, and files come between folders.
    names = ["a/1.jpg", "a b/1.jpg", "a/z/1.jpg", "b.jpg", "a.jpg", "c/1.jpg", "a/0/2.jpg", "a!/1.jpg"]
    write_tree(tmp_path, {name: b"x" * size for size, name in enumerate(names)})
    paths, sizes, _ = walk(tmp_path)
    assert paths == sorted(map(os.fsencode, names))
    assert dict(zip(map(os.fsdecode, paths), sizes, strict=True)) == {name: size for size, name in enumerate(names)}


def test_a_large_folder_comes_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "BATCH", 3)
    write_tree(tmp_path, {f"{i}.jpg": b"" for i in range(8)} | {"5/a.jpg": b""})
    found = list(images_under(os.fsencode(tmp_path), set(), SkippedFiles()))
    assert [len(batch.names) for batch in found] == [3, 3, 1, 2]  # 5.jpg sorts before 5/
    assert walk(tmp_path)[0] == [b"0.jpg", b"1.jpg", b"2.jpg", b"3.jpg", b"4.jpg", b"5.jpg", b"5/a.jpg", b"6.jpg", b"7.jpg"]


def test_links(tmp_path):
    """To a folder: followed once, after real folders. To nothing or to itself: listed, to be missed by name. To a pipe: nothing
    to wait for."""
    write_tree(tmp_path, {"in/a/1.jpg": b"x", "elsewhere/2.jpg": b"xx"})
    for name, target in {
        "b": "../elsewhere",
        "c": "../elsewhere",
        "a/loop": "..",
        "gone.jpg": "nowhere.jpg",
        "self.jpg": "self.jpg",
        "self": "self",
        "pipe.jpg": "../pipe",
        "file.jpg": "a/1.jpg",
        "gone": "nowhere",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    paths, sizes, skipped = walk(tmp_path / "in")
    assert paths == [b"a/1.jpg", b"file.jpg", b"gone.jpg", b"self.jpg", b"b/2.jpg"]
    assert sizes == [1, 1, -1, -1, 2]
    assert (skipped.repeated_folders, skipped.special, dict(skipped.extensions)) == (2, 1, {"": 2})


def test_what_is_passed_over_is_counted(tmp_path):
    names = ["a/1.jpg", "a/.3.jpg", ".hidden/4.jpg", "a/notes.txt", "a/README", "more.zip", "b/more.tar", "a/more.jpg.TGZ"]
    write_tree(tmp_path, dict.fromkeys(names, b"x"))
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    os.mkfifo(tmp_path / "a" / "pipe")
    paths, _, skipped = walk(tmp_path)
    assert paths == [b"a/1.jpg"]
    assert (skipped.hidden, skipped.special, dict(skipped.extensions)) == (2, 2, {"txt": 1, "": 1})
    assert sorted(skipped.archives) == [str(tmp_path / name) for name in ("a/more.jpg.TGZ", "b/more.tar", "more.zip")]
    assert f"3 archives in the folders were not opened, for example {tmp_path}/a/more.jpg.TGZ" in skipped.notes()[1]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_tree(tmp_path, {"a/1.jpg": b"x", "b/1.jpg": b"x"})
    scandir = os.scandir

    def refusing(path):
        if path.endswith(b"/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="/b"):
        walk(tmp_path)


@given(tree=st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=8))
def test_any_names_are_found_in_order(tree):
    with tempfile.TemporaryDirectory() as root:
        made = {}
        for number, (*inside, name) in enumerate(tree):
            folder = os.path.join(os.fsencode(root), *inside)
            path = os.path.join(folder, name + b".jpg")
            try:
                os.makedirs(folder, exist_ok=True)
                with open(path, "wb") as file:
                    file.write(b"x" * number)
            except OSError:  # a file of that name is there already
                continue
            made[os.path.relpath(path, os.fsencode(root))] = number
        paths, sizes, _ = walk(root)
        assert paths == sorted(made)
        assert dict(zip(paths, sizes, strict=True)) == made
