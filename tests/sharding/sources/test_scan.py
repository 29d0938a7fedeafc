"""A scan finds every image, in an order that depends on names alone, and says what it leaves out."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.manifest import WORDS
from sharding.sources import image_table
from sharding.sources.archives import FileReader
from sharding.sources.image_table import LOCATION
from sharding.sources.scan import scan_sources, source_names
from tests.helpers import BREAST_LAYOUT, write_tree
from tests.sharding.sources.archive_files import NAMES, write_tar


def relative(scan, root):
    return [os.path.relpath(name, root) for name in source_names(scan.files)]


def test_files_are_sorted_and_carry_fields(breast):
    scan = scan_sources([str(breast)], layout=BREAST_LAYOUT)
    paths = relative(scan, breast)
    assert len(paths) == 55
    assert list(map(str.encode, paths)) == sorted(map(str.encode, paths))
    assert scan.notes == []
    assert scan.fields == ("class", "slide", "magnification")
    assert scan.files.column_names == [*LOCATION, *scan.fields]
    path = breast / "종양 (tumour)/S 종1/x40/patch x40 (2).jpg"
    row = scan.files.slice(paths.index("종양 (tumour)/S 종1/x40/patch x40 (2).jpg"), 1).to_pylist()[0]
    assert row == {
        "container": None,
        "path": os.fsencode(path),
        "offset": -1,
        "size": path.stat().st_size,
        "class": "종양 (tumour)",
        "slide": "S 종1",
        "magnification": "x40",
    }


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_every_column_has_its_type_however_many_files(breast, tmp_path, monkeypatch, kind):
    """So that tables can be put together and sent to other processes."""
    monkeypatch.setattr(image_table, "BATCH", 10)
    source = breast if kind == "folder" else Path(shutil.make_archive(str(tmp_path / "x"), kind, breast))
    scan = scan_sources([source], layout=BREAST_LAYOUT)
    assert len(scan.files) == 55
    assert dict(zip(scan.files.column_names, scan.files.schema.types, strict=True)) == LOCATION | dict.fromkeys(
        scan.fields, WORDS
    )
    container = None if kind == "folder" else os.fsencode(source)
    assert set(scan.files["container"].to_pylist()) == {container}
    classes = [name.split("/")[-4] for name in source_names(scan.files)]
    assert scan.files["class"].to_pylist() == classes
    columns = scan.files.column_names[:4]
    with FileReader() as reader:
        for name, *place in zip(source_names(scan.files), *(scan.files[c].to_pylist() for c in columns), strict=True):
            assert reader.read(*place) == (breast / os.path.relpath(name, source)).read_bytes()


def test_several_sources_are_one_set(tmp_path):
    one = write_tree(tmp_path / "one", {"b/1.jpg": b"1", "a/1.jpg": b"2"})
    two = write_tar(tmp_path / "two.tar", [(b"a/1.jpg", b"3"), (b"c/1.jpg", b"4")])
    three = write_tree(tmp_path / "three", {"a/1.jpg": b"5"})
    scan = scan_sources([two, one, three])
    names = [f"{two}/a/1.jpg", f"{two}/c/1.jpg", f"{one}/a/1.jpg", f"{one}/b/1.jpg", f"{three}/a/1.jpg"]
    assert source_names(scan.files) == names
    assert scan.files["class"].to_pylist() == ["a", "c", "a", "b", "a"]
    assert scan_sources([one, three]).files["container"].null_count == 3


def test_group_and_split_may_be_captured(tmp_path):
    root = write_tree(tmp_path, {"train/p1/a/1.jpg": b"", "test/p2/b/2.jpg": b""})
    scan = scan_sources([root], layout="{split}/{group}/{class}/{name}")
    assert scan.files.select(scan.fields).to_pylist() == [
        {"split": "test", "group": "p2", "class": "b"},
        {"split": "train", "group": "p1", "class": "a"},
    ]


def test_what_is_left_out_is_counted_and_said(tmp_path):
    names = ["a/1.jpg", "a/2.PNG", "a/.3.jpg", ".hidden/4.jpg", "a/notes.txt", "a/Thumbs.db", "a/README", "top.jpg"]
    write_tree(tmp_path, dict.fromkeys(names, b"x"))
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    scan = scan_sources([str(tmp_path)])
    assert relative(scan, tmp_path) == ["a/1.jpg", "a/2.PNG"]
    notes = "\n".join(scan.notes)
    assert "2 files skipped by extension: 1 without extension, 1 .txt" in notes
    assert "1 system file or folder skipped (1 Thumbs.db): --system-files packs them" in notes
    assert "2 hidden entries" in notes
    assert "1 file skipped: neither a file nor a folder" in notes
    assert "1 file left out: the layout does not match, for example 'top.jpg'" in notes


RUBBISH = [
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "$Recycle.Bin",
    ".Trashes",
    "__MACOSX",
    "System Volume Information",
    "lost+found",
]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_thumbnails_and_deleted_files_are_no_data(tmp_path, kind):
    images = ["a/1.jpg", "a@eaDir/2.jpg", "recycle/3.jpg"]  # the last two only look like it
    rubbish = [f"{place}{name}/b/thumb.jpg" for name in RUBBISH for place in ("", "a/")]
    rubbish += ["Lightroom Previews.lrdata/0/x.jpg", "a/Thumbs.db", "__macosx/a/._1.jpg", "a/._1.jpg"]
    source = write_tree(tmp_path / "in", dict.fromkeys(images + rubbish, b"x"))
    if kind != "folder":
        source = Path(shutil.make_archive(str(tmp_path / "x"), kind, source))
    scan = scan_sources([source])
    assert relative(scan, source) == images
    assert set(scan.files["class"].to_pylist()) == {name.split("/")[0] for name in images}
    (note,) = (note for note in scan.notes if "--system-files" in note)
    for name in {*RUBBISH, "Lightroom Previews.lrdata", "Thumbs.db"} - {".Trashes"}:
        assert f" {name}" in note
    every = scan_sources([source], layout="regex:^(?P<class>[^/]+)/", system_files=True)
    assert len(every.files) == len(images) + 2 * len(RUBBISH) - 2 + 1
    assert not any("--system-files" in note for note in every.notes)


def test_a_class_without_an_image_is_named(tmp_path):
    root = tmp_path / "in"
    write_tree(root, {"a/1.jpg": b"x", "only text/notes.txt": b"x", "deep/slide/1.jpg": b"x", "empty/in/none.svs": b"x"})
    (root / "nothing").mkdir()
    assert "no image was taken from 4 folders: deep, empty, nothing, only text" in scan_sources([root]).notes
    assert not any("was taken from" in note for note in scan_sources([root], labelled=False).notes)
    archive = shutil.make_archive(str(tmp_path / "x"), "zip", root)
    assert "no image was taken from 3 folders: deep, empty, only text" in scan_sources([archive]).notes

    root = write_tree(tmp_path / "splits", {"test/a/1.jpg": b"x", "test/b/1.txt": b"x", "validation/a/x/1.jpg": b"x"})
    (root / "train" / "a").mkdir(parents=True)
    notes = scan_sources([root], layout="{split}/{class}/{name}").notes
    assert "no image was taken from 3 folders: test/b, train, validation" in notes


def test_a_linked_folder_is_followed_once_and_loops_end(tmp_path):
    write_tree(tmp_path, {"in/a/1.jpg": b"x", "elsewhere/2.jpg": b"x"})
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    scan = scan_sources([str(tmp_path / "in")], labelled=False)
    assert relative(scan, tmp_path / "in") == ["a/1.jpg", "b/2.jpg"]
    assert any("2 folders were reached again" in note for note in scan.notes)


def test_a_dangling_link_to_an_image_is_not_lost(tmp_path):
    write_tree(tmp_path, {"a/1.jpg": b"x"})
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "nowhere.jpg")
    scan = scan_sources([str(tmp_path)])
    assert scan.files["size"].to_pylist() == [1, -1]


def test_an_archive_among_the_images_is_not_opened_and_said(tmp_path):
    write_tree(tmp_path, {"a/1.jpg": b"x", "a/more.zip": b"x"})
    (note,) = scan_sources([tmp_path]).notes
    assert note == f"1 archive in the folders was not opened, for example {tmp_path}/a/more.zip: to pack it, give it as a source"


def test_where_keeps_what_it_says(breast):
    one = scan_sources([str(breast)], layout=BREAST_LAYOUT, where=["slide=S B1"])
    assert set(one.files["slide"].to_pylist()) == {"S B1"}
    assert f"{55 - len(one.files)} files left out by --where" in one.notes
    either = scan_sources([str(breast)], layout=BREAST_LAYOUT, where=["slide=S B1", "slide=S I0"])
    assert set(either.files["slide"].to_pylist()) == {"S B1", "S I0"}
    neither = scan_sources([str(breast)], layout=BREAST_LAYOUT, where=["slide!=S B1", "slide!=S I0"])
    assert len(neither.files) + len(either.files) == 55


def test_where_knows_the_name_too_though_it_is_no_column(breast):
    scan = scan_sources([str(breast)], layout=BREAST_LAYOUT, where=["name=patch x40 (2)"])
    assert len(scan.files) == 9  # one on each slide
    assert scan.fields == ("class", "slide", "magnification")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(sources=[]), "no source"),
        (dict(sources=["{root}/nowhere"]), "no such folder"),
        (dict(sources=["{root}/Benign/S B0/x40/patch x40 (0).png"]), "is a file"),
        (dict(sources=["{root}/empty"]), "no image"),
        (dict(sources=["{root}", "{root}/Benign"]), "reached again"),
        (dict(sources=["{root}/x.tar", "{root}/x.tar"]), "given twice"),
        (dict(sources=["{root}/pipe"]), "neither a folder nor a file"),
        (dict(layout="{class}/{name}"), "such as 'Benign/S B0/x40/patch x40 (0).png'"),
        (dict(layout="{slide}/{a}/{b}/{name}"), "--unlabelled"),
        (dict(where=["magnification"]), "field=value"),
        (dict(where=["stain=HE"]), "class, slide, magnification, name"),
        (dict(layout="{class}/{slide}/{key}/{name}"), "'key'"),
        (dict(where=["magnification=x20"]), "is one of x40"),
        (dict(where=["slide=S B0", "class=In situ"]), "all conditions at once"),
    ],
)
def test_a_users_mistake_is_one_sentence(breast, settings, words):
    (breast / "empty").mkdir()
    os.mkfifo(breast / "pipe")
    write_tar(breast / "x.tar", [(b"a/b/c/1.jpg", b"x")])
    settings = {"sources": ["{root}"], "layout": BREAST_LAYOUT, **settings}
    settings["sources"] = [source.format(root=breast) for source in settings["sources"]]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        scan_sources(**settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(paths=st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=4))
def test_files_of_any_name_are_found_and_read(paths):
    """And shown and stored as text, from which a table can be written."""
    with tempfile.TemporaryDirectory() as root:
        contents = set()
        for number, (*folders, name) in enumerate(paths):
            folder = os.path.join(os.fsencode(root), *folders)
            with contextlib.suppress(OSError):  # there may be a file where a folder should be
                os.makedirs(folder, exist_ok=True)
                with open(os.path.join(folder, name + b".jpg"), "xb") as file:
                    file.write(b"%d" % number)
                contents.add(b"%d" % number)
        files = scan_sources([root], labelled=False).files
        with FileReader() as reader:
            rows = zip(*(files[column].to_pylist() for column in LOCATION), strict=True)
            assert {reader.read(*row) for row in rows} == contents
        "".join(source_names(files)).encode()
