"""Assign patches to splits (train, test, or any other names), class by class, seeded, and by whole groups if asked.

By patch, each class is cut at Python's `round` of the cumulative shares: 5,678 patches at 0.8 give 4,542 and 1,136. Copies of
one image are neighbours in the order, and a cut that would fall between them moves to their nearer end. For splits by group see
sharding.splits.groups. Patches that a set has already keep their split, and new ones make up for it.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.field_values import alike_key, alike_notes
from sharding.philox import shuffle_keys
from sharding.splits.duplicates import ambiguous_codes, duplicate_clusters, most_common, no_clusters
from sharding.splits.groups import Groups, fold_alike, merge_linked, split_whole_groups

_ROWS = 2**16  # digests that are Python strings at a time
_FAR = 0.05  # a class that is farther than this from the requested shares is reported


def parse_shares(text: str, *, flag: str = "--split") -> dict[str, float]:
    """Parse shares such as 'train=0.8,test=0.2', in order. Raises ValueError when they do not sum to 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not 0 < share <= 1:
            raise ValueError(f"{flag} {text!r}: {part.strip()!r} is not of the form name=share with a share from 0 to 1")
        if alike_key(name) in map(alike_key, shares):
            raise ValueError(f"{flag} {text!r} names {name!r} twice")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"{flag} {text!r}: the shares sum to {sum(shares.values()):g}, not to 1")
    return shares


def cut_points(count: int, shares: Sequence[float]) -> list[int]:
    """Where to cut `count` items so that each part has its share, by Python's round of the cumulative shares."""
    # Rounded to 9 decimals first: 0.7 + 0.15 means 0.85, not 0.8499999999999999.
    cumulative = np.cumsum(shares)
    return [0, *(round(round(float(c), 9) * count) for c in cumulative[:-1]), count]


