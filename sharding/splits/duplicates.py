"""Which patches are the same image, byte for byte, and what is said of such copies elsewhere.

A bunch is all patches of one content, two or more. A patch is in one bunch or, as most are, in none: -1. So a split that
lets copies lie apart is one that is told of no bunches.
"""

import numpy as np


def bunches_of(contents: np.ndarray) -> np.ndarray:
    """(n,) int64: the number of each patch's bunch, -1 where no other patch has its content. contents: (n, 2) uint64.

    Bunches are numbered in the order of their contents, so the numbers do not depend on the order of the patches.
    """
    order = np.lexsort((contents[:, 1], contents[:, 0]))
    ranked = contents[order]
    first = np.ones(len(order), bool)  # of its content
    first[1:] = (ranked[1:] != ranked[:-1]).any(1)
    shared = ~first
    shared[:-1] |= ~first[1:]
    bunches = np.full(len(order), -1, np.int64)
    bunches[order[shared]] = np.cumsum(first[shared]) - 1
    return bunches


def no_bunches(count: int) -> np.ndarray:
    """(count,) int64: as if every patch had a content of its own."""
    return np.full(count, -1, np.int64)


def spread(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The codes, ascending, that more than one value goes with; -1 in either means not known, and is passed over.

    codes, values: (n,), such as the bunch and the split of each patch.
    """
    known = (codes >= 0) & (values >= 0)
    codes, values = codes[known], values[known]
    one_of_them = np.zeros(codes.max(initial=-1) + 1, np.int64)
    one_of_them[codes] = values
    return np.unique(codes[values != one_of_them[codes]])


def most_common(codes: np.ndarray, values: np.ndarray, *, count: int, below: int) -> np.ndarray:
    """(count,) int64: the value that goes with each code most often, the lowest of equals; -1 where there is none.

    codes: (n,) up to count, values: (n,) up to below; -1 in either means not known, and is passed over.
    """
    known = (codes >= 0) & (values >= 0)
    table = np.bincount(codes[known] * below + values[known], minlength=count * below).reshape(count, below)
    return np.where(table.any(1), table.argmax(1), -1)
