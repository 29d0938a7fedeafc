"""Which fields of a scan are the class, the group and the split, and how to split the set."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.build_config import BuildConfig
from sharding.field_values import alike, number_notes
from sharding.manifest import decoded
from sharding.sources.file_listing import counted
from sharding.sources.scan import Scan, source_names
from sharding.splits.assign import parse_shares
from sharding.splits.duplicates import ambiguous_codes
from sharding.splits.groups import fold_alike

_ONE_SPLIT = "train=1"  # where no split is asked for
_COLUMN = "column:"  # --split column:fold
# What programs write where there is no value.
_NO_VALUE = frozenset(
    ("nan", "<na>", "nat", "null", "\\n", "-1", "-1.0", "#n/a", "#value!", "#ref!", "#name?", "#div/0!", "#num!")
)


@dataclass(frozen=True)
class FieldRoles:
    """split: shares as text, or column:NAME; column: that NAME. by: patch or group. extra: the other fields."""

    labelled: bool
    group_by: str | None
    split: str | None
    column: str | None
    shares: dict[str, float]
    by: Literal["patch", "group"]
    duplicates: Literal["together", "apart"]
    extra: list[str]

    def columns(self, files: pa.Table) -> dict[str, pa.ChunkedArray]:
        """The manifest columns that fields fill, for each file."""
        found = {name: files[name] for name in self.extra}
        for name, source in (("class", "class" if self.labelled else None), ("group", self.group_by), ("split", self.column)):
            if source:
                found[name] = files[source]
        return found


def assign_roles(scan: Scan, config: BuildConfig) -> FieldRoles:
    """What each field is used for. Without flags, fields named `group` and `split` are the group and the split.

    Raises ValueError when a requested field is missing, or is empty for a file.
    """
    group_by, split, split_by, duplicates = config.group_by, config.split, config.split_by, config.duplicates
    if group_by is None and "group" in scan.fields:
        group_by = "group"
    if split is None and "split" in scan.fields:
        split = f"{_COLUMN}split"
    column = split_column(split)
    for flag, name in (("--group-by ", group_by), (f"--split {_COLUMN}", column)):
        if name is not None and (name not in scan.fields or name == "class"):
            known = ", ".join(field for field in scan.fields if field != "class")
            raise ValueError(f"{flag}{name}: there is no such field; the layout and the table give {known or 'none to use'}")
    for used, taken, flag in ((group_by, "group", "--group-by"), (column, "split", f"--split {_COLUMN}")):
        if taken in scan.fields and used != taken:
            raise ValueError(
                f"a field is named {taken!r} and {flag.strip(':')} names another: rename the field, or leave out the flag"
            )
    if duplicates not in ("together", "apart"):
        raise ValueError(f"--duplicates {duplicates!r} is not known: it is together or apart")
    if split_by == "group" and not group_by:
        raise ValueError("--split-by group needs --group-by, the field that names a patch's group")
    by: Literal["patch", "group"] = split_by if split_by != "auto" else "group" if group_by and not column else "patch"
    if column:
        if by == "group":
            raise ValueError(f"--split {_COLUMN}{column} says where each patch goes: leave out --split-by group")
        _check_all_have(scan, column, "fill it in, or give shares such as --split train=0.8,test=0.2")
        shares = _observed(scan, column)
    else:
        shares = parse_shares(split or _ONE_SPLIT)
        if by == "group" and len(shares) > 1:
            _check_all_have(scan, str(group_by), "correct the layout or the table, or give --split-by patch")
    extra = [field for field in scan.fields if field not in ("class", "group", "split")]
    return FieldRoles(not config.unlabelled, group_by, split, column, shares, by, duplicates, extra)


def split_column(split: str | None) -> str | None:
    """The NAME of `--split column:NAME`."""
    return split.removeprefix(_COLUMN) if split and split.startswith(_COLUMN) else None


def check_values(scan: Scan, roles: FieldRoles, before: pa.Table | None) -> list[str]:
    """Messages about suspicious values of class, group and split. before: the manifest of the set that is appended to.

    Raises ValueError for a new value that means "no value", for splits whose names are alike, and if a given split separates
    groups whose names are alike.
    """
    notes, all_values = [], {}
    for name, column in roles.columns(scan.files).items():
        if name not in ("class", "group", "split"):
            continue
        field = {"group": roles.group_by, "split": roles.column}.get(name) or name
        stored = before[name].chunks if before is not None else []
        codes, names = decoded(column)
        new = set(names).difference(*(part.dictionary.to_pylist() for part in stored))
        if unknown := sorted(value for value in new if value.casefold() in _NO_VALUE):
            rows = np.flatnonzero(codes == names.index(unknown[0]))
            example = source_names(scan.files.take(pa.array(rows[:1])))[0]
            raise ValueError(
                f"{counted(len(rows), 'image has', 'images have')} the {field} {unknown[0]!r}, for example {example}: this is a "
                f"code for a missing value; correct it, or exclude these images with --where '{field}!={unknown[0]}'"
            )
        notes += number_notes(new, field)
        if roles.column and name != "class":
            all_values[name] = decoded(pa.chunked_array([*stored, *column.chunks], column.type))
        if name == "split" and (same := [names for names in alike(all_values[name][1]) if new.intersection(names)]):
            raise ValueError(f"the splits {' and '.join(map(repr, same[0]))} look like one: use one name in {field!r}")
    if roles.column and roles.group_by:
        _check_divided(roles.group_by, *all_values["group"], *all_values["split"], old=len(before) if before is not None else 0)
    return notes


def _check_divided(
    field: str, groups: np.ndarray, names: list[str], splits: np.ndarray, split_names: list[str], *, old: int
) -> None:
    """Raise ValueError if splits separate groups whose names are alike, but no group itself.

    groups, splits: (n,) indexes into their names. old: the number of rows, at the start, of the set that is appended to.
    """
    folded = fold_alike(groups, names).codes
    divided = np.setdiff1d(ambiguous_codes(folded, splits), ambiguous_codes(folded[:old], splits[:old]))
    if not len(divided) or len(ambiguous_codes(groups, splits)):
        return
    rows = np.flatnonzero(folded == divided[0])
    one, other = rows[0], rows[splits[rows] != splits[rows[0]]][0]
    (name, split), (name_2, split_2) = ((names[groups[row]], split_names[splits[row]]) for row in (one, other))
    raise ValueError(
        f"{name!r} is in {split} and {name_2!r} in {split_2}, but they look like one {field}: give them one name and one split, "
        "or names that differ in more than case and punctuation"
    )


def _observed(scan: Scan, column: str) -> dict[str, float]:
    """The splits in a column and their shares, "train" first, because messages compare the others with the first."""
    codes, names = decoded(scan.files[column])
    shares = np.bincount(codes, minlength=len(names)) / len(codes)
    order = sorted(range(len(names)), key=lambda i: (names[i] != "train", -shares[i], names[i]))
    return {names[i]: float(shares[i]) for i in order}


def _check_all_have(scan: Scan, field: str, way_out: str) -> None:
    missing = pc.is_null(scan.files[field]).to_numpy()
    if missing.any():
        example = source_names(scan.files.take(pa.array(np.flatnonzero(missing)[:1])))[0]
        patches = counted(int(missing.sum()), "patch has", "patches have")
        raise ValueError(f"{patches} no {field}, for example {example}: {way_out}")
