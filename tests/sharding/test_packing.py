"""A built set is complete, exact, readable by others, the same every time, and never half there."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from sharding import packing, writing
from sharding.manifest import COLUMNS, class_names, fingerprint, read_dataset, read_manifest
from sharding.packing import build_shards
from sharding.plan import sample_key, shard_of_each
from tests.helpers import BREAST_LAYOUT, ROOT, breast_files, encoded, folder_bytes, write_tree

SETTINGS = dict(layout=BREAST_LAYOUT, split="train=0.8,test=0.2", shard_patches=20)


@pytest.fixture
def shards(breast, tmp_path):
    """55 patches of three classes in 3 shards."""
    build_shards([breast], tmp_path / "set", **SETTINGS)
    return tmp_path / "set"


def test_every_patch_is_there_with_its_bytes(breast, shards):
    manifest = read_manifest(shards)
    assert manifest.column_names == [*COLUMNS, "slide", "magnification"]
    rows = manifest.to_pylist()
    assert sorted(row["source"] for row in rows) == sorted(str(path) for path in breast.rglob("*.*"))
    assert [row["id"] for row in rows] == list(range(55))
    assert [row["shard"] for row in rows] == sorted(row["shard"] for row in rows)
    assert sorted(os.listdir(shards)) == sorted(
        ["dataset.json", "manifest.parquet", "quarantine.parquet"]
        + [f"shard-{i:06d}.{e}" for i in range(3) for e in ("tar", "idx")]
    )
    for row in rows:
        data = (shards / f"shard-{row['shard']:06d}.tar").read_bytes()[row["offset"] : row["offset"] + row["size"]]
        with open(row["source"], "rb") as file:
            assert data == file.read()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["class"] == os.path.relpath(row["source"], breast).split("/")[0]
        assert row["label"] == class_names(shards).index(row["class"])
        assert (row["width"], row["height"]) == (16, 12)
        assert row["format"] == ("png" if row["source"].endswith("png") else "jpeg")
        assert row["magnification"] == "x40"
        assert row["group"] is None
    assert class_names(shards) == sorted(["Benign", "종양 (tumour)", "In situ"])


def test_the_stored_order_is_mixed(shards):
    labels = read_manifest(shards)["label"].to_numpy()
    assert (np.diff(labels) != 0).sum() > 15  # 2 if sorted, about 35 if mixed


def test_dataset_json_holds_the_sum_of_every_file(shards):
    dataset = read_dataset(shards)
    for name in set(os.listdir(shards)) - {"dataset.json"}:
        assert dataset["files"].pop(name) == hashlib.sha256((shards / name).read_bytes()).hexdigest()
    assert dataset["files"] == {}
    assert dataset["patches"] == 55
    assert dataset["counts"] == {
        "train": {"Benign": 16, "In situ": 10, "종양 (tumour)": 18},
        "test": {"Benign": 4, "In situ": 2, "종양 (tumour)": 5},
    }


def test_webdataset_reads_every_sample(shards):
    urls = [str(shards / f"shard-{i:06d}.tar") for i in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    rows = read_manifest(shards).to_pylist()
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["cls"].decode() == str(row["label"])
        image = sample["jpg" if row["format"] == "jpeg" else "png"]
        assert hashlib.sha256(image).hexdigest() == row["sha256"]


def test_dalis_own_reader_reads_every_sample_by_our_index(tmp_path):
    from nvidia.dali import fn, pipeline_def, types

    files = {path: data for path, data in breast_files({"a": 20, "b": 17}).items() if path.endswith("jpg")}
    build_shards([write_tree(tmp_path / "in", files)], tmp_path / "set", layout=BREAST_LAYOUT, shard_patches=9)
    shards, manifest = tmp_path / "set", read_manifest(tmp_path / "set")
    number = read_dataset(shards)["shards"]
    assert number == 3

    @pipeline_def(batch_size=len(manifest), num_threads=1, device_id=None)
    def read():
        jpg, label = fn.readers.webdataset(
            paths=[str(shards / f"shard-{i:06d}.tar") for i in range(number)],
            index_paths=[str(shards / f"shard-{i:06d}.idx") for i in range(number)],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        return jpg, label, fn.decoders.image(jpg, output_type=types.RGB)

    pipeline = read()
    pipeline.build()
    images, labels, decoded = pipeline.run()
    for i, row in enumerate(manifest.to_pylist()):
        assert hashlib.sha256(images.at(i).tobytes()).hexdigest() == row["sha256"]
        assert labels.at(i).tobytes().decode() == str(row["label"])
        assert decoded.at(i).shape == (row["height"], row["width"], 3)


def test_the_tar_is_plain_ustar_without_a_trace_of_when_and_who(shards):
    path = shards / "shard-000000.tar"
    assert path.stat().st_size % 10240 == 0
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(path) as archive:
        for info in archive:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
            assert info.isreg()
            assert re.fullmatch(r"\d{9}_[A-Za-z0-9_-]{1,48}\.(jpg|png|cls)", info.name)


def test_the_same_bytes_whatever_the_workers_and_again(breast, shards, tmp_path):
    build_shards([breast], tmp_path / "two" / "set", workers=2, **SETTINGS)
    assert folder_bytes(tmp_path / "two" / "set") == folder_bytes(shards)
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    assert fingerprint(moved) == fingerprint(shards)
    build_shards([breast], tmp_path / "other", **SETTINGS, seed=43)
    assert fingerprint(tmp_path / "other") != fingerprint(shards)


def test_a_set_that_is_there_is_left_alone(breast, shards):
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    summary = build_shards([breast], shards, **SETTINGS)
    assert summary.was_there
    assert summary.packed == 55
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.parametrize("change", ["add", "remove", "edit", "seed", "mend"])
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
    with pytest.raises(ValueError, match="choose another --out"):
        build_shards([breast], shards, **settings)
    assert folder_bytes(shards) == before


def test_refused_images_are_listed_and_everything_adds_up(breast, tmp_path):
    bad = {
        "Benign/S B0/x40/cut.jpg": encoded(1)[:-2],
        "Benign/S B0/x40/empty.png": b"",
        "In situ/S I0/x40/really.gif": encoded(1, format="GIF"),
    }
    write_tree(breast, bad)
    (breast / "In situ/S I0/x40/gone.jpg").symlink_to("/nowhere/gone.jpg")
    summary = build_shards([breast], tmp_path / "set", **SETTINGS)
    assert (summary.found, summary.packed, summary.quarantined) == (59, 55, 4)
    rows = pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()
    assert {os.path.relpath(row["source"], breast): row["reason"] for row in rows} == {
        "Benign/S B0/x40/cut.jpg": "undecodable",
        "Benign/S B0/x40/empty.png": "empty",
        "In situ/S I0/x40/really.gif": "not a JPEG or PNG",
        "In situ/S I0/x40/gone.jpg": "unreadable",
    }
    (note,) = (note for note in summary.notes if "refused" in note)
    assert "4 images were refused (1 empty, 1 not a JPEG or PNG, 1 undecodable, 1 unreadable)" in note
    assert "cut.jpg" in note
    assert str(tmp_path / "set" / "quarantine.parquet") in note


def test_strict_writes_nothing(breast, tmp_path):
    write_tree(breast, {"Benign/S B0/x40/cut.jpg": encoded(1)[:-2]})
    with pytest.raises(ValueError, match=r"cut\.jpg .*--strict"):
        build_shards([breast], tmp_path / "new" / "set", **SETTINGS, strict=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_split_by_group_keeps_slides_whole_and_says_what_was_reached(breast, tmp_path):
    summary = build_shards([breast], tmp_path / "set", **SETTINGS, group_by="slide")
    rows = read_manifest(tmp_path / "set").to_pylist()
    sides = {}
    for row in rows:
        assert row["group"] == row["slide"]
        sides.setdefault(row["group"], set()).add(row["split"])
    assert len(sides) == 9
    assert all(len(side) == 1 for side in sides.values())
    assert {(row["class"], row["split"]) for row in rows} == {
        (c, s) for c in class_names(tmp_path / "set") for s in ("train", "test")
    }
    share = sum(row["split"] == "train" for row in rows) / 55
    assert any(f"train / test got {share:.1%} / {1 - share:.1%} (asked: 80.0% / 20.0%)" in note for note in summary.notes)


def test_slides_that_differ_in_case_alone_are_kept_together(tmp_path):
    files = {
        f"a/{slide}/{slide} {i}.jpg": encoded(100 * j + i) for j, slide in enumerate(["S1", "s1", "S2", "s2"]) for i in range(5)
    }
    summary = build_shards(
        [write_tree(tmp_path / "in", files)],
        tmp_path / "set",
        layout="{class}/{slide}/{name}",
        split="train=0.5,test=0.5",
        group_by="slide",
    )
    rows = read_manifest(tmp_path / "set").to_pylist()
    sides = {row["group"]: row["split"] for row in rows}
    assert sides["S1"] == sides["s1"] != sides["S2"] == sides["s2"]
    assert any("2 names of slide differ only in upper and lower case, for example S1 and s1" in note for note in summary.notes)


def test_a_split_by_patch_says_how_many_test_patches_share_a_slide(breast, tmp_path):
    summary = build_shards([breast], tmp_path / "set", **SETTINGS, group_by="slide", split_by="patch")
    rows = read_manifest(tmp_path / "set").to_pylist()
    train = {row["group"] for row in rows if row["split"] == "train"}
    test = [row["group"] for row in rows if row["split"] == "test"]
    shared = sum(group in train for group in test)
    assert shared > 5
    assert f"{shared} of {len(test)} test patches share a group with train patches" in summary.notes


def test_exact_copies_are_said(tmp_path):
    files = {f"{name}/{i}.jpg": encoded(i) for name in "ab" for i in range(10)}
    summary = build_shards([write_tree(tmp_path / "in", files)], tmp_path / "set")
    assert "10 patches are exact copies of another one" in summary.notes
    assert "10 images lie as exact copies in several classes" in summary.notes


def test_unlabelled_takes_any_depth_and_stores_no_class(breast, tmp_path):
    summary = build_shards([breast], tmp_path / "set", unlabelled=True)
    assert summary.counts == {"train": {"": 55}}
    manifest = read_manifest(tmp_path / "set")
    assert set(manifest["label"].to_pylist()) == {-1}
    assert set(manifest["class"].to_pylist()) == {None}
    assert class_names(tmp_path / "set") == []
    with tarfile.open(tmp_path / "set" / "shard-000000.tar") as archive:
        assert not any(name.endswith(".cls") for name in archive.getnames())


def test_a_name_that_is_not_utf8_is_packed_too(tmp_path):
    folder = os.fsencode(tmp_path / "in") + b"/a\xff"
    os.makedirs(folder)
    with open(folder + b"/p\xe9 \n.jpg", "wb") as file:
        file.write(encoded(1))
    build_shards([os.fsdecode(folder)], tmp_path / "set", unlabelled=True)
    (row,) = read_manifest(tmp_path / "set").to_pylist()
    assert row["source"].endswith("a\\xff/p\\xe9 \n.jpg")
    assert row["key"].isascii()


def test_a_worker_that_is_killed_is_one_sentence(breast, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "write_shard", _kill_this_process)
    with pytest.raises(ValueError, match="fewer --workers"):
        build_shards([breast], tmp_path / "set", workers=2, **SETTINGS)
    assert not (tmp_path / "set").exists()


def _kill_this_process(task, *, folder):
    os.kill(os.getpid(), signal.SIGKILL)


# Interrupted builds


def test_a_source_that_changes_or_vanishes_during_the_build_is_named(breast, tmp_path, monkeypatch):
    victim = breast / "Benign/S B0/x40/patch x40 (0).png"
    plan = packing._plan

    def change_then_plan(*arguments):
        victim.write_bytes(encoded(999, format="PNG"))
        return plan(*arguments)

    def remove_then_plan(*arguments):
        victim.unlink()
        return plan(*arguments)

    for disturbed, words in ((change_then_plan, "was changed"), (remove_then_plan, "cannot be read any more")):
        monkeypatch.setattr(packing, "_plan", disturbed)
        with pytest.raises(ValueError, match=words) as caught:
            build_shards([breast], tmp_path / "set", **SETTINGS)
        assert str(victim) in str(caught.value)
        assert not (tmp_path / "set").exists()


KILLED_BUILD = """
import os, signal, sys
from sharding import packing, writing

