"""A set that is there: left alone, refused where it is another one, or grown without a change to what it has."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from sharding.manifest import class_names, fingerprint, read_dataset, read_manifest
from sharding.packing import build_shards
from sharding.verification import verify
from tests.helpers import BREAST_LAYOUT, breast_files, encoded, folder_bytes, write_tree

SETTINGS = dict(layout=BREAST_LAYOUT, split="train=0.8,test=0.2", shard_patches=20)


def test_a_set_that_is_there_is_left_alone(breast, tmp_path):
    shards = tmp_path / "set"
    build_shards([breast], shards, **SETTINGS)
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    for append in (False, True):
        summary = build_shards([breast], shards, **SETTINGS, append=append)
        assert summary.was_there
        assert (summary.packed, summary.added) == (55, 0)
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.parametrize("change", ["add", "remove", "edit", "seed", "mend", "encode"])
def test_a_set_of_something_else_is_not_overwritten(breast, tmp_path, change):
    (breast / "Benign/S B0/x40/broken.jpg").write_bytes(b"")
    shards, settings = tmp_path / "set", dict(SETTINGS)
    build_shards([breast], shards, **settings)
    before = folder_bytes(shards)
    image = breast / "Benign/S B0/x40/patch x40 (0).png"
    match change:
        case "add":
            (image.parent / "new.jpg").write_bytes(encoded(999))
        case "remove":
            image.unlink()
        case "edit":
            image.write_bytes(encoded(999, format="PNG"))
        case "mend":
            (image.parent / "broken.jpg").write_bytes(encoded(999))
        case "seed":
            settings["seed"] = 43
        case "encode":
            settings["encode"] = "jpeg:95"
    with pytest.raises(ValueError, match="choose another --out") as caught:
        build_shards([breast], shards, **settings)
    assert ("--append" in str(caught.value)) == (change in ("add", "mend"))
    assert folder_bytes(shards) == before


def test_an_edited_table_is_another_set(breast, tmp_path):
    table, shards = tmp_path / "labels.csv", tmp_path / "set"
    paths = sorted(path.relative_to(breast).as_posix() for path in breast.rglob("*.*"))
    table.write_text("path,class\n" + "".join(f'"{path}",{"ab"[i % 2]}\n' for i, path in enumerate(paths)), encoding="utf-8")
    build_shards([breast], shards, table=table)
    assert build_shards([breast], shards, table=table).was_there
    table.write_text(table.read_text(encoding="utf-8").replace(f'"{paths[7]}",b', f'"{paths[7]}",a'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has class a now and had b") as caught:
        build_shards([breast], shards, table=table)
    assert paths[7] in str(caught.value)


def rows_of(shards):
    return read_manifest(shards).to_pylist()


def grow(breast, shards, **files):
    write_tree(breast, files)
    return build_shards([breast], shards, **SETTINGS, append=True)


def test_new_patches_come_after_the_old_ones_in_shards_of_their_own(breast, tmp_path):
    shards = tmp_path / "set"
    build_shards([breast], shards, **SETTINGS)
    old, old_rows = folder_bytes(shards), rows_of(shards)
    inodes = {path.name: path.stat().st_ino for path in shards.glob("*.tar")}
    first_print = fingerprint(shards)
    write_tree(
        breast, {f"Benign/S B7/x40/new ({i}).jpg": encoded(5000 + i) for i in range(25)} | {"Benign/S B7/x40/bad.jpg": b""}
    )
    summary = build_shards([breast], shards, **SETTINGS, append=True)
    assert (summary.added, summary.packed, summary.quarantined, summary.found) == (25, 80, 1, 81)
    assert any("55 of 81 images are in the set already" in note for note in summary.notes)

    rows = rows_of(shards)
    assert rows[:55] == old_rows
    assert [row["id"] for row in rows] == list(range(80))
    assert {row["shard"] for row in rows[55:]} == {3, 4}
    assert len({row["key"] for row in rows}) == 80
    assert {row["class"] for row in rows[55:]} == {"Benign"}
    for name, data in old.items():
        if name.startswith("shard-"):
            assert (shards / name).read_bytes() == data
    assert {name: (shards / name).stat().st_ino for name in inodes} == inodes  # nothing was copied
    assert fingerprint(shards) != first_print
    assert read_dataset(shards)["appended"][0]["patches"] == 25
    assert not (tmp_path / "set.partial").exists()
    verify(shards)
    # The totals come as near to the shares as they can.
    counts = read_dataset(shards)["counts"]
    assert (counts["train"]["Benign"], counts["test"]["Benign"]) == (36, 9)
    # And the same once more adds nothing; a second growth adds to both.
    assert build_shards([breast], shards, **SETTINGS, append=True).was_there
    write_tree(breast, {"In situ/S I9/x40/last.jpg": encoded(7000)})
    assert build_shards([breast], shards, **SETTINGS, append=True).added == 1
    assert [growth["first_id"] for growth in read_dataset(shards)["appended"]] == [55, 80]
    verify(shards)


def test_growing_gives_the_same_bytes_whatever_the_workers(breast, tmp_path):
    for name in ("one", "two"):
        build_shards([breast], tmp_path / name / "set", **SETTINGS)
    write_tree(breast, {f"Benign/S B7/x40/new ({i}).jpg": encoded(5000 + i) for i in range(25)})
    build_shards([breast], tmp_path / "one" / "set", **SETTINGS, append=True)
    build_shards([breast], tmp_path / "two" / "set", **SETTINGS, append=True, workers=2)
    assert folder_bytes(tmp_path / "one" / "set") == folder_bytes(tmp_path / "two" / "set")


def test_a_slide_and_a_copy_stay_on_the_side_where_they_are(breast, tmp_path):
    shards = tmp_path / "set"
    settings = SETTINGS | dict(group_by="slide")
    build_shards([breast], shards, **settings)
    sides = {row["group"]: row["split"] for row in rows_of(shards)}
    new = {
        f"Benign/{slide}/x40/more ({i}).jpg": encoded(9000 + 10 * j + i)
        for j, slide in enumerate(sorted(sides))
        for i in range(3)
    }
    test_image = next(row for row in rows_of(shards) if row["split"] == "test")
    with open(test_image["source"], "rb") as file:
        new["Benign/S copies/x40/copy.jpg"] = file.read()
    write_tree(breast, new)
    build_shards([breast], shards, **settings, append=True)
    for row in rows_of(shards)[55:]:
        assert row["split"] == ("test" if row["group"] == "S copies" else sides[row["group"]])


def test_a_new_class_gets_the_next_label(breast, tmp_path):
    shards = tmp_path / "set"
    build_shards([breast], shards, **SETTINGS)
    before = class_names(shards)
    write_tree(breast, {f"Adenoma/S A{i}/x40/p.jpg": encoded(8000 + i) for i in range(5)})
    summary = build_shards([breast], shards, **SETTINGS, append=True)
    assert class_names(shards) == [*before, "Adenoma"]
    assert summary.counts["train"]["Adenoma"] == 4
    rows = rows_of(shards)
    assert all(row["label"] == class_names(shards).index(row["class"]) for row in rows)
    assert np.bincount([row["label"] for row in rows])[3] == 5
    verify(shards)


def test_a_mended_file_leaves_the_quarantine(breast, tmp_path):
    shards, broken = tmp_path / "set", breast / "Benign/S B0/x40/broken.jpg"
    broken.write_bytes(b"")
    write_tree(breast, {"Benign/S B0/x40/still.jpg": b""})
    build_shards([breast], shards, **SETTINGS)
    broken.write_bytes(encoded(999))
    summary = build_shards([breast], shards, **SETTINGS, append=True)
    assert (summary.added, summary.packed, summary.quarantined) == (1, 56, 1)
    assert [row["source"] for row in pq.read_table(shards / "quarantine.parquet").to_pylist()] == [
        str(broken.with_name("still.jpg"))
    ]
    assert rows_of(shards)[-1]["source"] == str(broken)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(seed=1), "--seed 42, not 1"),
        (dict(split="train=0.5,test=0.5"), "--split train=0.8,test=0.2"),
        (dict(unlabelled=True), "--unlabelled"),
        (dict(layout="{class}/{slide}/{zoom}/{name}"), "further columns slide, magnification"),
    ],
)
def test_what_cannot_change_when_a_set_grows(breast, tmp_path, settings, words):
    shards = tmp_path / "set"
    build_shards([breast], shards, **SETTINGS)
    before = folder_bytes(shards)
    write_tree(breast, {"Benign/S B0/x40/new.jpg": encoded(999)})
    with pytest.raises(ValueError, match=words):
        build_shards([breast], shards, **SETTINGS | settings, append=True)
    assert folder_bytes(shards) == before


def test_nothing_to_grow(breast, tmp_path):
    with pytest.raises(ValueError, match="without --append"):
        build_shards([breast], tmp_path / "set", **SETTINGS, append=True)


def test_a_growth_that_was_cut_off_goes_on(breast, tmp_path, monkeypatch):
    from sharding import packing

    shards = tmp_path / "set"
    build_shards([breast], shards, **SETTINGS)
    other = shutil.copytree(shards, tmp_path / "other" / "set")
    before = folder_bytes(shards)
    write_tree(breast, breast_files({"Benign": 90}))
    monkeypatch.setattr(packing, "publish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_shards([breast], shards, **SETTINGS, append=True)
    assert folder_bytes(shards) == before  # until the last moment the old set is the set
    monkeypatch.undo()
    notes = {path.name: path.stat().st_ino for path in tmp_path.joinpath("set.partial").glob("shard-*.tar")}
    build_shards([breast], shards, **SETTINGS, append=True)
    build_shards([breast], other, **SETTINGS, append=True)
    assert folder_bytes(shards) == folder_bytes(other)
    assert {name: (shards / name).stat().st_ino for name in notes} == notes


def test_a_set_whose_values_were_packed_as_written_is_found_and_grows(tmp_path, monkeypatch):
    """Earlier versions packed `S1 ` and `A ` with their blanks."""

    def tree(*numbers):
        return {f"{'AB'[i % 2]} /S{i % 6}\u00a0/x40/{i}.jpg": encoded(i) for i in numbers}

    write_tree(tmp_path / "in", tree(*range(24)))
    settings = dict(layout=BREAST_LAYOUT, group_by="slide", split="train=0.5,test=0.5")
    with monkeypatch.context() as patch:
        patch.setattr("sharding.field_values.normalized", lambda value: value)
        build_shards([tmp_path / "in"], tmp_path / "set", **settings)
    before = rows_of(tmp_path / "set")
    splits = {row["group"]: row["split"] for row in before}
    assert class_names(tmp_path / "set") == ["A ", "B "]
    assert len(splits) == 6
    assert all(name.endswith("\u00a0") for name in splits)
    assert build_shards([tmp_path / "in"], tmp_path / "set", **settings).was_there

    write_tree(tmp_path / "in", tree(*range(24, 36)) | {"A/S0/x40/other.jpg": encoded(99), "C /S9 /x40/new.jpg": encoded(98)})
    assert build_shards([tmp_path / "in"], tmp_path / "set", **settings, append=True).added == 14
    rows = rows_of(tmp_path / "set")
    assert rows[:24] == before
    assert class_names(tmp_path / "set") == ["A ", "B ", "C"]
    assert {row["group"] for row in rows} == {*splits, "S9"}
    assert all(row["split"] == splits[row["group"]] for row in rows if row["group"] != "S9")
    verify(tmp_path / "set")
    assert build_shards([tmp_path / "in"], tmp_path / "set", **settings, append=True).was_there
