"""Splits: exact counts by class, whole groups where asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.splits import content_keys, cut_points, name_keys, parse_shares, shared_groups, split_groups, split_patches

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


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_groups_stay_whole_and_every_split_has_every_class(data):
    sizes = data.draw(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4))
    shares = data.draw(st.sampled_from([SHARES, {"test": 0.2, "train": 0.8}, {"a": 0.7, "b": 0.15, "c": 0.15}]))
    labels = np.concatenate([np.full(sum(groups), label) for label, groups in enumerate(sizes)])
    flat = [size for groups in sizes for size in groups]
    groups = np.repeat(np.arange(len(flat)), flat)
    names = [f"slide {i}" for i in range(len(flat))]
    splits = split_groups(labels, groups, names, shares, seed=7)
    for group in range(len(flat)):
        assert len(np.unique(splits[groups == group])) == 1
    for label, members in enumerate(sizes):
        assert len(np.unique(splits[labels == label])) == min(len(members), len(shares))


def test_groups_are_balanced_as_well_as_they_allow():
    # 2 classes x 20 groups of 10 to 50 patches: near 80 % is reachable for both classes.
    sizes = np.random.default_rng(3).integers(10, 50, 40)
    groups = np.repeat(np.arange(40), sizes)
    labels = groups % 2
    reached = []
    for seed in range(5):
        splits = split_groups(labels, groups, [str(i) for i in range(40)], SHARES, seed=seed)
        for label in (0, 1):
            assert abs((splits[labels == label] == 0).mean() - 0.8) < 0.02
        reached.append(splits.tobytes())
    assert len(set(reached)) > 1  # the seed matters


def test_groups_that_hold_several_classes_are_balanced_too():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(30), 40)
    labels = rng.integers(0, 3, len(groups))
    splits = split_groups(labels, groups, [str(i) for i in range(30)], SHARES, seed=1)
    for label in range(3):
        assert abs((splits[labels == label] == 0).mean() - 0.8) < 0.03


def test_group_splits_depend_on_names_and_not_on_rows():
    sizes = np.random.default_rng(3).integers(10, 50, 20)
    groups = np.repeat(np.arange(20), sizes)
    labels = groups % 2
    names = [f"s{i:02d}" for i in range(20)]
    splits = split_groups(labels, groups, names, SHARES, seed=1)
    order = np.random.default_rng(0).permutation(len(groups))
    np.testing.assert_array_equal(split_groups(labels[order], groups[order], names, SHARES, seed=1), splits[order])


def test_shared_groups_are_counted():
    splits = np.array([0, 0, 1, 1, 1, 1])
    assert shared_groups(splits, np.array([0, 1, 0, 1, 2, -1]), ["train", "test"]) == [
        "2 of 4 test patches share a group with train patches"
    ]
    assert shared_groups(splits, np.array([0, 1, 2, 2, 2, -1]), ["train", "test"]) == []


def test_content_keys_are_the_first_eight_bytes():
    assert content_keys(["00000000000000ff" + "0" * 48, "f" * 64]).tolist() == [255, 2**64 - 1]
