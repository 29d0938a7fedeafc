"""Links never take a name or a class from the real folder, and an image that is packed twice is said to be."""

import os
import random

import pytest

from sharding.packing import build_shards
from sharding.sources.scan import scan_sources, source_names
from tests.helpers import encoded, write_tree

TREE = {"Benign/1.jpg": b"1", "Benign/2.jpg": b"2", "Malignant/3.jpg": b"3", "Malignant/4.jpg": b"4"}


def link(root, links):
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    return root


def found(*sources, **settings):
    """Relative path and class of each image, and the notes."""
    scan = scan_sources(sources, **settings)
    paths = [os.path.relpath(name, sources[0]) for name in source_names(scan.files)]
    labels = scan.files["class"].to_pylist() if "class" in scan.fields else [None] * len(paths)
    return list(zip(paths, labels, strict=True)), scan.notes


REAL = [(path, path.split("/")[0]) for path in TREE]


def test_a_link_inside_a_class_to_another_class_takes_nothing(tmp_path):
    link(write_tree(tmp_path, TREE), {"Benign/compare": "../Malignant"})
    images, notes = found(tmp_path)
    assert images == REAL
    assert any("reached again" in note for note in notes)


def test_a_link_that_a_layout_reads_as_another_class_is_said(tmp_path):
    link(write_tree(tmp_path, TREE), {"AAA": "Malignant"})
    images, notes = found(tmp_path)
    assert images == [("AAA/3.jpg", "AAA"), ("AAA/4.jpg", "AAA"), *REAL]
    (warning,) = (note for note in notes if note.startswith("WARNING"))
    assert "links put 2 images into several classes" in warning
    assert f"{tmp_path}/Malignant/3.jpg and {tmp_path}/AAA/3.jpg" in warning
    images, notes = found(tmp_path, where=["class!=AAA"])
    assert images == REAL and not any("WARNING" in note for note in notes)
    images, notes = found(tmp_path, labelled=False)  # no layout reads it
    assert images == [(path, None) for path in TREE]


def test_a_link_that_gives_the_same_fields_adds_nothing(tmp_path):
    tree = {f"{label}/S1/{i}.jpg": b"x" for label in ("a", "b") for i in range(2)}
    link(write_tree(tmp_path, tree), {"a/S0": "S1", "b/S1/again.jpg": "0.jpg"})
    images, notes = found(tmp_path, layout="{class}/{slide}/{name}")
    assert [path for path, _ in images] == sorted(tree)
    assert "3 links lead to images that are packed under another path: each image is packed once" in notes


@pytest.mark.parametrize("store", ["store", "in/store/png", "in/zz/store", "in/0/1/2"])
@pytest.mark.parametrize("of", ["files", "folders"])
def test_a_farm_of_links_into_a_store(tmp_path, store, of):
    """The store lies outside, or at a depth where the layout does not fit."""
    write_tree(tmp_path / store, TREE)
    links = {name: name for name in (TREE if of == "files" else ("Benign", "Malignant"))}
    link(
        tmp_path / "in",
        {name: os.path.relpath(tmp_path / store / to, (tmp_path / "in" / name).parent) for name, to in links.items()},
    )
    images, notes = found(tmp_path / "in")
    assert images == REAL
    assert not any("WARNING" in note for note in notes)
    images, _ = found(tmp_path / "in", labelled=False)
    inside = store.startswith("in/")  # then the images have a real path
    assert [path for path, _ in images] == sorted(f"{store[3:]}/{path}" if inside else path for path in TREE)


def test_folds_made_of_links_to_one_store_are_a_leak_that_is_said(tmp_path):
    write_tree(tmp_path / "store", TREE)
    farm = {
        f"{split}/{name}": tmp_path / "store" / name for split, name in [("train", n) for n in TREE] + [("test", "Benign/2.jpg")]
    }
    scan = scan_sources([link(tmp_path / "in", farm)], layout="{split}/{class}/{name}")
    assert scan.files["split"].to_pylist() == ["test", *["train"] * 4]
    (warning,) = (note for note in scan.notes if note.startswith("WARNING"))
    assert "1 image into several splits, which leaks" in warning


def test_the_real_folder_of_another_source_comes_before_a_link(tmp_path):
    write_tree(tmp_path / "two", {"Malignant/3.jpg": b"3"})
    link(write_tree(tmp_path / "one", {"Benign/1.jpg": b"1"}), {"Malignant": "../two/Malignant"})
    for sources in (("one", "two"), ("two", "one")):
        scan = scan_sources([tmp_path / name for name in sources])
        assert sorted(source_names(scan.files)) == [f"{tmp_path}/one/Benign/1.jpg", f"{tmp_path}/two/Malignant/3.jpg"]


def test_hard_links_are_files_of_their_own(tmp_path):
    write_tree(tmp_path, TREE)
    os.link(tmp_path / "Benign/1.jpg", tmp_path / "Benign/5.jpg")
    link(tmp_path, {"Benign/0.jpg": "1.jpg"})
    images, _ = found(tmp_path)
    assert [path for path, _ in images] == sorted([*TREE, "Benign/5.jpg"])


def test_links_in_circles_end(tmp_path):
    names = [f"c{i}" for i in range(9)]
    write_tree(tmp_path, {f"{name}/x/{name}.jpg": b"x" for name in names})
    link(tmp_path, {f"{one}/{other}": f"../{other}" for one in names for other in [*names, "."] if one != other and other != "."})
    link(tmp_path, {f"{one}/up": ".." for one in names})
    for layout in ("{class}/{slide}/{name}", "regex:(?P<class>[^/]+)/(?P<slide>[^/]+)/[^/]+$"):
        images, _ = found(tmp_path, layout=layout)
        assert {f"{name}/x/{name}.jpg" for name in names} <= {path for path, _ in images}
    with pytest.raises(ValueError, match="matches none of"):
        found(tmp_path, layout="{a}/{b}/{c}/{class}/{slide}/{e}/{name}")


def test_the_order_of_the_directory_does_not_matter(tmp_path, monkeypatch):
    link(
        write_tree(tmp_path, TREE),
        {"AAA": "Malignant", "ZZZ": "AAA", "Benign/x": "../Malignant", "Benign/9.jpg": "../Malignant/3.jpg"},
    )
    expected = found(tmp_path)
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path):
            self.entries = list(scandir(path))
            random.shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    for seed in range(10):
        random.seed(seed)
        assert found(tmp_path) == expected


def test_a_table_may_name_an_image_by_a_link(tmp_path):
    link(write_tree(tmp_path / "in", {"a/1.jpg": b"1", "a/2.jpg": b"2"}), {"b": "a"})
    (tmp_path / "t.csv").write_text("path,class\na/1.jpg,x\nb/2.jpg,y\n")
    assert found(tmp_path / "in", table=tmp_path / "t.csv")[0] == [("a/1.jpg", "x"), ("b/2.jpg", "y")]


def test_a_set_of_a_farm_is_whole(tmp_path):
    write_tree(tmp_path / "store", {f"{i}.jpg": encoded(i) for i in range(6)})
    link(tmp_path / "in", {f"{'ab'[i % 2]}/{i}.jpg": tmp_path / f"store/{i}.jpg" for i in range(6)})
    summary = build_shards([tmp_path / "in"], tmp_path / "set")
    assert (summary.found, summary.packed, summary.counts) == (6, 6, {"train": {"a": 3, "b": 3}})
