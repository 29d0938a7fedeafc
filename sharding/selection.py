"""Manifest -> patch ids. A selection is a list of ids, so no tar is ever rewritten to make a smaller set.

Every choice depends on a patch's content, its class and the seed alone: not on the order of the manifest's rows, and not on
rows of other classes. A smaller fraction lies inside a larger one.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from sharding.draws import priorities
from sharding.manifest import decoded
from sharding.splits import content_keys, split_groups


def select(
    manifest: pa.Table,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    cap: int | None = None,
    balance: bool = False,
    validation: float = 0.0,
    part: Literal["train", "validation", "all"] = "train",
    group_aware: bool = False,
    seed: int = 42,
) -> np.ndarray:
    """The ids of the chosen patches, (n,) int64, ascending.

    In this order: keep the split and the classes; balance to the smallest class; keep at most cap patches of each class;
    keep the fraction of each class (rounded, at least 1 patch); set the validation share of each class aside (rounded, at
    least 1 patch where the class has 2), whole groups of it where group_aware. `part` says which side of the last step is
    returned. Unlabelled patches count as one class.
    Raises ValueError for an unknown split or class, a number out of range, or where nothing is selected.
    """
    _check_numbers(fraction, cap, validation, part)
    split_codes, split_names = decoded(manifest["split"])
    labels = manifest["label"].to_numpy().astype(np.int64)
    keep = np.ones(len(labels), bool)
    if split is not None:
        if split not in split_names:
            raise ValueError(f"there is no split {split!r}; the set has {', '.join(split_names)}")
        keep &= split_codes == split_names.index(split)
    if classes is not None:
        keep &= _of_classes(manifest, classes, keep, split)
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise ValueError("nothing is selected: the set, the split or the list of classes is empty")

    ids = manifest["id"].to_numpy()[rows]
    labels = labels[rows]
    keys = content_keys(manifest["sha256"].take(pa.array(rows)).to_pylist())
    # By draw, equal content by id.
    order = np.lexsort((ids, priorities(keys, seed=seed, stream="selection")))
    per_class = [order[labels[order] == label] for label in np.unique(labels)]
    if balance:
        smallest = min(map(len, per_class))
        per_class = [members[:smallest] for members in per_class]
    if cap is not None:
        per_class = [members[:cap] for members in per_class]
    per_class = [members[: max(1, round(fraction * len(members)))] for members in per_class]
    chosen = np.concatenate(per_class)

    if part != "all":
        if not validation:
            held_out = np.zeros(len(chosen), bool)
        elif group_aware:
            held_out = _whole_groups(manifest, rows[chosen], labels[chosen], validation, seed)
        else:
            held_out = _stratified(ids[chosen], keys[chosen], labels[chosen], validation, seed)
        chosen = chosen[held_out if part == "validation" else ~held_out]
    if not len(chosen):
        raise ValueError(f"nothing is selected for {part}: there are too few patches for a validation share of {validation:g}")
    return np.sort(ids[chosen])


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


def _of_classes(manifest: pa.Table, classes: Sequence[str], keep: np.ndarray, split: str | None) -> np.ndarray:
    codes, names = decoded(manifest["class"])
    wanted = np.zeros(len(codes), bool)
    for name in classes:
        if name not in names:
            raise ValueError(f"there is no class {name!r}; the set has {', '.join(names) or 'no classes: it is unlabelled'}")
        mine = codes == names.index(name)
        if not (mine & keep).any():
            raise ValueError(f"class {name!r} has no patch in split {split!r}")
        wanted |= mine
    return wanted


def _stratified(ids: np.ndarray, keys: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: the validation share of each class."""
    order = np.lexsort((ids, priorities(keys, seed=seed, stream="validation")))
    held_out = np.zeros(len(ids), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        least, most = (1, len(members) - 1) if len(members) > 1 else (0, 0)
        held_out[members[: min(most, max(least, round(share * len(members))))]] = True
    return held_out


def _whole_groups(manifest: pa.Table, rows: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: whole groups, near the validation share of each class."""
    groups, names = decoded(manifest["group"].take(pa.array(rows)))
    if (groups < 0).any():
        raise ValueError(
            f"group_aware needs a group for every patch, and {int((groups < 0).sum()):,} have none (build with --group-by)"
        )
    if len(np.unique(groups)) < 2:
        raise ValueError("group_aware needs at least two groups among the selected patches")
    # The rows' order must not matter, and the groups' names are all that the draw looks at.
    shares = {"train": 1 - share, "validation": share}
    return split_groups(labels, groups, names, shares, seed=seed, stream="validation") == 1
