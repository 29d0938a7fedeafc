"""Split a build's patches. Patches of the set that is appended to keep their split."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.field_roles import FieldRoles
from sharding.field_values import alike_notes
from sharding.manifest import decoded, source_digests
from sharding.manifest_writer import ShardContents
from sharding.sources.scan import Scan
from sharding.splits.assign import assign_splits, content_digests


class Split(NamedTuple):
    """codes: (n,) int64 of all patches of the set, in id order, into names."""

    codes: np.ndarray
    names: list[str]


def split_new(
    scan: Scan,
    roles: FieldRoles,
    contents: ShardContents,
    before: pa.Table | None,
    labels: np.ndarray,
    classes: list[str],
    seed: int,
) -> tuple[Split, list[str]]:
    """The split of all patches, and messages about it.

    before: the manifest of the set that is appended to. labels: (n,) of all patches in id order, old and new.
    """
    old = len(before) if before is not None else 0
    names = list(roles.shares)
    assigned = np.full(len(labels), -1, np.int64)
    digests = contents.contents
    if before is not None:
        digests = np.concatenate([content_digests(source_digests(before)), digests])
        old_codes, old_names = decoded(before["split"])
        names += [name for name in old_names if name not in names]
        assigned[:old] = np.array([names.index(name) for name in old_names], np.int64)[old_codes]
    groups, group_names = _groups(scan, roles, contents, before)
    shares = {name: roles.shares.get(name, 0.0) for name in names}
    if roles.column:  # the splits are given; assign_splits only reports on them
        codes, given = decoded(scan.files[roles.column])
        assigned[old:] = np.array([names.index(name) for name in given], np.int64)[codes[contents.files]]
    result, notes = assign_splits(
        labels,
        groups,
        group_names,
        digests,
        shares,
        by=roles.by,
        duplicates="apart" if roles.column else roles.duplicates,
        seed=seed,
        group_field=roles.group_by or "group",
        assigned=assigned if roles.column or old else None,
        class_names=classes,
    )
    patches = np.bincount(result, minlength=len(names))
    for name, share in roles.shares.items():
        if not patches[names.index(name)]:
            why = "all of its images were refused" if roles.column else f"requested: {share:.1%}"
            notes.append(f"the split {name!r} has no patch ({why})")
    return Split(result, names), [*alike_notes(classes, "class"), *notes]


def _groups(scan: Scan, roles: FieldRoles, contents: ShardContents, before: pa.Table | None) -> tuple[np.ndarray, list[str]]:
    """(n,) int64 codes of all patches' groups, -1 where unknown, and their names."""
    new = np.full(len(contents.files), -1, np.int64)
    new_names: list[str] = []
    if roles.group_by:
        codes, new_names = decoded(scan.files[roles.group_by])
        new = codes[contents.files]
    if before is None:
        return new, new_names
    old, old_names = decoded(before["group"])
    names = sorted({*old_names, *new_names})
    index = {name: i for i, name in enumerate(names)}
    old_codes, new_codes = (np.array([index[name] for name in known] + [-1], np.int64) for known in (old_names, new_names))
    return np.concatenate([old_codes[old], new_codes[new]]), names
