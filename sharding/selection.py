"""Select patches: from a manifest to a list of ids, so that no tar is rewritten to make a smaller set.

Every choice depends on a patch's content, its class and the seed alone: not on the order of the manifest's rows, and not on
rows of other classes (except when whole groups or copies of one image link classes). A smaller fraction is a subset of a larger
one. The content is that of the source file, so a set packed from the same files with another encoding gives the same selection.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from sharding.manifest import decoded, source_digests
from sharding.philox import shuffle_keys
from sharding.splits.assign import assign_splits, content_digests, cut_classes, parse_shares
from sharding.splits.duplicates import duplicate_clusters, no_clusters
from sharding.splits.groups import Groups, split_whole_groups


def select(
    manifest: pa.Table,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    leave_out: Sequence[str] | None = None,
    fraction: float = 1.0,
    cap: int | None = None,
    balance: bool = False,
    validation: float = 0.0,
    part: Literal["train", "validation", "all"] = "train",
    resplit: str | Mapping[str, float] | None = None,
    group_aware: bool = False,
    duplicates: Literal["together", "apart"] = "together",
    seed: int = 42,
) -> np.ndarray:
    """The ids of the chosen patches, (n,) int64, ascending.

    In this order: keep the split; keep the classes, or leave some out; balance to the smallest class; keep at most cap
    patches of each class; keep the fraction of each class (rounded, at least 1 patch); set the validation share of each
    class aside (rounded, at least 1 patch if the class has 2), in whole groups if group_aware. `part` chooses the side of the
    last step. Unlabelled patches count as one class, which `classes` drops and `leave_out` keeps.
    resplit: shares such as "train=0.7,validation=0.15,test=0.15", by which the whole set is split anew, class by class, or by
    whole groups if group_aware; `split` then names one of these. The new splits depend on the set, the shares and the seed
    alone, so the test patches are the same for every fraction and for any choice of classes.
    duplicates: keep exact copies of an image on one side of a resplit and of the validation share ("together") or not ("apart").
    Raises ValueError for an unknown split or class, a number out of range, groups that are missing or linked by copies, or when
    nothing is selected.
    """
    _check_numbers(fraction, cap, validation, part)
    if duplicates not in ("together", "apart"):
        raise ValueError(f"duplicates {duplicates!r} is not known: it is together or apart")
    contents = content_digests(source_digests(manifest))
    keep = _of_split(manifest, split, resplit, contents, group_aware, duplicates, seed)
    if classes is not None:
        keep &= _of_classes(manifest, classes, keep, split)
    if leave_out is not None:
        keep &= ~_left_out(manifest, leave_out, classes)
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise ValueError("nothing is selected: the set, the split or the list of classes is empty")

    ids = manifest["id"].to_numpy()[rows]
    labels = manifest["label"].to_numpy()[rows].astype(np.int64)
    contents = contents[rows]
    # In random order, patches of equal content by id.
    order = np.lexsort((ids, shuffle_keys(contents[:, 0], seed=seed, stream="selection")))
    ordered = labels[order]
    per_class = [order[ordered == label] for label in np.unique(labels)]
    if balance:
        smallest = min(map(len, per_class))
        per_class = [members[:smallest] for members in per_class]
    if cap is not None:
        per_class = [members[:cap] for members in per_class]
    per_class = [members[: max(1, round(fraction * len(members)))] for members in per_class]
    chosen = np.concatenate(per_class)

    if part != "all" and validation:
        clusters = duplicate_clusters(contents[chosen]) if duplicates == "together" else no_clusters(len(chosen))
        if group_aware:
            held_out = _whole_groups(manifest, rows[chosen], labels[chosen], clusters, validation, seed)
        else:
            held_out = _stratified(ids[chosen], contents[chosen, 0], labels[chosen], clusters, validation, seed)
        chosen = chosen[held_out if part == "validation" else ~held_out]
    if not len(chosen):
        raise ValueError(f"nothing is selected for {part}: there are too few patches for a validation share of {validation:g}")
    return np.sort(ids[chosen])


def _of_split(
    manifest: pa.Table,
    split: str | None,
    resplit: str | Mapping[str, float] | None,
    contents: np.ndarray,
    group_aware: bool,
    duplicates: Literal["together", "apart"],
    seed: int,
) -> np.ndarray:
    """(n,) bool: the rows of a split, either of the set's own splits or of the resplit."""
    if resplit is None:
        if split is None:
            return np.ones(len(manifest), bool)
        codes, names = decoded(manifest["split"])
        if split not in names:
            raise ValueError(f"there is no split {split!r}; the set has {', '.join(names)}")
        return codes == names.index(split)

    if not isinstance(resplit, str):
        resplit = ",".join(f"{name}={share}" for name, share in resplit.items())
    shares = parse_shares(resplit, flag="resplit")
    if split not in shares:
        what = "name the split to take" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{what}; resplit makes {', '.join(shares)}")
    groups, group_names = decoded(manifest["group"])
    if group_aware:
        _check_groups(groups)
    labels = manifest["label"].to_numpy().astype(np.int64)
    codes, _ = assign_splits(
        labels,
        groups,
        group_names,
        contents,
        shares,
        by="group" if group_aware else "patch",
        duplicates=duplicates,
        seed=seed,
        group_field="group",
    )
    return codes == list(shares).index(split)