write, left = writing.write_whole, [int(sys.argv[3])]

def write_or_die(path, blocks):
    # Die in the middle of the file whose turn it is: half of it is on the disk.
    left[0] -= 1
    if left[0] == 0:
        blocks = list(blocks)
        (path.parent / (path.name + ".tmp")).write_bytes(b"".join(blocks)[: len(b"".join(blocks)) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, blocks)

writing.write_whole = packing.write_whole = write_or_die
packing.build_shards([sys.argv[1]], sys.argv[2], layout=sys.argv[4], split="train=0.8,test=0.2", shard_patches=20)
"""


@pytest.mark.parametrize("turn", [1, 2, 4, 7])
def test_a_killed_build_leaves_no_set_and_the_next_one_ends_the_same(breast, shards, tmp_path, turn):
    out = tmp_path / "killed" / "set"
    command = [sys.executable, "-c", KILLED_BUILD, str(breast), str(out), str(turn), BREAST_LAYOUT]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
    partial = out.with_name("set.partial")
    assert not out.exists()
    assert any(path.name.endswith(".tmp") for path in partial.iterdir())
    finished = {path.name: path.stat().st_ino for path in partial.glob("shard-*.tar")}
    build_shards([breast], out, **SETTINGS)
    assert folder_bytes(out) == folder_bytes(shards)
    assert not partial.exists()
    for name, inode in finished.items():
        assert (out / name).stat().st_ino == inode  # kept, not written again


def test_a_damaged_leftover_is_written_again(breast, shards, tmp_path):
    partial = tmp_path / "again" / "set.partial"
    partial.mkdir(parents=True)
    data = bytearray((shards / "shard-000001.tar").read_bytes())
    data[100] ^= 1  # in a header: no patch's sha256 tells
    (partial / "shard-000001.tar").write_bytes(data)
    (partial / "shard-000009.tar").write_bytes(b"of a build with other arguments")
    build_shards([breast], tmp_path / "again" / "set", **SETTINGS)
    assert folder_bytes(tmp_path / "again" / "set") == folder_bytes(shards)


def test_a_strangers_file_is_not_removed(breast, tmp_path):
    write_tree(tmp_path, {"set.partial/thesis.tex": b"years of work"})
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        build_shards([breast], tmp_path / "set", **SETTINGS)
    assert (tmp_path / "set.partial" / "thesis.tex").read_bytes() == b"years of work"


def test_two_builds_at_once_are_refused(breast, tmp_path):
    with writing.partial_folder(tmp_path / "set") as partial:
        with pytest.raises(ValueError, match="another build"):
            build_shards([breast], tmp_path / "set", **SETTINGS)
        assert partial.exists()  # the first build goes on
    build_shards([breast], tmp_path / "set", **SETTINGS)


def test_a_full_disk_is_told_before_anything_is_written(breast, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: type("usage", (), {"free": 50_000})())
    with pytest.raises(ValueError, match="GB free"):
        build_shards([breast], tmp_path / "new" / "set", **SETTINGS)
    assert list((tmp_path / "new").iterdir()) == []


# The manifest of a damaged set


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: shutil.rmtree(s), "no such folder"),
        (lambda s: (s / "dataset.json").unlink(), "not a shard set"),
        (lambda s: (s / "dataset.json").write_text("{"), "damaged"),
        (lambda s: (s / "dataset.json").write_text("[]"), "damaged"),
        (lambda s: (s / "dataset.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda s: (s / "dataset.json").write_text(json.dumps({"format_version": 1})), "damaged"),
        (lambda s: (s / "dataset.json").write_text(json.dumps({"format_version": 2})), "upgrade PatchCLR"),
        (lambda s: (s / "manifest.parquet").unlink(), "missing"),
        (lambda s: (s / "manifest.parquet").write_bytes(b"PAR1 but not really"), "damaged"),
        (lambda s: os.truncate(s / "manifest.parquet", 900), "damaged"),
    ],
)
def test_a_damaged_set_is_one_sentence(shards, damage, words):
    damage(shards)
    with pytest.raises(ValueError, match=words) as caught:
        read_manifest(str(shards))
    assert "\n" not in str(caught.value)
    assert str(shards) in str(caught.value)


# Arithmetic


def test_keys_hold_no_dot_and_no_blank():
    assert sample_key(7, "patch x40 (31).v2.png") == "000000007_patch_x40__31__v2"
    assert sample_key(123456789, "종양.jpg") == "123456789___"
    assert sample_key(0, "x" * 200 + ".jpg") == "000000000_" + "x" * 48


def test_shards_are_even_and_not_tiny():
    sizes = np.full(10_000, 20_000)
    assert np.bincount(shard_of_each(sizes, True, shard_bytes=10**8, shard_patches=None)).tolist() == [3334, 3333, 3333]
    assert np.bincount(shard_of_each(sizes, True, shard_bytes=1, shard_patches=None)).min() >= 256
    assert np.bincount(shard_of_each(sizes[:55], True, shard_bytes=10**8, shard_patches=20)).tolist() == [19, 18, 18]
