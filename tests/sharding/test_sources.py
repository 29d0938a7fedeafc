"""A scan finds every image, in an order that depends on names alone, and says what it leaves out."""

import os

import pytest

from sharding.sources import scan_sources
from tests.helpers import BREAST_LAYOUT, write_tree


def relative(scan, root):
    return [os.path.relpath(record.path, root) for record in scan.records]


def test_records_are_sorted_and_carry_fields(breast):
    scan = scan_sources([str(breast)], layout=BREAST_LAYOUT)
    paths = relative(scan, breast)
    assert len(paths) == 55
    assert paths == sorted(paths)
    assert scan.notes == []
    record = scan.records[paths.index("종양 (tumour)/S 종1/x40/patch x40 (2).jpg")]
    assert record.fields == {"class": "종양 (tumour)", "slide": "S 종1", "magnification": "x40", "name": "patch x40 (2)"}
    assert record.source == str(breast / "종양 (tumour)/S 종1/x40/patch x40 (2).jpg")


def test_what_is_left_out_is_counted_and_said(tmp_path):
    names = ["a/1.jpg", "a/2.PNG", "a/.3.jpg", ".hidden/4.jpg", "a/notes.txt", "a/Thumbs.db", "a/README", "top.jpg"]
    write_tree(tmp_path, dict.fromkeys(names, b"x"))
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    scan = scan_sources([str(tmp_path)])
    assert relative(scan, tmp_path) == ["a/1.jpg", "a/2.PNG"]
    notes = "\n".join(scan.notes)
    assert "3 files skipped by extension: 1 without extension, 1 .db, 1 .txt" in notes
    assert "2 hidden entries" in notes
    assert "1 file skipped: neither a file nor a folder" in notes
    assert "1 file left out: the layout does not match, for example 'top.jpg'" in notes


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
    assert len(scan_sources([str(tmp_path)]).records) == 2


def test_where_keeps_what_it_says(breast):
    one = scan_sources([str(breast)], layout=BREAST_LAYOUT, where=["slide=S B1"])
    assert {record.fields["slide"] for record in one.records} == {"S B1"}
    assert f"{55 - len(one.records)} files left out by --where" in one.notes
    either = scan_sources([str(breast)], layout=BREAST_LAYOUT, where=["slide=S B1", "slide=S I0"])
    assert {record.fields["slide"] for record in either.records} == {"S B1", "S I0"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(sources=[]), "no source"),
        (dict(sources=["{root}/nowhere"]), "no such folder"),
        (dict(sources=["{root}/Benign/S B0/x40/patch x40 (0).png"]), "is a file"),
        (dict(sources=["{root}/empty"]), "no image"),
        (dict(sources=["{root}", "{root}/Benign"]), "reached again"),
        (dict(layout="{class}/{name}"), "not 'Benign/S B0/x40/patch x40 (0).png'"),
        (dict(layout="{slide}/{a}/{b}/{name}"), "--unlabelled"),
        (dict(where=["magnification"]), "field=value"),
        (dict(where=["stain=HE"]), "class, slide, magnification, name"),
        (dict(where=["magnification=x20"]), "is one of x40"),
        (dict(where=["slide=S B0", "class=In situ"]), "all conditions at once"),
    ],
)
def test_a_users_mistake_is_one_sentence(breast, settings, words):
    (breast / "empty").mkdir()
    settings = {"sources": ["{root}"], "layout": BREAST_LAYOUT, **settings}
    settings["sources"] = [source.format(root=breast) for source in settings["sources"]]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        scan_sources(**settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
