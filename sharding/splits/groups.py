"""Whole groups (slides, patients) -> splits, with every class as near its shares as the groups allow.

No exact cut exists here: many seeded orders of the groups are tried and the best balanced is kept. Groups that hold copies
of one image are tied together, since the image would lie on both sides otherwise.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sharding.philox import priorities
from sharding.splits.duplicates import most_common, no_bunches, spread

_ORDERS = 64  # seeded orders of the groups that are tried
_STEPS = 40_000  # ... but fewer where there are many groups, which balance by themselves
_FAR = 0.1  # a split's share of the patches is spoilt if it is farther than this from the asked one


class Groups(NamedTuple):
    """The group of each patch. codes: (n,) int64 index into names, -1 unknown; spelled: the names as a user knows them."""

    codes: np.ndarray
    names: Sequence[str]
    spelled: Sequence[str]


def fold_case(codes: np.ndarray, names: Sequence[str]) -> Groups:
    """Groups whose names differ in upper and lower case alone made one: Slide_1 and slide_1 are hardly two slides."""
    spelled: dict[str, str] = {}
    for name in sorted(names):
        spelled.setdefault(name.casefold(), name)
    folded = sorted(spelled)
    place = {name: index for index, name in enumerate(folded)}
    lookup = np.array([place[name.casefold()] for name in names] + [-1], np.int64)  # -1 indexes the last: unknown stays -1
    return Groups(lookup[codes], folded, [spelled[name] for name in folded])


def unite(codes: np.ndarray, count: int, bunches: np.ndarray) -> np.ndarray:
    """(count,) int64: groups that copies tie together, directly or through others, each as the lowest one of them.

    codes: (n,) group of each patch, -1 unknown; bunches: (n,) as in sharding.splits.duplicates.
    """
    tied = np.flatnonzero((codes >= 0) & (bunches >= 0))
    if not len(tied):
        return np.arange(count)
    # Only here, and not on top: it takes a while, and most sets have no copies.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    bunch, group = np.divmod(np.unique(bunches[tied] * count + codes[tied]), count)
    same = bunch[1:] == bunch[:-1]
    links = coo_array((np.ones(same.sum(), bool), (group[:-1][same], group[1:][same])), shape=(count, count))
    components = connected_components(links, directed=False)[1]
    return np.unique(components, return_index=True)[1][components]


def split_whole_groups(
    labels: np.ndarray,
    groups: Groups,
    bunches: np.ndarray,
    shares: Mapping[str, float],
    *,
    seed: int,
    field: str,
    stream: str = "split",
    held: np.ndarray | None = None,
) -> np.ndarray:
    """As split_groups, with the groups that share copies kept together: (n,) int64 indexes of splits.

    bunches: (n,) as in sharding.splits.duplicates. field: what a group is called, such as slide. held: (n,) the split that a
    patch has already and keeps, -1 for new ones. A new patch goes where its group is held (where most of it is); a new group with
    copies of patches that have a place goes where most of those copies are; the others even out what is held. Patches
    whose group is unknown must be held.
    Raises ValueError where keeping groups together spoils the split: a split loses a class, or gets far from its share.
    """
    held = no_bunches(len(labels)) if held is None else held
    if (held >= 0).all():
        return held
    splits = _split_united(labels, groups, bunches, shares, seed, stream, held)
    if len(spread(bunches, groups.codes)):
        alone = _split_united(labels, groups, no_bunches(len(labels)), shares, seed, stream, held)
        if _spoilt(labels, splits, alone, list(shares.values())):
            raise ValueError(
                f"{_entangled(groups, bunches, field)}, and kept in one split they leave no fair one: drop blank patches with"
                " --min-tissue, or allow copies across splits with --duplicates apart"
            )
    return splits


def _split_united(labels, groups, bunches, shares, seed, stream, held):
    codes, count = groups.codes, len(groups.names)
    # What has a place already: held patches, and new ones of their groups.
    own = most_common(codes, held, count=count, below=len(shares))
    placed = np.where(held < 0, own[codes], held)
    # Then the groups that are tied to those.
    new = placed < 0
    united = unite(np.where(new, codes, -1), count, bunches)[codes]
    copies = most_common(bunches, placed, count=bunches.max(initial=0) + 1, below=len(shares))
    votes = np.where(new & (bunches >= 0), copies[bunches], -1)
    tied = most_common(united, votes, count=count, below=len(shares))
    placed = np.where(new, tied[united], placed)
    return split_groups(labels, united, groups.names, shares, seed=seed, stream=stream, held=placed)


def _spoilt(labels: np.ndarray, splits: np.ndarray, alone: np.ndarray, shares: Sequence[float]) -> bool:
    """Whether uniting groups took a class from a split, or took a split far from its share."""
    labels = np.unique(labels, return_inverse=True)[1]
    united, free = (_counts(s, labels, len(shares), labels.max() + 1) for s in (splits, alone))
    off, off_free = (abs(table.sum(1) / len(labels) - shares) for table in (united, free))
    return bool(((united == 0) & (free > 0)).any() or ((off > _FAR) & (off_free <= _FAR)).any())


def _entangled(groups: Groups, bunches: np.ndarray, field: str) -> str:
    """How many groups hang together at most, and two of them that share an image."""
    codes, count = groups.codes, len(groups.names)
    united = unite(codes, count, bunches)
    used = np.unique(codes[codes >= 0])
    largest = np.argmax(np.bincount(united[used]))
    inside = np.flatnonzero((codes >= 0) & (bunches >= 0))
    inside = inside[united[codes[inside]] == largest]
    shared = spread(bunches[inside], codes[inside])[0]
    one, other = (groups.spelled[g] for g in np.unique(codes[inside][bunches[inside] == shared])[:2])
    size = int((united[used] == largest).sum())
    return f"{size:,} of {len(used):,} {field}s hang together through exact copies of images (for example, {one} and {other})"


def name_keys(names: Sequence[str]) -> np.ndarray:
    """(n,) uint64: the first 8 bytes of each name's sha256."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def split_groups(
    labels: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    shares: Mapping[str, float],
    *,
    seed: int,
    stream: str = "split",
    held: np.ndarray | None = None,
) -> np.ndarray:
    """Give each group to one split, with every class as near its shares as the groups allow: (n,) int64 indexes of splits.

    labels: (n,) class index or -1; groups: (n,) index into names; held: (n,) the split of patches that are not to be
    given, but are counted, -1 for the others. A split whose share is 0 is given nothing. A class with at least as many groups
    as there are splits has a group in each of them, except where groups that hold several classes make that impossible.
    """
    held = np.full(len(labels), -1) if held is None else held
    free = held < 0
    labels = np.unique(labels, return_inverse=True)[1]
    classes = labels.max() + 1
    counts = _counts(groups[free], labels[free], len(names), classes)
    taken = _counts(held[~free], labels[~free], len(shares), classes)
    used = np.flatnonzero(counts.any(1)).tolist()  # a name may have no patch left after a selection
    chosen = np.zeros(len(names), np.int64)
    if used:
        asked = np.array(list(shares.values()))
        totals = np.bincount(labels, minlength=classes)
        open_ = np.flatnonzero(asked > 0)
        keys = name_keys([names[g] for g in used])
        chosen[used] = open_[_assign(counts[used], taken[open_], totals, keys, asked[open_], seed, stream)]
    return np.where(free, chosen[groups], held)


