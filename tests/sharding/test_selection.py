"""Selections are pure: disjoint, nested, balanced, and blind to rows that do not concern them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.manifest import manifest_table
from sharding.selection import select


def manifest_of(rows):
    """A manifest of (content, class, split, group) rows, ids in that order."""
    n = len(rows)
    classes = sorted({row[1] for row in rows if row[1] is not None})
    return manifest_table(
        {
            "id": np.arange(n),
            "key": [f"{i:09d}" for i in range(n)],
            "label": [classes.index(row[1]) if row[1] is not None else -1 for row in rows],
            "class": [row[1] for row in rows],
            "group": [row[3] for row in rows],
            "split": [row[2] for row in rows],
            "sha256": [hashlib.sha256(str(row[0]).encode()).hexdigest() for row in rows],
        }
    )


def published():
    """The published training set: 4,542 + 7,505 + 3,079 patches for training, and the test patches."""
    counts = {"Benign": (4542, 1136), "InSitu": (7505, 1876), "Invasive": (3079, 770)}
    rows = [
        (f"{name} {split} {i}", name, split, f"{name} {i % 7}")
        for name, both in counts.items()
        for split, n in zip(("train", "test"), both, strict=True)
        for i in range(n)
    ]
    return manifest_of(rows)


def per_class(manifest, ids):
    return np.bincount(manifest["label"].to_numpy()[ids], minlength=3).tolist()


@pytest.mark.parametrize(("fraction", "each"), [(1.0, 3079), (0.05, 154), (0.25, 770), (0.5, 1540)])
def test_published_counts_of_balanced_fractions(fraction, each):
    manifest = published()
    ids = select(manifest, split="train", balance=True, fraction=fraction)
    assert ids.dtype == np.int64
    assert per_class(manifest, ids) == [each] * 3
    assert set(np.array(manifest["split"].to_pylist())[ids]) == {"train"}
    assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("cap", [300, 500, 1000, 1500])
def test_cap_and_a_stratified_validation_share(cap):
    manifest = published()
    settings = dict(split="train", cap=cap, validation=0.2)
    assert per_class(manifest, select(manifest, **settings)) == [cap - round(0.2 * cap)] * 3
    assert per_class(manifest, select(manifest, **settings, part="validation")) == [round(0.2 * cap)] * 3
    assert per_class(manifest, select(manifest, **settings, part="all")) == [cap] * 3


def test_seeds_differ_and_are_kept():
    manifest = published()
    first, again, other = (select(manifest, fraction=0.1, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.05 < np.isin(first, other).mean() < 0.15


def test_classes_and_unlabelled():
    manifest = published()
    assert per_class(manifest, select(manifest, classes=["InSitu"], split="test")) == [0, 1876, 0]
    unlabelled = manifest_of([(i, None, "train", None) for i in range(100)])
    assert len(select(unlabelled, fraction=0.25)) == 25
    assert len(select(unlabelled, validation=0.2, part="validation")) == 20


ROWS = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from("abc"), st.sampled_from(["train", "test"]), st.integers(0, 9).map(str)),
    min_size=1,
    max_size=80,
    unique_by=lambda row: row[0],
)


def contents(manifest, ids):
    return set(np.array(manifest["sha256"].to_pylist(), object)[ids])


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, small=st.floats(0.01, 1), large=st.floats(0.01, 1), balance=st.booleans(), cap=st.none() | st.integers(1, 20))
def test_a_smaller_fraction_lies_inside_a_larger_one(rows, small, large, balance, cap):
    small, large = sorted([small, large])
    manifest = manifest_of(rows)
    inner, outer = (select(manifest, fraction=f, balance=balance, cap=cap) for f in (small, large))
    assert set(inner) <= set(outer)
    counts = [sum(manifest["label"].to_numpy()[outer] == label) for label in np.unique(manifest["label"].to_numpy())]
    assert min(counts) >= 1  # no class is lost
    if balance:
        assert len(set(counts)) == 1
    if cap:
        assert max(counts) <= cap


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, validation=st.floats(0.01, 0.9), fraction=st.floats(0.1, 1), group_aware=st.booleans())
def test_train_and_validation_are_disjoint_and_together_all(rows, validation, fraction, group_aware):
    manifest = manifest_of(rows)
    settings = dict(validation=validation, fraction=fraction, group_aware=group_aware)
    parts = []
    for part in ("train", "validation"):
        try:
            parts.append(set(select(manifest, **settings, part=part).tolist()))
        except ValueError as error:  # a single patch or a single group cannot be divided
            assert "too few" in str(error) or "two groups" in str(error)  # noqa: PT017
            return
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(select(manifest, **settings, part="all").tolist())
    if group_aware:
        groups = np.array(manifest["group"].to_pylist())
        assert not set(groups[sorted(parts[0])]) & set(groups[sorted(parts[1])])


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, data=st.data(), fraction=st.floats(0.05, 1), validation=st.sampled_from([0.0, 0.3]))
def test_the_order_of_rows_and_unrelated_rows_do_not_matter(rows, data, fraction, validation):
    rows = [row for row in rows if row[2] == "train"] or [(1, "a", "train", "1")]
    unrelated = [(20_000 + i, data.draw(st.sampled_from("abc")), "test", None) for i in range(data.draw(st.integers(0, 20)))]
    others = [(30_000 + i, "zzz", "train", None) for i in range(data.draw(st.integers(0, 5)))]
    mixed = data.draw(st.permutations(rows + unrelated + others))
    classes = sorted({row[1] for row in rows})
    settings = dict(
        split="train", classes=classes, fraction=fraction, validation=validation, part="all" if not validation else "train"
    )
    chosen = []
    for manifest in (manifest_of(rows), manifest_of(mixed)):
        try:
            chosen.append(contents(manifest, select(manifest, **settings)))
        except ValueError as error:
            chosen.append(str(error))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(split="val"), "test, train"),
        (dict(classes=["DCIS"]), "Benign, InSitu, Invasive"),
        (dict(classes=[]), "nothing is selected"),
        (dict(fraction=0.0), "fraction"),
        (dict(fraction=1.1), "fraction"),
        (dict(fraction=float("nan")), "fraction"),
        (dict(cap=0), "cap"),
        (dict(validation=1.0), "validation"),
        (dict(validation=-0.1), "validation"),
        (dict(part="test"), "train, validation or all"),
        (dict(part="validation"), "validation share above 0"),
    ],
)
def test_a_users_mistake_is_named(settings, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        select(published(), **settings)
    assert words in str(caught.value)


def test_group_aware_needs_groups():
    manifest = manifest_of([(i, "a", "train", None) for i in range(9)])
    with pytest.raises(ValueError, match="--group-by"):
        select(manifest, validation=0.3, group_aware=True)
    manifest = manifest_of([(i, "a", "train", "one") for i in range(9)])
    with pytest.raises(ValueError, match="two groups"):
        select(manifest, validation=0.3, group_aware=True)


def test_a_class_without_patches_in_the_split_is_named():
    manifest = manifest_of([(1, "a", "train", None), (2, "b", "test", None)])
    with pytest.raises(ValueError, match="'b' has no patch in split 'train'"):
        select(manifest, split="train", classes=["a", "b"])
