"""A built set is complete, exact, readable by others, the same every time, and never half there."""

import hashlib
import json
import os
import re
import shutil
import tarfile

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import webdataset

from sharding.manifest import COLUMNS, class_names, fingerprint, read_dataset, read_manifest
from sharding.packing import build_shards
from sharding.shard_format import sample_key, shard_bounds, tar_member
from tests.helpers import BREAST_LAYOUT, breast_files, encoded, folder_bytes, write_tree

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
        assert (row["converted"], row["source_sha256"], row["psnr"]) == (None, None, None)
        assert row["coding"] == (None if row["format"] == "png" else "baseline 4:2:0")
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
            assert re.fullmatch(r"\d{6}_\d{6}_[A-Za-z0-9_-]{1,48}\.(jpg|png|cls)", info.name)


def test_the_same_bytes_whatever_the_workers_and_again(breast, shards, tmp_path):
    build_shards([breast], tmp_path / "two" / "set", workers=2, **SETTINGS)
    assert folder_bytes(tmp_path / "two" / "set") == folder_bytes(shards)
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    assert fingerprint(moved) == fingerprint(shards)
    build_shards([breast], tmp_path / "other", **SETTINGS, seed=43)
    assert fingerprint(tmp_path / "other") != fingerprint(shards)


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
        "In situ/S I0/x40/really.gif": "undecodable",
        "In situ/S I0/x40/gone.jpg": "unreadable",
    }
    (note,) = (note for note in summary.notes if "refused" in note)
    assert "4 images were refused (1 empty, 2 undecodable, 1 unreadable)" in note
    assert "cut.jpg" in note
    assert str(tmp_path / "set" / "quarantine.parquet") in note


def test_images_of_12_bits_in_16_say_what_to_do(tmp_path):
    samples = np.random.default_rng(1).integers(0, 4096, (12, 16), np.uint16)
    samples[0, 0] = 4095
    PIL.Image.fromarray(samples).save(tmp_path / "camera.png")
    files = {f"a/{i}.png": (tmp_path / "camera.png").read_bytes() for i in range(2)}
    with pytest.raises(
        ValueError, match=r"all 2 images were refused \(2 upper bits unused\), .*lower 12 bits of 16.*by one factor"
    ):
        build_shards([write_tree(tmp_path / "tree", files)], tmp_path / "set")
    write_tree(tmp_path / "tree", {"a/2.png": encoded(1, format="PNG")})
    summary = build_shards([tmp_path / "tree"], tmp_path / "set")
    assert (summary.found, summary.packed, summary.quarantined) == (3, 1, 2)
    assert any("2 upper bits unused" in note for note in summary.notes)


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
    assert any(
        "slide: 2 values differ from another one only in case" in note and "'S1' and 's1'" in note for note in summary.notes
    )


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
    assert "10 images are in several classes as exact copies" in summary.notes


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


# The manifest of a damaged set


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: shutil.rmtree(s), "no such folder"),
        (lambda s: (s / "dataset.json").unlink(), "not a shard set"),
        (lambda s: (s / "dataset.json").write_text("{"), "damaged"),
        (lambda s: (s / "dataset.json").write_text("[]"), "damaged"),
        (lambda s: (s / "dataset.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda s: (s / "dataset.json").write_text(json.dumps({"format_version": 2})), "damaged"),
        (lambda s: (s / "dataset.json").write_text(json.dumps({"format_version": 3})), "upgrade PatchCLR"),
        (lambda s: (s / "dataset.json").write_text(json.dumps({"format_version": 1})), "pack the set again"),
        (lambda s: (s / "manifest.parquet").unlink(), "missing"),
        (lambda s: (s / "manifest.parquet").write_bytes(b"PAR1 but not really"), "changed or damaged"),
        (lambda s: os.truncate(s / "manifest.parquet", 900), "changed or damaged"),
    ],
)
def test_a_damaged_set_is_one_sentence(shards, damage, words):
    damage(shards)
    with pytest.raises(ValueError, match=words) as caught:
        read_manifest(str(shards))
    assert "\n" not in str(caught.value)
    assert str(shards) in str(caught.value)


# Which field is what


