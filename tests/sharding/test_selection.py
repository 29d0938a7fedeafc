"""Selections are pure: disjoint, nested, balanced, and blind to rows that do not concern them."""

import hashlib
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.manifest import COLUMNS, WORDS
from sharding.selection import select

PARTS = "train=0.7,validation=0.15,test=0.15"


def manifest_table(columns):
    """A manifest from one list per column; those that it has beside COLUMNS are words."""
    return pa.table({name: pa.array(values, COLUMNS.get(name, WORDS)) for name, values in columns.items()})


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


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        (dict(split="train", balance=True, fraction=0.05), "31c2f1c4cac6c9d2"),
        (dict(cap=300, validation=0.2, seed=7), "4668cbaafb089dd2"),
        (dict(cap=300, validation=0.2, seed=7, part="validation"), "757b55d6c22b2935"),
        (dict(split="train", validation=0.2, group_aware=True, part="validation", seed=1), "1cd4210bf58cc18b"),
    ],
)
def test_published_selections_are_the_same_patches_for_ever(settings, digest):
    assert hashlib.sha256(select(published(), **settings).tobytes()).hexdigest()[:16] == digest


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


def test_leaving_classes_out():
    manifest = published()
    assert per_class(manifest, select(manifest, leave_out=["InSitu", "Benign"], split="test")) == [0, 0, 770]
    np.testing.assert_array_equal(
        select(manifest, leave_out=["InSitu"], fraction=0.1), select(manifest, classes=["Benign", "Invasive"], fraction=0.1)
    )
    mixed = manifest_of([(i, "abc"[i] if i < 3 else None, "train", None) for i in range(9)])
    assert select(mixed, leave_out=["a", "c"]).tolist() == [1, 3, 4, 5, 6, 7, 8]  # what has no class stays
    assert select(mixed, leave_out=[]).tolist() == list(range(9))
    assert select(mixed, classes=["a", "b"]).tolist() == [0, 1]


def test_another_encoding_of_the_same_files_gives_the_same_selection():
    manifest = published()
    column = manifest.column_names.index("sha256")
    digests = manifest["sha256"].to_pylist()
    # Every second image was converted: what is stored has another digest, and the source's is told beside it.
    stored = [hashlib.sha256(digest.encode()).hexdigest() if i % 2 else digest for i, digest in enumerate(digests)]
    source = [digest if i % 2 else None for i, digest in enumerate(digests)]
    converted = manifest.set_column(column, "sha256", pa.array(stored)).append_column("source_sha256", pa.array(source))
    for chosen in (dict(fraction=0.1), dict(validation=0.2), dict(resplit=PARTS, split="test")):
        np.testing.assert_array_equal(select(manifest, **chosen), select(converted, **chosen))
    assert not np.array_equal(select(manifest, fraction=0.1), select(converted.drop(["source_sha256"]), fraction=0.1))


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
        (dict(leave_out=["DCIS"]), "Benign, InSitu, Invasive"),
        (dict(leave_out=["Benign", "InSitu", "Invasive"]), "nothing is selected"),
        (dict(leave_out=["Benign"], classes=["Benign"]), "'Benign' is among the classes to keep and among those to leave out"),
        (dict(resplit=PARTS), "name the split to take; resplit makes train, validation, test"),
        (dict(resplit=PARTS, split="val"), "there is no split 'val'; resplit makes train, validation, test"),
        (dict(resplit="train=0.8,test=0.1", split="test"), "resplit 'train=0.8,test=0.1': the shares sum to 0.9"),
        (dict(resplit={"train": 0.5, "test": 0.4}, split="test"), "the shares sum to 0.9"),
        (dict(resplit={"train": 0.5, "a b": 0.5}, split="train"), "'a b=0.5' is not of the form name=share"),
        (dict(duplicates="kept"), "together or apart"),
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


# Cutting a set anew


def parts_of(manifest, resplit=PARTS, **settings):
    """The ids of each part of a resplit; a part in which nothing is left is empty."""
    found = []
    for name in ("train", "validation", "test"):
        try:
            found.append(select(manifest, resplit=resplit, split=name, **settings).tolist())
        except ValueError as error:
            assert "nothing is selected" in str(error)  # noqa: PT017
            found.append([])
    return found


