"""Records -> train and test (or any other names), class by class, seeded, with whole groups where asked.

Without groups, each class is cut at Python's `round` of the cumulative shares: 5,678 patches at 0.8 give 4,542 and 1,136.
With groups no exact cut exists; many seeded orders are tried and the best balanced is kept.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sharding.draws import priorities

_ORDERS = 64  # seeded orders of the groups that are tried
_STEPS = 40_000  # ... but fewer where there are many groups, which balance by themselves


def parse_shares(text: str) -> dict[str, float]:
    """The shares that 'train=0.8,test=0.2' names, in order. Raises ValueError where they do not sum to 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not 0 < share <= 1:
            raise ValueError(f"--split {text!r}: {part.strip()!r} is not of the form name=share with a share from 0 to 1")
        if name in shares:
            raise ValueError(f"--split {text!r} names {name!r} twice")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"--split {text!r}: the shares sum to {sum(shares.values()):g}, not to 1")
    return shares


def cut_points(count: int, shares: Sequence[float]) -> list[int]:
    """Where to cut `count` items so that each part has its share, by Python's round of the cumulative shares."""
    # Rounded to 9 decimals first: 0.7 + 0.15 is 0.85 to the person who wrote it, not 0.8499999999999999.
    cumulative = np.cumsum(shares)
    return [0, *(round(round(float(c), 9) * count) for c in cumulative[:-1]), count]


def content_keys(digests: Sequence[str]) -> np.ndarray:
    """(n,) uint64: the first 8 bytes of each hex sha256, a name for a patch that does not change with its place."""
    return np.array([int(digest[:16], 16) for digest in digests], np.uint64)


def name_keys(names: Sequence[str]) -> np.ndarray:
    """(n,) uint64: the first 8 bytes of each name's sha256."""
    return content_keys([hashlib.sha256(name.encode()).hexdigest() for name in names])


def split_patches(labels: np.ndarray, keys: np.ndarray, shares: Mapping[str, float], *, seed: int) -> np.ndarray:
    """Cut each class by itself: (n,) int64 indexes into the names of the shares.

    labels: (n,) class index, -1 for all where unlabelled; keys: (n,) uint64 from content_keys. Equal keys keep their order.
    """
    order = np.argsort(priorities(keys, seed=seed, stream="split"), kind="stable")
    result = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        cuts = cut_points(len(members), list(shares.values()))
        for index, (start, end) in enumerate(itertools.pairwise(cuts)):
            result[members[start:end]] = index
    return result


def split_groups(
    labels: np.ndarray, groups: np.ndarray, names: Sequence[str], shares: Mapping[str, float], *, seed: int, stream: str = "split"
) -> np.ndarray:
    """Give each group to one split, with every class as near its shares as the groups allow: (n,) int64 indexes of splits.

    labels: (n,) class index or -1; groups: (n,) index into names. A class with at least as many groups as there are
    splits has a group in each of them, except where groups that hold several classes make that impossible.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    counts = np.zeros((len(names), labels.max() + 1), np.int64)
    np.add.at(counts, (groups, labels), 1)
    used = np.flatnonzero(counts.sum(1)).tolist()  # a name may have no patch left after a selection
    chosen = np.zeros(len(names), np.int64)
    chosen[used] = assign_groups(counts[used], name_keys([names[g] for g in used]), list(shares.values()), seed, stream)
    return chosen[groups]


def assign_groups(counts: np.ndarray, keys: np.ndarray, shares: Sequence[float], seed: int, stream: str) -> np.ndarray:
    """(G,) split of each group; counts: (G, C) patches per group and class, keys: (G,) uint64 that name the groups."""
    weights = counts / counts.sum(0)  # so that a rare class weighs as much as a common one
    target = np.outer(shares, np.ones(counts.shape[1]))
    best: tuple[tuple[int, float], np.ndarray] | None = None
    for attempt in range(max(1, min(_ORDERS, _STEPS // len(counts)))):
        draw = priorities(keys, seed=seed, stream=stream, epoch=attempt)
        # By draw, but the larger half of the groups first: small groups then even out what large ones leave.
        large = counts.sum(1) >= np.median(counts.sum(1))
        order = np.lexsort((draw, ~large))
        splits = _greedy(weights, order, target)
        _repair(counts, weights, order, splits, len(shares))
        score = _score(counts, weights, splits, target)
        if best is None or score < best[0]:
            best = score, splits
    assert best is not None
    return best[1]


def _greedy(weights: np.ndarray, order: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each group in turn to the split where it lowers the squared distance from the target most."""
    missing = target.copy()
    splits = np.empty(len(weights), np.int64)
    for group in order:
        change = (weights[group] * (weights[group] - 2 * missing)).sum(1)
        splits[group] = np.argmin(change)
        missing[splits[group]] -= weights[group]
    return splits


def _held(counts: np.ndarray, splits: np.ndarray, number: int) -> np.ndarray:
    """(S, C) number of groups of each class in each split."""
    held = np.zeros((number, counts.shape[1]), np.int64)
    np.add.at(held, splits, counts > 0)
    return held


def _repair(counts: np.ndarray, weights: np.ndarray, order: np.ndarray, splits: np.ndarray, number: int) -> None:
    """Where a split has no group of a class, move there the smallest one whose loss leaves no other gap. In place."""
    for _ in range(number * counts.shape[1]):
        held = _held(counts, splits, number)
        moved = False
        for split, label in zip(*np.nonzero(held == 0), strict=True):
            # A group may go if each of its classes has another group where it is now.
            spare = [g for g in order if counts[g, label] and (held[splits[g]][counts[g] > 0] > 1).all()]
            if spare:
                splits[min(spare, key=lambda g: weights[g].sum())] = split
                moved = True
                break
        if not moved:
            return


def _score(counts: np.ndarray, weights: np.ndarray, splits: np.ndarray, target: np.ndarray) -> tuple[int, float]:
    """Gaps first, then the squared distance from the shares; the lower the better."""
    reached = np.zeros_like(target)
    np.add.at(reached, splits, weights)
    gaps = int((_held(counts, splits, len(target)) == 0).sum())
    return gaps, round(float(((reached - target) ** 2).sum()), 12)


def shared_groups(splits: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> list[str]:
    """One sentence per split after the first, where its patches share a group with patches of the first."""
    known = groups >= 0
    first = np.unique(groups[known & (splits == 0)])
    notes = []
    for index, name in enumerate(names[1:], start=1):
        mine = known & (splits == index)
        shared = int(np.isin(groups[mine], first).sum())
        if shared:
            notes.append(f"{shared:,} of {int((splits == index).sum()):,} {name} patches share a group with {names[0]} patches")
    return notes