def test_a_split_given_by_a_folder(tmp_path):
    files = {
        f"{split}/{label}/{i}.jpg": encoded(100 * j + i)
        for j, split in enumerate(["train", "val"])
        for label in "ab"
        for i in range(4 - j)
    }
    source = write_tree(tmp_path / "in", files)
    summary = build_shards([source], tmp_path / "set", layout="{split}/{class}/{name}")
    assert summary.counts == {"train": {"a": 4, "b": 4}, "val": {"a": 3, "b": 3}}
    assert read_dataset(tmp_path / "set")["arguments"]["split"] == "column:split"
    for row in read_manifest(tmp_path / "set").to_pylist():
        assert os.path.relpath(row["source"], source).split("/")[0] == row["split"]
    named = build_shards([source], tmp_path / "named", layout="{fold}/{class}/{name}", split="column:fold")
    assert named.counts == summary.counts
    assert "fold" in read_manifest(tmp_path / "named").column_names


def test_a_given_split_stays_even_where_copies_lie_on_both_sides(tmp_path):
    files = {f"{split}/a/{i}.jpg": encoded(i) for split in ("train", "test") for i in range(3)}
    summary = build_shards([write_tree(tmp_path / "in", files)], tmp_path / "set", layout="{split}/{class}/{name}")
    assert summary.counts == {"test": {"a": 3}, "train": {"a": 3}}
    assert any("3 images are in several splits as exact copies" in note for note in summary.notes), summary.notes


def test_a_table_gives_class_group_and_split(breast, tmp_path):
    paths = sorted(path.relative_to(breast).as_posix() for path in breast.rglob("*.*"))
    lines = [f'"{path}",{"AB"[i % 2]},{i % 5},{"train" if i % 5 < 3 else "test"},{i:03d}' for i, path in enumerate(paths)]
    (tmp_path / "labels.csv").write_text("path,class,group,split,case\n" + "\n".join(lines) + "\n", encoding="utf-8")
    summary = build_shards([breast], tmp_path / "set", table=tmp_path / "labels.csv")
    assert summary.packed == 55
    rows = {os.path.relpath(row["source"], breast): row for row in read_manifest(tmp_path / "set").to_pylist()}
    for i, path in enumerate(paths):
        row = rows[path]
        assert (row["class"], row["group"], row["case"]) == ("AB"[i % 2], str(i % 5), f"{i:03d}")
        assert row["split"] == ("train" if i % 5 < 3 else "test")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(layout="{group}/{class}/{slide}/{name}", group_by="slide"), "'group'.*--group-by"),
        (dict(layout="{split}/{class}/{name}", split="train=0.5,test=0.5"), "'split'.*--split"),
        (dict(layout=BREAST_LAYOUT, split="column:fold"), "--split column:fold: there is no such field.*slide, magnification"),
        (dict(layout=BREAST_LAYOUT, split="column:slide", split_by="group", group_by="slide"), "leave out --split-by"),
        (dict(layout=BREAST_LAYOUT, duplicates="apart "), "--duplicates"),
        (
            dict(layout="regex:^(?P<class>[^/]+)/(?P<slide>S B[^/]*)?", group_by="slide", split="a=0.5,b=0.5"),
            "35 patches have no slide",
        ),
    ],
)
def test_roles_that_contradict_each_other_are_refused(breast, tmp_path, settings, words):
    if "{group}" in settings["layout"] or "{split}" in settings["layout"]:
        breast = write_tree(
            tmp_path / "in",
            {
                f"x/{c}/s/{i}.jpg" if "group" in settings["layout"] else f"x/{c}/{i}.jpg": encoded(i)
                for c in "ab"
                for i in range(3)
            },
        )
    with pytest.raises(ValueError, match=words):
        build_shards([breast], tmp_path / "set", **settings)
    assert not (tmp_path / "set.partial").exists()


def test_a_class_of_which_nothing_is_left_is_named(tmp_path):
    files = {"a/1.jpg": encoded(1), "a/2.jpg": encoded(2), "b/1.jpg": b"", "b/2.jpg": encoded(3)[:-2]}
    source = write_tree(tmp_path / "in", files)
    with pytest.raises(ValueError, match=r"every image of class 'b' was refused.*class!=b"):
        build_shards([source], tmp_path / "set")
    assert build_shards([source], tmp_path / "set", where=["class!=b"]).packed == 2


