"""Splits: exact counts by class, copies of an image on one side, and what a set holds already keeps its place."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.splits.assign import (
    assign_splits,
    content_digests,
    content_keys,
    cut_classes,
    cut_points,
    parse_shares,
    shared_groups,
    split_patches,
)
from sharding.splits.groups import name_keys

SHARES = {"train": 0.8, "test": 0.2}


@pytest.mark.parametrize(("count", "train", "test"), [(5678, 4542, 1136), (9381, 7505, 1876), (3849, 3079, 770)])
def test_published_counts(count, train, test):
    assert cut_points(count, [0.8, 0.2]) == [0, train, train + test]


def test_three_ways():
    assert cut_points(100, [0.7, 0.15, 0.15]) == [0, 70, 85, 100]
    assert cut_points(10, [0.7, 0.15, 0.15]) == [0, 7, 8, 10]  # 8.5 rounds to even


def test_published_split_of_a_whole_set():
    labels = np.repeat([0, 1, 2], [5678, 9381, 3849])
    keys = name_keys([str(i) for i in range(len(labels))])
    splits = split_patches(labels, keys, SHARES, seed=42)
    assert np.bincount(labels * 2 + splits).tolist() == [4542, 1136, 7505, 1876, 3079, 770]
    # These very patches: a set that is packed again is split as it was.
    assert hashlib.sha256(splits.tobytes()).hexdigest()[:16] == "1d2f82daf7b89f12"
    other = split_patches(labels, keys, SHARES, seed=43)
    assert 0.2 < (splits != other).mean() < 0.44  # 0.32 expected of unrelated seeds
    # A patch keeps its side when the rows come in another order.
    order = np.random.default_rng(0).permutation(len(labels))
    np.testing.assert_array_equal(split_patches(labels[order], keys[order], SHARES, seed=42), splits[order])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train",
        "train=0.8",
        "train=0.8,test=0.3",
        "train=x,test=0.2",
        "train=1.2,test=-0.2",
        "train=0.5,train=0.5",
        "tr ain=1",
        "train=0.5,Train=0.5",
        "train=nan,test=0.2",
        "a=0,b=1",
    ],
)
def test_bad_shares_are_refused(text):
    with pytest.raises(ValueError, match="--split"):
        parse_shares(text)


def test_good_shares():
    assert parse_shares("train=0.7, validation=0.1,test=0.2") == {"train": 0.7, "validation": 0.1, "test": 0.2}
    assert parse_shares("a=0.1,b=0.2,c=0.7")  # 0.1 + 0.2 is not 0.3 in floating point


def test_shared_groups_are_counted():
    splits = np.array([0, 0, 1, 1, 1, 1])
    assert shared_groups(splits, np.array([0, 1, 0, 1, 2, -1]), ["train", "test"]) == [
        "2 of 4 test patches share a group with train patches"
    ]
    assert shared_groups(splits, np.array([0, 1, 2, 2, 2, -1]), ["train", "test"]) == []


def test_content_digests_are_the_first_sixteen_bytes():
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(70_000)]  # more than are decoded at a time
    expected = [(int(digest[:16], 16), int(digest[16:32], 16)) for digest in digests]
    assert content_digests(digests).tolist() == [list(pair) for pair in expected]
    column = pa.chunked_array([digests[:10], digests[10:]])
    np.testing.assert_array_equal(content_digests(column), content_digests(digests))
    np.testing.assert_array_equal(content_digests(pa.array(digests).slice(5)), content_digests(digests)[5:])
    np.testing.assert_array_equal(content_keys(digests), content_digests(digests)[:, 0])
    assert content_keys(["00000000000000ff" + "0" * 48, "f" * 64]).tolist() == [255, 2**64 - 1]
    assert content_digests([]).shape == (0, 2)


# Copies and sets that grow

THREE = {"train": 0.7, "validation": 0.15, "test": 0.15}


def contents_of(names):
    """(n, 2) uint64 of some content for each name; equal names have equal content."""
    return content_digests([hashlib.sha256(str(name).encode()).hexdigest() for name in names])


def assign(labels, names, shares=SHARES, *, groups=None, by="patch", duplicates="together", seed=3, **more):
    """assign_splits for content by name and groups by name (None: unknown)."""
    groups = [None] * len(names) if groups is None else groups
    known = sorted({group for group in groups if group is not None})
    codes = np.array([-1 if group is None else known.index(group) for group in groups], np.int64)
    settings = dict(by=by, duplicates=duplicates, seed=seed, group_field="slide")
    return assign_splits(np.array(labels, np.int64), codes, known, contents_of(names), shares, **settings, **more)


def sides(codes, splits):
    """The splits of each code."""
    found = {}
    for code, split in zip(codes, splits.tolist(), strict=True):
        found.setdefault(code, set()).add(split)
    return found


# Few names, so that copies are common, in one class and in several.
PATCHES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25)), min_size=1, max_size=80)


@settings(deadline=None, max_examples=100)
@given(patches=PATCHES, shares=st.sampled_from([SHARES, THREE]), seed=st.integers(0, 9), data=st.data())
def test_copies_lie_in_one_split_whatever_the_order_of_the_patches(patches, shares, seed, data):
    labels, names = (list(column) for column in zip(*patches, strict=True))
    splits, _ = assign(labels, names, shares, seed=seed)
    assert all(len(found) == 1 for found in sides(names, splits).values())
    order = data.draw(st.permutations(range(len(patches))))
    again, _ = assign([labels[i] for i in order], [names[i] for i in order], shares, seed=seed)
    np.testing.assert_array_equal(again, splits[list(order)])


def test_copies_stay_together_where_keys_are_equal_by_chance():
    clusters = np.arange(100) % 10
    splits = split_patches(np.zeros(100, int), np.zeros(100, np.uint64), SHARES, seed=1, clusters=clusters)
    assert all(len(found) == 1 for found in sides(clusters, splits).values())
    assert np.bincount(splits).tolist() == [80, 20]


@settings(deadline=None, max_examples=100)
@given(names=st.lists(st.integers(0, 40), min_size=2, max_size=60), shares=st.sampled_from([SHARES, THREE]))
def test_only_copies_that_a_cut_would_part_move(names, shares):
    labels = [0] * len(names)
    splits, _ = assign(labels, names, shares)
    apart, _ = assign(labels, names, shares, duplicates="apart")
    parted = [name for name, found in sides(names, apart).items() if len(found) > 1]
    moved = {name for name, one, other in zip(names, splits, apart, strict=True) if one != other}
    assert moved <= set(parted)
    assert np.bincount(apart, minlength=len(shares)).tolist() == np.diff(cut_points(len(names), list(shares.values()))).tolist()
    # Two splits of two images or more are never left empty by it, where the shares leave none empty.
    if len(shares) == 2 and len(set(names)) > 1 and len(set(apart.tolist())) == 2:
        assert len(set(splits.tolist())) == 2


@pytest.mark.parametrize(
    ("copies", "cut", "moved"),
    [
        ((5, 8), 6, 5),
        ((5, 8), 7, 8),
        ((5, 7), 6, 5),  # the lower of two that are as near
        ((5, 8), 5, 5),
        ((5, 8), 8, 8),
        ((7, 10), 9, 7),  # not to the end of the class ...
        ((0, 3), 1, 3),
        ((0, 10), 8, 10),  # ... but where there is nothing else
        ((0, 10), 2, 0),
        ((5, 8), 0, 0),
        ((5, 8), 10, 10),
    ],
)
def test_a_cut_moves_to_the_nearer_end_of_the_copies(copies, cut, moved):
    clusters = np.full(10, -1)
    clusters[slice(*copies)] = 0
    parts = cut_classes(np.zeros(10, int), np.arange(10), clusters, lambda label, count: [0, cut, count], parts=2)
    assert parts.tolist() == [0] * moved + [1] * (10 - moved)


def test_copies_in_several_classes_go_to_where_most_of_them_are():
    # Class 0 is cut after its first patch, class 1 after its first two: the copies lie on both sides.
    for labels, clusters, expected in (
        ([0, 0, 1, 1, 1], [-1, 0, 0, -1, -1], [0, 0, 0, 0, 1]),  # one against one: the earlier part
        ([0, 0, 0, 1, 1, 1], [-1, 0, 0, 0, -1, -1], [0, 1, 1, 1, 0, 1]),
        ([0, 0, 1, 1, 1], [-1, 0, 0, 0, -1], [0, 0, 0, 0, 1]),
    ):
        count = len(labels)
        parts = cut_classes(np.array(labels), np.arange(count), np.array(clusters), lambda label, n: [0, 1 + label, n], parts=2)
        assert parts.tolist() == expected


@settings(deadline=None, max_examples=100)
@given(
    old=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=60),
    new=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    shares=st.sampled_from([SHARES, THREE]),
)
def test_what_is_new_makes_up_for_what_is_held(old, new, shares):
    assigned = np.array([min(split, len(shares) - 1) for _, split in old] + [-1] * len(new))
    labels = np.array([label for label, _ in old] + new)
    splits, _ = assign(labels, range(len(labels)), shares, assigned=assigned)
    np.testing.assert_array_equal(splits[: len(old)], assigned[: len(old)])
    for label in np.unique(new):
        mine = labels == label
        asked = np.diff(cut_points(int(mine.sum()), list(shares.values())))
        before = np.bincount(assigned[mine & (assigned >= 0)], minlength=len(shares))
        reached = np.bincount(splits[mine], minlength=len(shares))
        # Nothing better: no split that got new patches has more than one patch above what another one is short of.
        excess = reached - asked
        got = reached > before
        assert (excess[got] <= excess.min() + 1).all(), (asked, before, reached)
        if (before <= asked).all():
            np.testing.assert_array_equal(reached, asked)


def test_new_copies_follow_the_held_ones_and_no_split_with_share_0_grows():
    names = [f"patch {i % 500}" for i in range(1000)]
    assigned = np.array([i % 2 for i in range(500)] + [-1] * 500)
    splits, notes = assign([0] * 1000, names, assigned=assigned)
    np.testing.assert_array_equal(splits[500:], assigned[:500])
    assert "500 patches are exact copies of another one" in notes
    assert not any(note.endswith("in several splits as exact copies") for note in notes)
    # Where the set itself holds copies apart, most of them decide, and it is said.
    splits, notes = assign([0] * 4, ["a", "a", "a", "a"], assigned=np.array([0, 1, 1, -1]))
    assert splits.tolist() == [0, 1, 1, 1]
    assert "1 image is in several splits as exact copies, since patches of the old set keep their split" in notes
    assigned[0] = 2
    splits, _ = assign([0] * 1000, range(1000), {**SHARES, "kept": 0.0}, assigned=assigned)
    assert np.bincount(splits).tolist() == [749, 250, 1]  # all new ones to train, since test holds too many
    groups = list(map(str, range(1000)))  # class 1 has no group in it, and gets none
    splits, _ = assign([0, 1] * 500, range(1000), {**SHARES, "kept": 0.0}, assigned=assigned, by="group", groups=groups)
    assert (splits == 2).sum() == 1


def test_one_split_takes_all_and_needs_no_groups():
    splits, notes = assign([0, 1], ["a", "a"], {"train": 1.0}, by="group")
    assert splits.tolist() == [0, 0]
    assert notes == ["1 patch is an exact copy of another one", "1 image is in several classes as exact copies"]


def test_patches_without_a_group_cannot_be_split_by_it():
    with pytest.raises(ValueError, match="2 patches have no slide: correct the layout, or give --split-by patch"):
        assign([0] * 4, range(4), groups=["s", None, "t", None], by="group")
    splits, _ = assign([0] * 4, range(4), groups=["s", None, "t", None], by="group", assigned=np.array([-1, 1, -1, 1]))
    assert splits.tolist() == [0, 1, 0, 1]


# What is said


def test_what_is_said_of_copies():
    names = [i // 3 for i in range(2001)]  # 0.8 of them is 1,601, which is between two of three copies
    copies = "1,334 patches are exact copies of another one"
    brought = "1 image would have been in several splits as exact copies: each was put in one"
    assert assign([0] * 2001, names)[1] == [copies, brought]
    apart = "1 image is in several splits as exact copies"
    assert assign([0] * 2001, names, duplicates="apart")[1] == [copies, apart]
    assert assign([0] * 100, range(100))[1] == []


def test_what_is_said_of_copies_in_several_classes():
    names = [i // 2 for i in range(200)]
    assert assign([0, 1] * 100, names)[1][-1] == "100 images are in several classes as exact copies"
    assert assign([0, -1] * 100, names)[1] == ["100 patches are exact copies of another one"]  # no label contradicts none


def test_what_is_said_of_groups():
    groups = [f"{'Ss'[i % 2]}lide_{i % 40 // 2}" for i in range(2000)]
    splits, notes = assign([0] * 2000, range(2000), groups=groups, by="group")
    assert all(len(found) == 1 for found in sides([group.lower() for group in groups], splits).values())
    assert notes == [
        "slide: 20 values differ from another one only in case, punctuation or a final .0, for example 'Slide_0' and 'slide_0'",
        "every slide is whole in one split: train / test got 80.0% / 20.0% (asked: 80.0% / 20.0%)",
    ]
    splits, notes = assign([0] * 2000, range(2000), groups=groups)
    assert notes[1:] == ["400 of 400 test patches share a group with train patches"]
    assigned = np.array([0, 1, *[-1] * 1998])  # one slide, two spellings
    notes = assign([0] * 2000, range(2000), groups=groups, by="group", assigned=assigned)[1]
    assert notes[1].startswith("every slide but 1 that the old set has in several is whole in one split: train / test got ")


def test_classes_that_are_far_from_their_shares_are_named():
    groups = ["s"] * 60 + ["t"] * 40 + [f"u{i % 50}" for i in range(500)]
    labels = [0] * 100 + [1] * 500
    notes = assign(labels, range(600), groups=groups, by="group", class_names=["Rare", "Common"])[1]
    assert notes[1:] == ["more than 5 percentage points off the asked train / test: Rare (60.0% / 40.0% of 100)"]
    # A patch cannot be cut: 2 and 1 of 3 is as near as can be, and nothing was asked where all have a place.
    assert assign([0] * 3, range(3))[1] == []
    assert assign([0] * 50, range(50), assigned=np.zeros(50, int))[1] == []