def _check_numbers(fraction: float, cap: int | None, validation: float, part: str) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction:g} is out of range: give a number above 0 and up to 1")
    if cap is not None and cap < 1:
        raise ValueError(f"cap {cap} is out of range: give at least 1 patch per class")
    if not 0 <= validation < 1:
        raise ValueError(f"validation {validation:g} is out of range: give a share from 0 to below 1")
    if part not in ("train", "validation", "all"):
        raise ValueError(f"there is no part {part!r}; it is train, validation or all")
    if part == "validation" and not validation:
        raise ValueError("part 'validation' needs a validation share above 0")


def _check_groups(groups: np.ndarray) -> None:
    if (groups < 0).any():
        raise ValueError(
            f"group_aware needs a group for every patch, and {int((groups < 0).sum()):,} have none (build with --group-by)"
        )


def _class_codes(manifest: pa.Table, wanted: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """(n,) class of each row, and the codes of the named classes."""
    codes, names = decoded(manifest["class"])
    for name in wanted:
        if name not in names:
            raise ValueError(f"there is no class {name!r}; the set has {', '.join(names) or 'no classes: it is unlabelled'}")
    return codes, [names.index(name) for name in wanted]


def _of_classes(manifest: pa.Table, classes: Sequence[str], keep: np.ndarray, split: str | None) -> np.ndarray:
    codes, wanted = _class_codes(manifest, classes)
    for name, code in zip(classes, wanted, strict=True):
        if not ((codes == code) & keep).any():
            raise ValueError(f"class {name!r} has no patch in split {split!r}")
    return np.isin(codes, wanted)


def _left_out(manifest: pa.Table, leave_out: Sequence[str], classes: Sequence[str] | None) -> np.ndarray:
    if both := sorted(set(leave_out) & set(classes or ())):
        raise ValueError(f"class {both[0]!r} is among the classes to keep and among those to leave out")
    codes, unwanted = _class_codes(manifest, leave_out)
    return np.isin(codes, unwanted)


def _stratified(
    ids: np.ndarray, keys: np.ndarray, labels: np.ndarray, clusters: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """(n,) bool: the validation share of each class."""

    def cuts(label: int, count: int) -> list[int]:
        least, most = (1, count - 1) if count > 1 else (0, 0)
        return [0, min(most, max(least, round(share * count))), count]

    order = np.lexsort((ids, clusters, shuffle_keys(keys, seed=seed, stream="validation")))
    return cut_classes(labels, order, clusters, cuts, parts=2) == 0


def _whole_groups(
    manifest: pa.Table, rows: np.ndarray, labels: np.ndarray, clusters: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """(n,) bool: whole groups, near the validation share of each class."""
    groups, names = decoded(manifest["group"].take(pa.array(rows)))
    _check_groups(groups)
    if len(np.unique(groups)) < 2:
        raise ValueError("group_aware needs at least two groups among the selected patches")
    # The result must not depend on the rows' order: the random numbers depend on the groups' names alone.
    shares = {"train": 1 - share, "validation": share}
    split = split_whole_groups(
        labels, Groups(groups, names, names), clusters, shares, seed=seed, field="group", stream="validation"
    )
    return split == 1