def test_archives_give_the_same_patches_as_their_folder(breast, shards, tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.add(breast, ".")
    shutil.make_archive(str(tmp_path / "in"), "zip", breast)
    expected = sorted(read_manifest(shards)["sha256"].to_pylist())
    for kind in ("tar", "zip"):
        build_shards([tmp_path / f"in.{kind}"], tmp_path / kind, layout=r"regex:^(\./)?(?P<class>[^/]+)/")
        rows = read_manifest(tmp_path / kind).to_pylist()
        assert sorted(row["sha256"] for row in rows) == expected
        assert rows[0]["source"].startswith(str(tmp_path / f"in.{kind}/"))


# What is done to images


def test_png_becomes_what_a_gpu_decodes_and_the_split_stays(breast, shards, tmp_path):
    plain = {row["source"]: row for row in read_manifest(shards).to_pylist()}
    for encode, name in (("jpeg:95", "jpeg"), ("jpeg2000", "jpeg2000")):
        summary = build_shards([breast], tmp_path / name, **SETTINGS, encode=encode)
        for row in read_manifest(tmp_path / name).to_pylist():
            was = plain[row["source"]]
            assert row["split"] == was["split"]  # though its bytes are others
            if was["format"] == "jpeg":
                assert (row["sha256"], row["converted"]) == (was["sha256"], None)
                continue
            assert row["format"] == name
            assert row["source_sha256"] == was["sha256"] != row["sha256"]
            assert f"to {encode}" in row["converted"]
            assert (row["psnr"] is None) == (name == "jpeg2000")
        assert any(note.startswith("19 images were converted: 19 to jpeg") for note in summary.notes), summary.notes
    assert any(
        "PSNR of lossy encoding: mean" in note
        for note in build_shards([breast], tmp_path / "q", **SETTINGS, encode="jpeg:90").notes
    )


def test_header_checks_give_the_same_set(breast, shards, tmp_path):
    build_shards([breast], tmp_path / "header" / "set", **SETTINGS, check="header")
    ours, decoded = folder_bytes(tmp_path / "header" / "set"), folder_bytes(shards)
    assert {name: data for name, data in ours.items() if name != "dataset.json"} == {
        name: data for name, data in decoded.items() if name != "dataset.json"
    }


# What other readers expect


def test_samples_are_as_energon_and_hugging_face_want_them(shards):
    """One component per extension, parts of a sample beside each other, keys that no other sample of the set has."""
    seen = set()
    for number in range(3):
        with tarfile.open(shards / f"shard-{number:06d}.tar") as archive:
            names = archive.getnames()
        samples = [names[i : i + 2] for i in range(0, len(names), 2)]
        for image, label in samples:
            key, dot, extension = image.partition(".")
            assert dot and extension in ("jpg", "png")
            assert label == f"{key}.cls"
            assert "/" not in key and key not in seen
            seen.add(key)
    assert len(seen) == 55


# Arithmetic


def test_keys_hold_no_dot_and_no_blank():
    assert sample_key(0, 7, "patch x40 (31).v2.png") == "000000_000007_patch_x40__31__v2"
    assert sample_key(12, 345678, "종양.jpg") == "000012_345678___"
    assert sample_key(0, 0, "x" * 200 + ".jpg") == "000000_000000_" + "x" * 48


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("000001_000002_x.png", 513), ("k" * 99, 7)])
def test_members_are_those_of_tarfile(name, size):
    data = bytes(range(256)) * 3
    info = tarfile.TarInfo(name)
    info.size = size
    assert b"".join(tar_member(name, data[:size])) == info.tobuf(tarfile.USTAR_FORMAT) + data[:size] + bytes(-size % 512)


def test_shards_are_even_and_not_tiny():
    sizes = np.full(10_000, 20_000)

    def lengths(count, shard_bytes, shard_patches=None):
        return np.diff(shard_bounds(sizes[:count], True, shard_bytes=shard_bytes, shard_patches=shard_patches)).tolist()

    assert lengths(10_000, 10**9) == [625] * 16  # enough shards to share out
    assert sum(lengths(10_000, 10**7)) == 10_000 and len(lengths(10_000, 10**7)) == 23
    assert set(lengths(10_000, 10**7)) == {434, 435}
    assert min(lengths(10_000, 1)) >= 256
    assert lengths(1_000, 10**9) == [334, 333, 333]
    assert lengths(55, 10**8, 20) == [19, 18, 18]
    assert lengths(1, 10**8) == [1]
    assert max(lengths(10_000, 10**12, 10**9)) <= 16_384
    assert len(shard_bounds(np.full(10**6, 500), True, shard_bytes=10**12, shard_patches=None)) == 63
