"""Which labels an evaluation trains, validates and tests on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.shard_reader import ShardReader
from sharding.manifest import class_names, decoded
from sharding.selection import select
from sharding.sources.file_listing import counted
from sharding.splits.assign import parse_shares
from train.config import EvaluateConfig


@dataclass(frozen=True)
class LabelSplit:
    """The patches that an evaluation trains, validates and tests on, for one fraction of the labels and one seed.

    used: ids whose labels are used; `validation` is a share of them, unless it is a split of its own; train: used, without that
    share; test: ids to test on. All ascending, (n,) int64. selection: the arguments of `select` that give `train`.
    """

    used: np.ndarray = field(repr=False)
    train: np.ndarray = field(repr=False)
    validation: np.ndarray = field(repr=False)
    test: np.ndarray = field(repr=False)
    selection: dict[str, Any]


@dataclass(frozen=True)
class LabelledSet:
    """The labels and groups of a shard set of N patches.

    classes: the names of the classes that are evaluated, in the order of the outputs; set_labels: the set's own label of each;
    labels: (N,) index into classes by patch id, -1 for patches of other classes; groups: (N,) code by patch id, -1 if unknown;
    group_names: their names.
    """

    classes: list[str]
    set_labels: tuple[int, ...]
    labels: np.ndarray = field(repr=False)
    groups: np.ndarray = field(repr=False)
    group_names: list[str] = field(repr=False)


def labelled_set(config: EvaluateConfig, reader: ShardReader) -> LabelledSet:
    """The classes that are kept. Raises ValueError if there are fewer than two."""
    names = class_names(reader.folder)
    for name in [*config.classes, *config.leave_out]:
        if name not in names:
            raise ValueError(f"there is no class {name!r}; {config.data} has {', '.join(names) or 'none: it is unlabelled'}")
    kept = [name for name in names if name in (config.classes or names) and name not in config.leave_out]
    if len(kept) < 2:
        raise ValueError(
            f"{config.data} has {counted(len(kept), 'class', 'classes')}: an evaluation needs labels of at least two (build with"
            " {class})"
        )
    index = np.array([kept.index(name) if name in kept else -1 for name in names] + [-1])  # -1, unlabelled, indexes the last
    codes, group_names = decoded(reader.manifest["group"])
    return LabelledSet(kept, tuple(names.index(name) for name in kept), index[reader.labels], codes.astype(np.int64), group_names)


def split_labels(config: EvaluateConfig, reader: ShardReader, known: LabelledSet, *, fraction: float, seed: int) -> LabelSplit:
    """The split for a fraction and a seed: a function of the manifest, the config, the fraction and the seed alone.

    Raises ValueError, naming the flag, where a split or a part of it is empty, unlabelled, of one class, or asked for twice.
    """
    named = validation_split(config)
    splits = [config.split, config.test_split, *([named] if named else [])]
    if len(set(splits)) < len(splits):
        twice = next(name for name in splits if splits.count(name) > 1)
        raise ValueError(
            f"{twice!r} is given for two of --split, --test-split and --validation-split: name a different split for each"
        )
    common: dict[str, Any] = {"resplit": config.resplit, "group_aware": config.group_aware, "duplicates": config.duplicates}
    common |= {"classes": config.classes or None, "leave_out": config.leave_out or None, "seed": seed}
    limits = {"fraction": fraction, "cap": config.cap, "balance": config.balance}
    selection = {"split": config.split, **limits, "validation": 0.0 if named else config.validation, **common}
    manifest = reader.manifest
    used = select(manifest, **selection, part="all")
    test = select(manifest, split=config.test_split, **common)
    if named:
        train, validation = used, select(manifest, split=named, **common)
    elif config.validation:
        train, validation = select(manifest, **selection), select(manifest, **selection, part="validation")
    elif config.mode == "linear":
        raise ValueError("--validation 0 leaves no validation part: give a share above 0, or --validation-split")
    else:
        train, validation = used, used[:0]
    for name, ids in (("--split", used), ("--test-split", test), ("the validation part", validation)):
        if (known.labels[ids] < 0).any():
            raise ValueError(
                f"{config.data}: {name} has patches without a label: --classes, with all classes to evaluate, drops them"
            )
    if len(np.unique(known.labels[train])) < 2:
        raise ValueError(f"{config.data}: the labels of split {config.split!r} to train on are all of one class")
    if config.validation and not (len(validation) and len(train)):
        raise ValueError(f"--validation {config.validation:g} of {len(used)} labels leaves one part empty: use more labels")
    return LabelSplit(used, train, validation, test, selection)


def validation_split(config: EvaluateConfig) -> str | None:
    """The name of the validation split; None where validation uses a share of the labels."""
    if config.validation_split or not config.resplit:
        return config.validation_split
    # A part of --resplit with this name is meant for validation.
    return "validation" if "validation" in parse_shares(config.resplit, flag="--resplit") else None


def split_rule(config: EvaluateConfig) -> str:
    """How the labels were chosen, as a paper would say it."""
    origin = f"the set split anew by {config.resplit}" if config.resplit else "the set's own splits"
    parts = [f"{origin}: trained on {config.split!r}, tested on {config.test_split!r}"]
    if config.resplit:
        parts.append("whole groups on one side" if config.group_aware else "patch by patch, not by group")
    named = validation_split(config)
    if named:
        parts.append(f"validated on split {named!r}")
    elif config.validation:
        whole = "whole groups of " if config.group_aware else ""
        parts.append(f"validated on {config.validation:.0%} of the labels ({whole}each class)")
    if config.balance:
        parts.append("every class cut to the size of the smallest")
    if config.cap is not None:
        parts.append(f"at most {config.cap:,} labels per class")
    if config.duplicates == "apart":
        parts.append("exact copies of an image may be on both sides")
    return "; ".join(parts)


def label_warnings(known: LabelledSet, splits: Sequence[LabelSplit]) -> list[str]:
    """What a reviewer would ask about: groups on both sides, absent classes, imbalanced classes. For the worst of the splits."""
    found = []
    shared = max(_count_shared_groups(known, split) for split in splits)
    test = max(len(split.test) for split in splits)
    if shared:
        found.append(f"{shared:,} of {test:,} test patches are of a group (slide or patient) that was trained on")
    if not any((known.groups[split.used] >= 0).any() for split in splits):
        found.append("no groups (slides or patients) are known, so training and test patches may share them")
    for what, ids in (("test split", [split.test for split in splits]), ("training labels", [split.train for split in splits])):
        counts = [np.bincount(known.labels[each], minlength=len(known.classes)) for each in ids]
        absent = [name for k, name in enumerate(known.classes) if any(each[k] == 0 for each in counts)]
        if absent:
            found.append(f"the {what}: no patch of {', '.join(absent)}")
        most, least = counts[0].max(), counts[0][counts[0] > 0].min()
        if most >= 10 * least:
            largest, smallest = (known.classes[int(np.flatnonzero(counts[0] == count)[0])] for count in (most, least))
            found.append(
                f"the {what}: {most:,} patches of {largest} and {least:,} of {smallest}, so that accuracy is misleading:"
                " look at balanced accuracy and at each class"
            )
    return found


def _count_shared_groups(known: LabelledSet, split: LabelSplit) -> int:
    trained = np.unique(known.groups[split.used])
    groups = known.groups[split.test]
    return int((np.isin(groups, trained) & (groups >= 0)).sum())
