"""Which labels an evaluation trains, validates and tests on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.shard_reader import ShardReader
from sharding.manifest import class_names, decoded
from sharding.selection import select
from sharding.splits.assign import parse_shares
from train.config import EvaluateConfig


@dataclass(frozen=True)
class Labels:
    """The labels of one cell: a fraction of them, and a seed.

    used: ids that count as labels, of which `chosen_on` (the validation share) is a part, unless validation is a split of its
    own; learnt: used, less the validation share; test: ids to judge on. All ascending, (n,) int64.
    selection: the arguments of `select` that give `learnt`.
    """

    used: np.ndarray = field(repr=False)
    learnt: np.ndarray = field(repr=False)
    chosen_on: np.ndarray = field(repr=False)
    test: np.ndarray = field(repr=False)
    selection: dict[str, Any]


@dataclass(frozen=True)
class LabelledSet:
    """A set as the stage sees it. classes: the names of those that are judged, in the order of the outputs; set_labels: the
    set's own label of each; labels: (N,) by patch id, index into classes, -1 where it is none of them; groups: (N,) code by
    patch id, -1 unknown, and their names."""

    classes: list[str]
    set_labels: tuple[int, ...]
    labels: np.ndarray = field(repr=False)
    groups: np.ndarray = field(repr=False)
    group_names: list[str] = field(repr=False)


def labelled_set(config: EvaluateConfig, reader: ShardReader) -> LabelledSet:
    """The classes that are kept. Raises ValueError where there are fewer than two."""
    names = class_names(reader.folder)
    for name in [*config.classes, *config.leave_out]:
        if name not in names:
            raise ValueError(f"there is no class {name!r}; {config.data} has {', '.join(names) or 'none: it is unlabelled'}")
    kept = [name for name in names if name in (config.classes or names) and name not in config.leave_out]
    if len(kept) < 2:
        raise ValueError(f"{config.data} has {len(kept)} classes: judging needs labels of at least two (build with {{class}})")
    index = np.array([kept.index(name) if name in kept else -1 for name in names] + [-1])  # -1, unlabelled, indexes the last
    codes, group_names = decoded(reader.manifest["group"])
    return LabelledSet(kept, tuple(names.index(name) for name in kept), index[reader.labels], codes.astype(np.int64), group_names)


def choose_labels(config: EvaluateConfig, reader: ShardReader, known: LabelledSet, *, fraction: float, seed: int) -> Labels:
    """The labels of a cell: a function of the manifest, the config, the fraction and the seed alone.

    Raises ValueError, naming the flag, where a split or a part of it is empty, unlabelled, of one class, or asked for twice.
    """
    named = validation_split(config)
    splits = [config.split, config.test_split, *([named] if named else [])]
    if len(set(splits)) < len(splits):
        twice = next(name for name in splits if splits.count(name) > 1)
        raise ValueError(
            f"{twice!r} is given for two of --split, --test-split and --validation-split: a backbone is not judged on what it"
            " learnt from"
        )
    common: dict[str, Any] = {"resplit": config.resplit, "group_aware": config.group_aware, "duplicates": config.duplicates}
    common |= {"classes": config.classes or None, "leave_out": config.leave_out or None, "seed": seed}
    limits = {"fraction": fraction, "cap": config.cap, "balance": config.balance}
    selection = {"split": config.split, **limits, "validation": 0.0 if named else config.validation, **common}
    manifest = reader.manifest
    used = select(manifest, **selection, part="all")
    test = select(manifest, split=config.test_split, **common)
    if named:
        learnt, chosen_on = used, select(manifest, split=named, **common)
    elif config.validation:
        learnt, chosen_on = select(manifest, **selection), select(manifest, **selection, part="validation")
    elif config.mode == "linear":
        raise ValueError("--validation 0 leaves nothing to choose on: give a share above 0, or --validation-split")
    else:
        learnt, chosen_on = used, used[:0]
    for name, ids in (("--split", used), ("--test-split", test), ("the validation part", chosen_on)):
        if (known.labels[ids] < 0).any():
            raise ValueError(f"{config.data}: {name} has patches without a label: --classes, with all those to judge, drops them")
    if len(np.unique(known.labels[learnt])) < 2:
        raise ValueError(f"{config.data}: the labels of split {config.split!r} that are learnt from are all of one class")
    if config.validation and not (len(chosen_on) and len(learnt)):
        raise ValueError(f"--validation {config.validation:g} of {len(used)} labels leaves one part empty: use more labels")
    return Labels(used, learnt, chosen_on, test, selection)


def validation_split(config: EvaluateConfig) -> str | None:
    """The split that is chosen on, None where it is a share of the labels."""
    if config.validation_split or not config.resplit:
        return config.validation_split
    # Who cuts the set anew and names a part so means it to be used so.
    return "validation" if "validation" in parse_shares(config.resplit, flag="--resplit") else None


def split_rule(config: EvaluateConfig) -> str:
    """How the labels were chosen, as a paper would say it."""
    origin = f"the set cut anew by {config.resplit}" if config.resplit else "the set's own splits"
    parts = [f"{origin}: learnt from {config.split!r}, judged on {config.test_split!r}"]
    if config.resplit:
        parts.append("whole groups on one side" if config.group_aware else "patch by patch, not by group")
    named = validation_split(config)
    if named:
        parts.append(f"chosen on split {named!r}")
    elif config.validation:
        whole = "whole groups of " if config.group_aware else ""
        parts.append(f"chosen on {config.validation:.0%} of the labels ({whole}each class)")
    if config.balance:
        parts.append("every class cut to the size of the smallest")
    if config.cap is not None:
        parts.append(f"at most {config.cap:,} labels per class")
    if config.duplicates == "apart":
        parts.append("exact copies of an image may lie on both sides")
    return "; ".join(parts)


def warnings_of(known: LabelledSet, cells: Sequence[Labels]) -> list[str]:
    """What a reviewer would ask about: groups on both sides, absent classes, classes of unlike size. Of the worst cell."""
    found = []
    shared = max(_shared(known, cell) for cell in cells)
    test = max(len(cell.test) for cell in cells)
    if shared:
        found.append(f"{shared:,} of {test:,} test patches are of a group (slide or patient) that was learnt from")
    if not any((known.groups[cell.used] >= 0).any() for cell in cells):
        found.append("no groups (slides or patients) are known, so it cannot be said whether the test is of other ones")
    for what, ids in (("test split", [cell.test for cell in cells]), ("labels learnt from", [cell.learnt for cell in cells])):
        counts = [np.bincount(known.labels[each], minlength=len(known.classes)) for each in ids]
        absent = [name for k, name in enumerate(known.classes) if any(each[k] == 0 for each in counts)]
        if absent:
            found.append(f"the {what}: no patch of {', '.join(absent)}")
        most, least = counts[0].max(), counts[0][counts[0] > 0].min()
        if most >= 10 * least:
            largest, smallest = (known.classes[int(np.flatnonzero(counts[0] == count)[0])] for count in (most, least))
            found.append(
                f"the {what}: {most:,} patches of {largest} and {least:,} of {smallest}, so that accuracy says little:"
                " look at balanced accuracy and at each class"
            )
    return found


def _shared(known: LabelledSet, cell: Labels) -> int:
    learnt = np.unique(known.groups[cell.used])
    groups = known.groups[cell.test]
    return int((np.isin(groups, learnt) & (groups >= 0)).sum())


def rows_of(manifest: pa.Table, ids: np.ndarray) -> pa.Table:
    """id, key and group of these patches."""
    return manifest.select(["id", "key", "group"]).take(pa.array(ids))
