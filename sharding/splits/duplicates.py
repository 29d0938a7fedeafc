"""Exact duplicates: which patches have the same bytes, and which splits or classes they are in.

A cluster is all patches with one content, if there are two or more. Most patches are in no cluster: -1. So duplicates may be
split up where a function is given `no_clusters`.
"""

import numpy as np


def duplicate_clusters(contents: np.ndarray) -> np.ndarray:
    """(n,) int64: the cluster of each patch, -1 where no other patch has its content. contents: (n, 2) uint64.

    Clusters are numbered in the order of their contents, so the numbers do not depend on the order of the patches.
    """
    order = np.lexsort((contents[:, 1], contents[:, 0]))
    ranked = contents[order]
    first = np.ones(len(order), bool)  # of its content
    first[1:] = (ranked[1:] != ranked[:-1]).any(1)
    shared = ~first
    shared[:-1] |= ~first[1:]
    clusters = np.full(len(order), -1, np.int64)
    clusters[order[shared]] = np.cumsum(first[shared]) - 1
    return clusters


def no_clusters(count: int) -> np.ndarray:
    """(count,) int64: -1 for each patch."""
    return np.full(count, -1, np.int64)


def ambiguous_codes(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The codes, ascending, that occur with more than one value. Entries where either is -1 (unknown) are skipped.

    codes, values: (n,), such as the cluster and the split of each patch.
    """
    known = (codes >= 0) & (values >= 0)
    codes, values = codes[known], values[known]
    one_value = np.zeros(codes.max(initial=-1) + 1, np.int64)
    one_value[codes] = values
    return np.unique(codes[values != one_value[codes]])


def most_common(codes: np.ndarray, values: np.ndarray, *, count: int, below: int) -> np.ndarray:
    """(count,) int64: the value that occurs most often with each code, the lowest in a tie; -1 if there is no value.

    codes: (n,) below count; values: (n,) below `below`. Entries where either is -1 (unknown) are skipped.
    """
    known = (codes >= 0) & (values >= 0)
    table = np.bincount(codes[known] * below + values[known], minlength=count * below).reshape(count, below)
    return np.where(table.any(1), table.argmax(1), -1)
