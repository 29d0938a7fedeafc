"""A tree of the shape of the published breast set comes out with exactly the published counts."""

import collections

import numpy as np
import pytest

from sharding.manifest import read_manifest
from sharding.packing import build_shards
from sharding.selection import select
from tests.helpers import BREAST_LAYOUT, encoded

COUNTS = {"Benign": 5_678, "In situ": 9_381, "침윤성 (invasive)": 3_849}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """18,908 different small JPEGs in the folders of a lab; the other magnifications are there too."""
    root = tmp_path_factory.mktemp("published")
    images = [encoded(i) for i in range(8)]
    number = 0
    for name, count in COUNTS.items():
        for slide in range(12):
            for zoom in ("x5", "x10", "x40"):
                (root / "Breast" / name / f"S {name[0]} ({slide})" / zoom).mkdir(parents=True)
        for i in range(count):
            image, comment = images[number % 8], b"%08d" % number
            data = image[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + image[2:]
            slide = f"S {name[0]} ({i % 12})"
            with open(root / "Breast" / name / slide / "x40" / f"{slide} x40 ({i // 12}).jpg", "wb") as file:
                file.write(data)
            number += 1
        (root / "Breast" / name / f"S {name[0]} (0)" / "x5" / "too coarse.jpg").write_bytes(images[0])
    summary = build_shards(
        [root / "Breast"],
        root / "set",
        layout=BREAST_LAYOUT,
        where=["magnification=x40"],
        group_by="slide",
        split_by="patch",
        split="train=0.8,test=0.2",
        check="header",
    )
    return summary, read_manifest(root / "set")


def test_the_split_by_patch(built):
    summary, manifest = built
    assert summary.packed == sum(COUNTS.values()) == 18_908
    assert summary.counts == {
        "train": {"Benign": 4_542, "In situ": 7_505, "침윤성 (invasive)": 3_079},
        "test": {"Benign": 1_136, "In situ": 1_876, "침윤성 (invasive)": 770},
    }
    assert "3,782 of 3,782 test patches share a group with train patches" in summary.notes, summary.notes
    assert summary.shards == 16
    assert len(set(manifest["group"].to_pylist())) == 36


@pytest.mark.parametrize(("fraction", "each"), [(0.05, 154), (0.25, 770), (0.5, 1_540), (1.0, 3_079)])
def test_the_balanced_fractions(built, fraction, each):
    manifest = built[1]
    labels = manifest["label"].to_numpy()
    ids = select(manifest, split="train", balance=True, fraction=fraction)
    assert np.bincount(labels[ids]).tolist() == [each] * 3
    kept = select(manifest, split="train", balance=True, fraction=fraction, validation=0.2, part="train")
    held = select(manifest, split="train", balance=True, fraction=fraction, validation=0.2, part="validation")
    assert collections.Counter(labels[held].tolist()) == {label: round(0.2 * each) for label in range(3)}
    assert sorted([*kept, *held]) == ids.tolist()