def test_a_resplit_cuts_each_class_anew():
    manifest = published()
    parts = parts_of(manifest)
    totals = (5678, 9381, 3849)
    train, whole = [round(0.7 * n) for n in totals], [round(0.85 * n) for n in totals]
    assert per_class(manifest, parts[0]) == train
    assert per_class(manifest, parts[1]) == [end - start for start, end in zip(train, whole, strict=True)]
    assert sorted(itertools.chain(*parts)) == list(range(sum(totals)))
    shares = {"train": 0.7, "validation": 0.15, "test": 0.15}
    assert parts == parts_of(manifest, shares)
    assert parts[2] != parts_of(manifest, seed=43)[2]
    # Smaller training sets, other classes: the test patches are the same ones.
    test = set(parts[2])
    for fewer in (dict(fraction=0.05), dict(balance=True), dict(cap=300), dict(classes=["Benign", "Invasive"])):
        assert set(select(manifest, resplit=PARTS, split="test", **fewer)) < test
        assert set(select(manifest, resplit=PARTS, split="train", **fewer)) < set(parts[0])


# Contents from few, so that copies are common, also in several classes.
COPIES = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from("ab"), st.sampled_from(["train", "test"]), st.integers(0, 9).map(str)),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(rows=COPIES, data=st.data(), seed=st.integers(0, 3))
def test_parts_are_disjoint_and_complete_with_copies_on_one_side(rows, data, seed):
    manifest = manifest_of(rows)
    parts = parts_of(manifest, seed=seed)
    assert sorted(itertools.chain(*parts)) == list(range(len(rows)))
    found = [contents(manifest, part) for part in parts]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    order = data.draw(st.permutations(range(len(rows))))
    again = parts_of(manifest_of([rows[i] for i in order]), seed=seed)
    assert [{order[i] for i in part} for part in again] == [set(part) for part in parts]


@settings(deadline=None, max_examples=60)
@given(rows=COPIES, validation=st.floats(0.05, 0.9), fraction=st.sampled_from([0.5, 1.0]), group_aware=st.booleans())
def test_copies_lie_on_one_side_of_the_validation_share(rows, validation, fraction, group_aware):
    manifest = manifest_of(rows)
    settings = dict(validation=validation, fraction=fraction, group_aware=group_aware)
    parts = []
    for part in ("train", "validation"):
        try:
            parts.append(select(manifest, **settings, part=part))
        except ValueError as error:  # too few contents or groups, or groups that copies tie together
            assert any(words in str(error) for words in ("too few", "two groups", "linked by exact copies"))  # noqa: PT017
            return
    assert not contents(manifest, parts[0]) & contents(manifest, parts[1])
    assert sorted([*parts[0], *parts[1]]) == select(manifest, **settings, part="all").tolist()


def test_copies_apart_are_counted_like_other_patches():
    manifest = manifest_of([(i // 4, "a", "train", str(i % 4)) for i in range(100)])  # in fours, each on four slides
    settings = dict(validation=0.5, part="validation")
    assert len(select(manifest, **settings, duplicates="apart")) == 50
    assert len(select(manifest, **settings)) in (48, 52)
    with pytest.raises(ValueError, match="4 of 4 groups are linked"):
        select(manifest, **settings, group_aware=True)
    assert len(select(manifest, **settings, group_aware=True, duplicates="apart")) == 50
    with pytest.raises(ValueError, match="4 of 4 groups are linked"):
        select(manifest, resplit="train=0.5,test=0.5", split="test", group_aware=True)
    parts = parts_of(manifest, "train=0.5,validation=0.25,test=0.25", group_aware=True, duplicates="apart")
    assert [len(part) for part in parts] == [50, 25, 25]


def test_copies_stay_together_where_keys_are_equal_by_chance():
    manifest = manifest_of([(i, "a", "train", None) for i in range(100)])
    digests = pa.array([f"{i % 10:032x}" + "0" * 32 for i in range(100)])
    manifest = manifest.set_column(manifest.column_names.index("sha256"), "sha256", digests)
    kept, held_out = (select(manifest, validation=0.2, part=part) for part in ("train", "validation"))
    assert len(held_out) == 20 and not contents(manifest, kept) & contents(manifest, held_out)


def test_whole_groups_in_a_resplit():
    manifest = published()  # seven groups in each class
    parts = parts_of(manifest, group_aware=True)
    assert sorted(itertools.chain(*parts)) == list(range(len(manifest)))
    groups = np.array(manifest["group"].to_pylist())
    found = [set(groups[part]) for part in parts]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert set(select(manifest, resplit=PARTS, split="test", group_aware=True, fraction=0.1)) < set(parts[2])
    without = manifest_of([(i, "a", "train", "s" if i else None) for i in range(9)])
    with pytest.raises(ValueError, match=r"1 have none .*--group-by"):
        select(without, resplit=PARTS, split="test", group_aware=True)
