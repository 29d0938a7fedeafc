"""Split whole groups (slides, patients), with every class as near its shares as the groups allow.

An exact split rarely exists: many seeded orders of the groups are tried and the best balanced split is kept. Groups that share
exact copies of an image are linked and stay together, since the image would be in several splits otherwise.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sharding.field_values import alike_key
from sharding.philox import shuffle_keys
from sharding.splits.duplicates import ambiguous_codes, most_common, no_clusters

_ORDERS = 64  # seeded orders of the groups that are tried
_STEPS = 40_000  # ... but fewer where there are many groups, which balance by themselves
_FAR = 0.1  # a share of the patches that is farther than this from the requested one is poor


class Groups(NamedTuple):
    """The group of each patch. codes: (n,) int64 index into names, -1 unknown; display_names: as the user wrote them."""

    codes: np.ndarray
    names: Sequence[str]
    display_names: Sequence[str]


def fold_alike(codes: np.ndarray, names: Sequence[str]) -> Groups:
    """Merge groups whose names are alike (sharding.field_values): Slide_1 and slide_1 are hardly two slides."""
    keys = [alike_key(name) for name in names]
    display_names = {key: name for name, key in sorted(zip(names, keys, strict=True), reverse=True)}  # the first of each key
    # The seeded order of groups comes from these names.
    folded = {key: name.casefold() for key, name in sorted(display_names.items(), key=lambda item: item[1].casefold())}
    place = {key: index for index, key in enumerate(folded)}
    lookup = np.array([place[key] for key in keys] + [-1], np.int64)  # -1 indexes the last: unknown stays -1
    return Groups(lookup[codes], list(folded.values()), [display_names[key] for key in folded])


def merge_linked(codes: np.ndarray, count: int, clusters: np.ndarray) -> np.ndarray:
    """(count,) int64: the lowest group of each group's component; groups are linked by shared copies, directly or indirectly.

    codes: (n,) group of each patch, -1 unknown; clusters: (n,) as in sharding.splits.duplicates.
    """
    tied = np.flatnonzero((codes >= 0) & (clusters >= 0))
    if not len(tied):
        return np.arange(count)
    # Imported here, because it is slow and most sets have no copies.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    cluster, group = np.divmod(np.unique(clusters[tied] * count + codes[tied]), count)
    same = cluster[1:] == cluster[:-1]
    links = coo_array((np.ones(same.sum(), bool), (group[:-1][same], group[1:][same])), shape=(count, count))
    components = connected_components(links, directed=False)[1]
    return np.unique(components, return_index=True)[1][components]


def split_whole_groups(
    labels: np.ndarray,
    groups: Groups,
    clusters: np.ndarray,
    shares: Mapping[str, float],
    *,
    seed: int,
    field: str,
    stream: str = "split",
    assigned: np.ndarray | None = None,
) -> np.ndarray:
    """split_groups with groups that share copies kept together: (n,) int64 indexes of splits.

    clusters: (n,) as in sharding.splits.duplicates. field: what a group is called, such as slide. assigned: (n,) the split that a
    patch has already and keeps, -1 for new ones. A new patch goes where most of its group is; a new group that shares copies
    with assigned patches goes where most of those copies are; the others balance the splits. Patches of unknown group must be
    assigned.
    Raises ValueError when keeping linked groups together takes a class from a split, or takes a split far from its share.
    """
    assigned = no_clusters(len(labels)) if assigned is None else assigned
    if (assigned >= 0).all():
        return assigned
    splits = _split_united(labels, groups, clusters, shares, seed, stream, assigned)
    if len(ambiguous_codes(clusters, groups.codes)):
        alone = _split_united(labels, groups, no_clusters(len(labels)), shares, seed, stream, assigned)
        if _worsens_split(labels, splits, alone, list(shares.values())):
            raise ValueError(
                f"{_describe_linked(groups, clusters, field)}, and keeping them in one split unbalances the splits: drop blank "
                "patches with --min-tissue, or allow copies across splits with --duplicates apart"
            )
    return splits


def _split_united(labels, groups, clusters, shares, seed, stream, assigned):
    codes, count = groups.codes, len(groups.names)
    # First the new patches of groups that have a split.
    own = most_common(codes, assigned, count=count, below=len(shares))
    placed = np.where(assigned < 0, own[codes], assigned)
    # Then the groups that are linked to those.
    new = placed < 0
    united = merge_linked(np.where(new, codes, -1), count, clusters)[codes]
    copies = most_common(clusters, placed, count=clusters.max(initial=0) + 1, below=len(shares))
    votes = np.where(new & (clusters >= 0), copies[clusters], -1)
    tied = most_common(united, votes, count=count, below=len(shares))
    placed = np.where(new, tied[united], placed)
    return split_groups(labels, united, groups.names, shares, seed=seed, stream=stream, assigned=placed)


def _worsens_split(labels: np.ndarray, splits: np.ndarray, alone: np.ndarray, shares: Sequence[float]) -> bool:
    """Whether linking groups took a class from a split, or took a split far from its share."""
    labels = np.unique(labels, return_inverse=True)[1]
    united, free = (_counts(s, labels, len(shares), labels.max() + 1) for s in (splits, alone))
    off, off_free = (abs(table.sum(1) / len(labels) - shares) for table in (united, free))
    return bool(((united == 0) & (free > 0)).any() or ((off > _FAR) & (off_free <= _FAR)).any())


def _describe_linked(groups: Groups, clusters: np.ndarray, field: str) -> str:
    """The size of the largest component of linked groups, and two of them that share an image."""
    codes, count = groups.codes, len(groups.names)
    united = merge_linked(codes, count, clusters)
    used = np.unique(codes[codes >= 0])
    largest = np.argmax(np.bincount(united[used]))
    inside = np.flatnonzero((codes >= 0) & (clusters >= 0))
    inside = inside[united[codes[inside]] == largest]
    shared = ambiguous_codes(clusters[inside], codes[inside])[0]
    one, other = (groups.display_names[g] for g in np.unique(codes[inside][clusters[inside] == shared])[:2])
    size = int((united[used] == largest).sum())
    return f"{size:,} of {len(used):,} {field}s are linked by exact copies of images (for example, {one} and {other})"


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
    assigned: np.ndarray | None = None,
) -> np.ndarray:
    """Give each group to one split, with every class as near its shares as the groups allow: (n,) int64 indexes of splits.

    labels: (n,) class index or -1; groups: (n,) index into names; assigned: (n,) the split of patches that have one and count
    towards its share, -1 for the others. A split whose share is 0 gets nothing. A class with at least as many groups as there
    are splits has a group in each of them, unless groups with several classes make that impossible.
    """
    assigned = np.full(len(labels), -1) if assigned is None else assigned
    free = assigned < 0
    labels = np.unique(labels, return_inverse=True)[1]
    classes = labels.max() + 1
    counts = _counts(groups[free], labels[free], len(names), classes)
    taken = _counts(assigned[~free], labels[~free], len(shares), classes)
    used = np.flatnonzero(counts.any(1)).tolist()  # a name may have no patch left after a selection
    chosen = np.zeros(len(names), np.int64)
    if used:
        asked = np.array(list(shares.values()))
        totals = np.bincount(labels, minlength=classes)
        open_ = np.flatnonzero(asked > 0)
        keys = name_keys([names[g] for g in used])
        chosen[used] = open_[_assign(counts[used], taken[open_], totals, keys, asked[open_], seed, stream)]
    return np.where(free, chosen[groups], assigned)


def _counts(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) int64: the number of times each pair occurs."""
    return np.bincount(rows * width + columns, minlength=height * width).reshape(height, width)