def _counts(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) int64: how often each pair occurs."""
    return np.bincount(rows * width + columns, minlength=height * width).reshape(height, width)


def _assign(
    counts: np.ndarray, taken: np.ndarray, totals: np.ndarray, keys: np.ndarray, shares: np.ndarray, seed: int, stream: str
) -> np.ndarray:
    """(G,) split of each group.

    counts: (G, C) patches per group and class, taken: (S, C) patches that the splits have already, totals: (C,) all patches
    of each class, keys: (G,) uint64 that name the groups, shares: (S,).
    """
    weights = counts / totals  # so that a rare class weighs as much as a common one
    missing = np.outer(shares, np.ones(counts.shape[1])) - taken / totals
    best: tuple[tuple[int, float], np.ndarray] | None = None
    for attempt in range(max(1, min(_ORDERS, _STEPS // len(counts)))):
        draw = priorities(keys, seed=seed, stream=stream, epoch=attempt)
        # By draw, but the larger half of the groups first: small groups then even out what large ones leave.
        large = counts.sum(1) >= np.median(counts.sum(1))
        order = np.lexsort((draw, ~large))
        splits = _greedy(weights, order, missing)
        _repair(counts, weights, order, splits, taken)
        score = _score(counts, weights, splits, taken, missing)
        if best is None or score < best[0]:
            best = score, splits
    assert best is not None
    return best[1]


def _greedy(weights: np.ndarray, order: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Each group in turn to the split where it lowers the squared distance from the target most."""
    missing = missing.copy()
    splits = np.empty(len(weights), np.int64)
    for group in order:
        change = (weights[group] * (weights[group] - 2 * missing)).sum(1)
        splits[group] = np.argmin(change)
        missing[splits[group]] -= weights[group]
    return splits


def _sources(counts: np.ndarray, splits: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """(S, C) number of groups of each class in each split; all that was taken before counts as one."""
    found = (taken > 0).astype(np.int64)
    np.add.at(found, splits, counts > 0)
    return found


def _repair(counts: np.ndarray, weights: np.ndarray, order: np.ndarray, splits: np.ndarray, taken: np.ndarray) -> None:
    """Where a split has no group of a class, move there the smallest one whose loss leaves no other gap. In place."""
    for _ in range(taken.size):
        found = _sources(counts, splits, taken)
        moved = False
        for split, label in zip(*np.nonzero(found == 0), strict=True):
            # A group may go if each of its classes has another group where it is now.
            spare = [g for g in order if counts[g, label] and (found[splits[g]][counts[g] > 0] > 1).all()]
            if spare:
                splits[min(spare, key=lambda g: weights[g].sum())] = split
                moved = True
                break
        if not moved:
            return


def _score(
    counts: np.ndarray, weights: np.ndarray, splits: np.ndarray, taken: np.ndarray, missing: np.ndarray
) -> tuple[int, float]:
    """Gaps first, then the squared distance from the shares; the lower the better."""
    given = np.zeros_like(missing)
    np.add.at(given, splits, weights)
    gaps = int((_sources(counts, splits, taken) == 0).sum())
    return gaps, round(float(((given - missing) ** 2).sum()), 12)