def content_digests(digests: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(n, 2) uint64: the first 16 bytes of each hex sha256, which identify a patch wherever it is stored."""
    words = digests if isinstance(digests, pa.Array | pa.ChunkedArray) else pa.array(digests, pa.string())
    found = np.empty((len(words), 2), np.uint64)
    for start in range(0, len(words), _ROWS):
        part = pc.utf8_slice_codeunits(words[start : start + _ROWS], 0, 32).to_pylist()
        found[start : start + len(part)] = np.frombuffer(bytes.fromhex("".join(part)), ">u8").reshape(-1, 2)
    return found


def content_keys(digests: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(n,) uint64: the first 8 bytes of each hex sha256, from which random numbers are drawn."""
    return content_digests(digests)[:, 0]


def assign_splits(
    labels: np.ndarray,
    groups: np.ndarray,
    group_names: Sequence[str],
    contents: np.ndarray,
    shares: Mapping[str, float],
    *,
    by: Literal["patch", "group"],
    duplicates: Literal["together", "apart"],
    seed: int,
    group_field: str,
    assigned: np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> tuple[np.ndarray, list[str]]:
    """(n,) int64: the index into shares of each patch's split; and messages about it, one sentence each.

    labels: (n,) class index, -1 unlabelled (a class of its own); groups: (n,) int64 index into group_names, -1 unknown;
    contents: (n, 2) uint64 from content_digests. by: cut each class, or assign whole groups. duplicates: keep exact copies of
    an image in one split, or not. group_field: what a group is called, such as slide. assigned: (n,) the split that a patch has
    already and keeps, -1 for new ones, which are split so that all patches together come near the shares.
    A share may be 0 for a split that gets no new patches. class_names: the names of classes in messages.
    Raises ValueError when a new patch lacks a group to be split by, or when groups that share copies unbalance the splits.
    """
    assert by in ("patch", "group") and duplicates in ("together", "apart") and len(labels)
    assigned = no_clusters(len(labels)) if assigned is None else assigned
    clusters = duplicate_clusters(contents)
    tied = clusters if duplicates == "together" else no_clusters(len(labels))
    folded = fold_alike(groups, group_names)
    notes = alike_notes([group_names[group] for group in np.unique(groups[groups >= 0])], group_field)
    notes += _copy_notes(clusters)
    if len(shares) == 1:
        splits = np.zeros(len(labels), np.int64)
    elif by == "group":
        if lost := int(((groups < 0) & (assigned < 0)).sum()):
            patches = "1 patch has" if lost == 1 else f"{lost:,} patches have"
            raise ValueError(f"{patches} no {group_field}: correct the layout, or give --split-by patch")
        splits = split_whole_groups(labels, folded, tied, shares, seed=seed, field=group_field, assigned=assigned)
        notes += _group_notes(folded, tied, splits, shares, group_field)
    else:
        splits = split_patches(labels, contents[:, 0], shares, seed=seed, clusters=tied, assigned=assigned)
        apart = splits
        if (tied >= 0).any():
            apart = split_patches(labels, contents[:, 0], shares, seed=seed, assigned=assigned)
        if brought := len(ambiguous_codes(clusters, apart)) - len(ambiguous_codes(clusters, splits)):
            images = "image" if brought == 1 else "images"
            notes.append(f"{brought:,} {images} would have been in several splits as exact copies: each was put in one")
        notes += shared_groups(splits, folded.codes, list(shares))
    if far := len(ambiguous_codes(clusters, splits)):
        why = ", since patches of the old set keep their split" if duplicates == "together" else ""
        notes.append(f"{_images_are(far)} in several splits as exact copies{why}")
    if noisy := len(ambiguous_codes(clusters, labels)):
        notes.append(f"{_images_are(noisy)} in several classes as exact copies")
    if (assigned < 0).any():
        notes += _share_notes(labels, splits, shares, class_names)
    return splits, notes


def split_patches(
    labels: np.ndarray,
    keys: np.ndarray,
    shares: Mapping[str, float],
    *,
    seed: int,
    clusters: np.ndarray | None = None,
    assigned: np.ndarray | None = None,
) -> np.ndarray:
    """Split each class separately: (n,) int64 indexes into the names of the shares.

    labels: (n,) class index, -1 where unlabelled; keys: (n,) uint64 from content_keys; equal keys keep their order.
    clusters: (n,) of sharding.splits.duplicates, each to be in one split; assigned: (n,) the split that a patch has already and
    keeps, -1 for the others. A copy of an assigned patch goes to that patch's split, and the rest of a class to the splits that
    are short of their share.
    """
    clusters = no_clusters(len(labels)) if clusters is None else clusters
    result = no_clusters(len(labels)) if assigned is None else assigned.copy()
    number = clusters.max(initial=0) + 1  # at least 1, so that -1 is a valid index
    copied = (result < 0) & (clusters >= 0)
    result[copied] = most_common(clusters, result, count=number, below=len(shares))[clusters[copied]]

    def cuts(label: int, count: int) -> np.ndarray:
        mine = result[(labels == label) & (result >= 0)]
        asked = np.diff(cut_points(len(mine) + count, list(shares.values())))
        return _cuts_by_need(asked - np.bincount(mine, minlength=len(shares)), count)

    free = np.flatnonzero(result < 0)
    order = np.lexsort((clusters[free], shuffle_keys(keys[free], seed=seed, stream="split")))
    result[free] = cut_classes(labels[free], order, clusters[free], cuts, parts=len(shares))
    return result


def _cuts_by_need(need: np.ndarray, count: int) -> np.ndarray:
    """(S + 1,) where to cut `count` items so that each part gets what it needs; surpluses reduce all other parts equally.

    need: (S,) whole numbers with the sum `count`, below 0 for a part that has too much already.
    """
    given = need.astype(float)
    while (given < 0).any():
        needy = given > 0
        given = np.where(needy, given + given[given < 0].sum() / needy.sum(), 0)
    return np.rint(np.concatenate([[0], np.cumsum(given)])).astype(np.int64)


def cut_classes(
    labels: np.ndarray,
    order: np.ndarray,
    clusters: np.ndarray,
    cuts: Callable[[int, int], Sequence[int] | np.ndarray],
    *,
    parts: int,
) -> np.ndarray:
    """Cut each class in the given order, no cluster in two: (n,) int64 indexes of parts.

    labels: (n,); order: (n,) indexes in which a class's members of one cluster follow each other; clusters: (n,) of
    sharding.splits.duplicates; cuts(label, count): parts + 1 places from 0 to count. A cut within a cluster moves to its nearer
    end, but to an end of the class only if there is no other. A cluster in several classes goes to the part with most of it.
    """
    result = np.empty(len(labels), np.int64)
    ordered = labels[order]
    for label in np.unique(labels):
        members = order[ordered == label]
        cluster = clusters[members]
        between = 1 + np.flatnonzero((cluster[1:] != cluster[:-1]) | (cluster[1:] < 0))
        places = np.array(cuts(int(label), len(members)))
        assert places[0] == 0 and places[-1] == len(members) and (np.diff(places) >= 0).all(), places
        inner = (places > 0) & (places < len(members))
        places[inner] = _nearest(between if len(between) else np.array([0, len(members)]), places[inner])
        for part, (start, end) in enumerate(itertools.pairwise(places)):
            result[members[start:end]] = part
    copied = clusters >= 0
    if copied.any():
        result[copied] = most_common(clusters, result, count=clusters.max() + 1, below=parts)[clusters[copied]]
    return result


def _nearest(choices: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The choice nearest to each place, the lower in a tie. choices: ascending."""
    high = np.searchsorted(choices, places).clip(max=len(choices) - 1)
    low = np.maximum(high - 1, 0)
    return np.where(places - choices[low] <= choices[high] - places, choices[low], choices[high])


# Messages


def _copy_notes(clusters: np.ndarray) -> list[str]:
    extra = int((clusters >= 0).sum()) - int(clusters.max(initial=-1)) - 1  # all of a cluster but one
    if not extra:
        return []
    return [f"{extra:,} {'patch is an exact copy' if extra == 1 else 'patches are exact copies'} of another one"]


def _images_are(images: int) -> str:
    return f"{images:,} {'image is' if images == 1 else 'images are'}"


def _group_notes(groups: Groups, clusters: np.ndarray, splits: np.ndarray, shares: Mapping[str, float], field: str) -> list[str]:
    notes = []
    used = np.unique(groups.codes[groups.codes >= 0])
    united = merge_linked(groups.codes, len(groups.names), clusters)[used]
    if together := int((np.bincount(united)[united] > 1).sum()):
        notes.append(
            f"{together:,} of {len(used):,} {field}s share exact copies of images with another one and were kept together"
        )
    divided = len(ambiguous_codes(groups.codes, splits))
    whole = f"every {field}" if not divided else f"every {field} but {divided:,} that the old set has in several"
    reached = np.bincount(splits, minlength=len(shares)) / len(splits)
    result = f"{' / '.join(shares)} got {_percent(reached)} (asked: {_percent(shares.values())})"
    return [*notes, f"{whole} is whole in one split: {result}"]


def _share_notes(labels: np.ndarray, splits: np.ndarray, shares: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """One sentence on the classes that are far from the requested shares, by more than the one patch that cannot be divided."""
    asked = np.array(list(shares.values()))
    missed = []
    for label in np.unique(labels):
        mine = splits[labels == label]
        reached = np.bincount(mine, minlength=len(shares)) / len(mine)
        if (abs(reached - asked) > max(_FAR, 1 / len(mine))).any():
            name = "unlabelled" if label < 0 else names[label] if len(names) else f"class {label}"
            missed.append(f"{name} ({_percent(reached)} of {len(mine):,})")
    if not missed:
        return []
    return [f"more than {_FAR * 100:g} percentage points off the asked {' / '.join(shares)}: {', '.join(missed)}"]


def _percent(shares: Iterable[float]) -> str:
    return " / ".join(f"{share:.1%}" for share in shares)


def shared_groups(splits: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> list[str]:
    """One sentence for each split after the first whose patches share a group with patches of the first."""
    known = groups >= 0
    first = np.unique(groups[known & (splits == 0)])
    notes = []
    for index, name in enumerate(names[1:], start=1):
        mine = known & (splits == index)
        shared = int(np.isin(groups[mine], first).sum())
        if shared:
            notes.append(f"{shared:,} of {int((splits == index).sum()):,} {name} patches share a group with {names[0]} patches")
    return notes