def _assign(
    counts: np.ndarray, taken: np.ndarray, totals: np.ndarray, keys: np.ndarray, shares: np.ndarray, seed: int, stream: str
) -> np.ndarray:
    """(G,) split of each group.

    counts: (G, C) patches per group and class; taken: (S, C) patches that the splits have already; totals: (C,) all patches
    of each class; keys: (G,) uint64 that identify the groups; shares: (S,).
    """
    weights = counts / totals  # so that a rare class weighs as much as a common one
    missing = np.outer(shares, np.ones(counts.shape[1])) - taken / totals
    best: tuple[tuple[int, float], np.ndarray] | None = None
    for attempt in range(max(1, min(_ORDERS, _STEPS // len(counts)))):
        draw = shuffle_keys(keys, seed=seed, stream=stream, epoch=attempt)
        # In random order, but the larger half first: small groups then even out what large ones leave.
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
    """Assign each group in turn to the split where it reduces the squared distance from the target most."""
    missing = missing.copy()
    splits = np.empty(len(weights), np.int64)
    for group in order:
        change = (weights[group] * (weights[group] - 2 * missing)).sum(1)
        splits[group] = np.argmin(change)
        missing[splits[group]] -= weights[group]
    return splits


def _sources(counts: np.ndarray, splits: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """(S, C) number of groups of each class in each split; all patches taken before count as one."""
    found = (taken > 0).astype(np.int64)
    np.add.at(found, splits, counts > 0)
    return found


def _repair(counts: np.ndarray, weights: np.ndarray, order: np.ndarray, splits: np.ndarray, taken: np.ndarray) -> None:
    """Fill gaps in place: to a split without a group of a class, move the smallest group whose move leaves no other gap."""
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
    """The number of gaps, then the squared distance from the shares; lower is better."""
    given = np.zeros_like(missing)
    np.add.at(given, splits, weights)
    gaps = int((_sources(counts, splits, taken) == 0).sum())
    return gaps, round(float(((given - missing) ** 2).sum()), 12)
