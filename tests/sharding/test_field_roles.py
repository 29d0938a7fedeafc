"""One slide never lies in two splits because its name is written in two ways, and "no value" is no value."""

import pytest

from sharding.manifest import class_names, read_manifest
from sharding.packing import build_shards
from tests.helpers import encoded, write_tree


def build(tmp_path, lines, **settings):
    """Pack images with a table of these lines, written as `class,slide,split`."""
    write_tree(tmp_path / "in", {f"{i}.jpg": encoded(i) for i in range(len(lines))})
    rows = "".join(f"{i}.jpg,{line}\n" for i, line in enumerate(lines))
    (tmp_path / "labels.csv").write_text("path,class,slide,fold\n" + rows, encoding="utf-8")
    settings = {"table": tmp_path / "labels.csv", "group_by": "slide"} | settings
    return build_shards([tmp_path / "in"], tmp_path / "set", **settings)


def test_a_slide_is_in_one_split_however_its_name_is_written(tmp_path):
    ways = ["S{}", "S{} ", "S{}\u00a0", "S{}.0", "\u200bs{}", "Ｓ{}"]
    lines = [f"a,{way.format(slide)},x" for slide in range(6) for way in ways]
    summary = build(tmp_path, lines, split="train=0.5,test=0.5")
    rows = read_manifest(tmp_path / "set").to_pylist()
    assert sorted({row["group"] for row in rows}) == sorted(way.format(i) for i in range(6) for way in ("S{}", "S{}.0", "s{}"))
    splits = {}
    for row in rows:
        splits.setdefault(int(row["source"].split("/")[-1].removesuffix(".jpg")) // len(ways), set()).add(row["split"])
    assert sorted(map(len, splits.values())) == [1] * 6
    notes = "\n".join(summary.notes)
    assert "every slide is whole in one split" in notes
    assert "slide: 6 values are written in several ways that look the same" in notes
    assert "slide: 12 values differ from another one only in case" in notes


def test_classes_that_look_the_same_are_one(tmp_path):
    write_tree(
        tmp_path / "in",
        {f"{name}/{i}.jpg": encoded(10 * j + i) for j, name in enumerate(["A", "A ", "B\u3000", "Ｂ"]) for i in range(3)},
    )
    summary = build_shards([tmp_path / "in"], tmp_path / "set")
    assert class_names(tmp_path / "set") == ["A", "B"]
    assert summary.counts == {"train": {"A": 6, "B": 6}}
    sources = read_manifest(tmp_path / "set")["source"].to_pylist()
    assert f"{tmp_path}/in/A /4.jpg" not in sources  # paths are as they are
    assert f"{tmp_path}/in/A /1.jpg" in sources
    assert build_shards([tmp_path / "in"], tmp_path / "set").was_there


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a,S1,train", "a,S1.0,test"], "'S1' is in train and 'S1.0' in test, but they look like one slide"),
        (["a,S1,train", "a,s1,test"], "'S1' is in train and 's1' in test"),
        (
            ["a,S1,train", "a,S2,Train", "a,S3,test"],
            "the splits 'Train' and 'train' look like one: use one name in 'fold'",
        ),
        (["a,S1,train", "NaN,S2,test"], "1 image has the class 'NaN', for example {root}/in/1.jpg"),
        (["-1,S1,train", "-1,S2,test", "0,S3,test"], "2 images have the class '-1'.* --where 'class!=-1'"),
        (["a,nan,train", "a,S2,test"], "the slide 'nan'"),
        (["a,S1,train", "a,S2,#N/A"], "the fold '#N/A'"),
    ],
)
def test_a_mistake_of_the_table_is_refused_before_packing(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words.format(root=tmp_path)):
        build(tmp_path, lines, split="column:fold")
    assert not (tmp_path / "set.partial").exists()


def test_the_ways_out(tmp_path):
    build(tmp_path, ["a,S1,train", "-1,S2,test", "b,S3,test"], split="column:fold", where=["class!=-1"])
    assert class_names(tmp_path / "set") == ["a", "b"]


def test_a_given_split_of_slides_by_patch_is_reported_only(tmp_path):
    """Where slides are divided on purpose, two ways to write one are no mistake of the split."""
    summary = build(tmp_path, ["a,S1,train", "a,S1,test", "a,S2,train", "a,s2,test"], split="column:fold")
    assert "2 of 2 test patches share a group with train patches" in summary.notes
    assert summary.counts == {"train": {"a": 2}, "test": {"a": 2}}


def test_numbers_that_a_spreadsheet_made_are_said(tmp_path):
    summary = build(tmp_path, ["a,1.0,x", "a,2.0,x", "a,3,x"])
    assert any(
        note.startswith("slide: a spreadsheet seems to have turned text into numbers, for example '1.0'")
        for note in summary.notes
    )


def test_a_split_without_a_patch_is_named(tmp_path):
    summary = build(tmp_path, ["a,S1,x"] * 4, split="train=0.8,test=0.2")
    assert "the split 'test' has no patch (requested: 20.0%)" in summary.notes
    summary = build(tmp_path / "given", ["a,S1,train", "a,S2,test"], split="column:fold")
    assert not any("has no patch" in note for note in summary.notes)
    (tmp_path / "given/in/1.jpg").write_bytes(b"")
    summary = build_shards(
        [tmp_path / "given/in"], tmp_path / "other", table=tmp_path / "given/labels.csv", group_by="slide", split="column:fold"
    )
    assert "the split 'test' has no patch (all of its images were refused)" in summary.notes


def test_a_set_grows_whose_given_splits_separate_a_slide(tmp_path, monkeypatch):
    """Earlier versions packed it so. A new slide of this kind is refused."""
    lines = ["a,S1,train", "a,s1,test", "a,S2,train"]
    with monkeypatch.context() as patch:
        patch.setattr("sharding.packing.check_values", lambda *_: [])
        build(tmp_path, lines, split="column:fold")
    assert build(tmp_path, [*lines, "a,S3,test"], split="column:fold", append=True).added == 1
    with pytest.raises(ValueError, match="'S2' is in train and 's2' in test"):
        build(tmp_path, [*lines, "a,S3,test", "a,s2,test"], split="column:fold", append=True)
