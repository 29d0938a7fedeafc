"""Copies: which patches are the same image."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.splits.duplicates import ambiguous_codes, duplicate_clusters, most_common, no_clusters

# Pairs that are equal in one half alone are no copies.
CONTENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=100)
@given(contents=CONTENTS, data=st.data())
def test_a_bunch_is_all_patches_of_one_content(contents, data):
    clusters = duplicate_clusters(np.array(contents, np.uint64))
    several = sorted(content for content, count in Counter(contents).items() if count > 1)
    assert clusters.tolist() == [several.index(content) if content in several else -1 for content in contents]
    order = data.draw(st.permutations(range(len(contents))))
    np.testing.assert_array_equal(duplicate_clusters(np.array(contents, np.uint64)[order]), clusters[order])


def test_no_bunches():
    assert no_clusters(2).tolist() == [-1, -1] == duplicate_clusters(np.array([[1, 2], [2**64 - 1, 2]], np.uint64)).tolist()
    assert duplicate_clusters(np.empty((0, 2), np.uint64)).tolist() == []


PAIRS = st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 2)), max_size=40)


@settings(deadline=None, max_examples=100)
@given(pairs=PAIRS)
def test_spread_and_most_common(pairs):
    codes, values = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    found = [Counter(value for code, value in pairs if code == wanted and value >= 0) for wanted in range(6)]
    assert ambiguous_codes(codes, values).tolist() == [code for code, counter in enumerate(found) if len(counter) > 1]
    best = [min(counter, key=lambda value: (-counter[value], value), default=-1) for counter in found]
    assert most_common(codes, values, count=6, below=3).tolist() == best
