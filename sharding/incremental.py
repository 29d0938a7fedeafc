"""The set that a build finds at --out: does it match the build, and which images are not in it yet?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.build_config import FIXED_ARGUMENTS, recorded_builds
from sharding.field_roles import FieldRoles
from sharding.field_values import normalize_column, normalized_values, replace_values
from sharding.manifest import (
    COLUMNS,
    as_array,
    listed_shard_files,
    read_dataset,
    read_manifest,
    read_quarantine,
    source_digests,
)
from sharding.process_pool import ProcessPool, report_progress
from sharding.shard_writer import file_locations, read_digest
from sharding.sources.archives import FileReader
from sharding.sources.scan import Scan, source_names

_CHUNK = 512  # files per task


class ExistingSet(NamedTuple):
    """A set at --out: its folder, dataset.json, the arguments that it was built with, manifest and quarantine."""

    folder: Path
    dataset: dict
    arguments: dict[str, Any]
    manifest: pa.Table
    quarantine: pa.Table


def read_existing(folder: Path) -> ExistingSet:
    """Raises ValueError as read_manifest and recorded_builds do, and for a set of another packer."""
    dataset = read_dataset(folder)
    builds = recorded_builds(folder, dataset)
    if not builds:
        raise ValueError(f"{folder} holds a set of another packer: choose another --out, or remove it")
    listed_shard_files(folder, dataset)
    return ExistingSet(folder, dataset, builds[0], read_manifest(folder), read_quarantine(folder))


def check_arguments(existing: ExistingSet, name: str, arguments: dict[str, Any], *, append: bool) -> None:
    """Raise ValueError at the first argument (or the name) that the set was not built with.

    An append may change all but FIXED_ARGUMENTS.
    """
    before, now = existing.arguments | {"name": existing.dataset["name"]}, {"name": name} | arguments
    for key in FIXED_ARGUMENTS if append else now:
        if now[key] != before[key]:
            flag = "the sources" if key == "sources" else "--" + key.replace("_", "-")
            raise ValueError(
                f"{existing.folder} holds a set built with {flag} {_text(before[key])}, not {_text(now[key])}: choose "
                "another --out, or remove it"
            )


def check_columns(existing: ExistingSet, extra: Sequence[str]) -> None:
    """Raise ValueError when the set's columns beyond COLUMNS are not these."""
    before = [name for name in existing.manifest.column_names if name not in COLUMNS]
    if sorted(before) != sorted(extra):
        now, earlier = ", ".join(extra) or "none", ", ".join(before) or "none"
        raise ValueError(
            f"{existing.folder} has the further columns {earlier}, and these images have {now}: give a layout or table with "
            "the same fields, or choose another --out"
        )


def find_new_images(
    existing: ExistingSet, scan: Scan, roles: FieldRoles, *, append: bool, pool: ProcessPool
) -> tuple[Scan, ExistingSet]:
    """The scan without the images that the set has, and the set without the quarantined files that were repaired since.

    Files are compared by name, then by their bytes and their fields. The values of fields are then spelled as in the set, which
    an earlier version may have packed without normalizing them.
    Raises ValueError when a packed image has changed, because a set never changes what it has; and, without append, when an
    image is new or gone.
    """
    packed = len(existing.manifest)
    stored = pa.concat_arrays([as_array(table["source"]) for table in (existing.manifest, existing.quarantine)])
    names = pa.array(source_names(scan.files), pa.string())
    if not append:
        absent = pc.invert(pc.is_in(stored, names))
        if pc.any(absent).as_py():
            raise _changed_images(existing, f"{stored.filter(absent)[0]} is gone")
    rows = pc.index_in(names, stored).fill_null(-1).to_numpy(zero_copy_only=False)  # of the manifest, then of the quarantine
    known = np.flatnonzero(rows >= 0)
    rows = rows[known]
    before = pa.concat_arrays([as_array(source_digests(existing.manifest)), as_array(existing.quarantine["sha256"])])
    now = pa.array(_digests(scan.files.take(pa.array(known)), pool), pa.string())
    changed = pc.not_equal(before.take(pa.array(rows)), now).to_numpy(zero_copy_only=False)
    if (edited := known[changed & (rows < packed)]).size:
        raise _changed_images(existing, f"{names[int(edited[0])]} has changed")
    _check_fields(existing, scan, roles, names, known[rows < packed], rows[rows < packed])

    repaired = changed & (rows >= packed)
    new = np.ones(len(names), bool)
    new[known[~repaired]] = False
    if new.any() and not append:
        raise _changed_images(existing, f"{names[int(np.flatnonzero(new)[0])]} is new", ", or add what is new with --append")
    notes = list(scan.notes)
    if append and not new.all():
        notes.append(f"{int((~new).sum()):,} of {len(new):,} images are in the set already")
    refused = np.ones(len(existing.quarantine), bool)
    refused[rows[repaired] - packed] = False
    remaining = existing._replace(quarantine=existing.quarantine.filter(pa.array(refused)))
    return Scan(_as_stored(scan.files.filter(pa.array(new)), scan.fields, existing.manifest), scan.fields, notes), remaining


def _as_stored(files: pa.Table, fields: Sequence[str], manifest: pa.Table) -> pa.Table:
    """The files with the set's own spelling of each value."""
    for field in set(fields) & set(manifest.column_names):
        for chunk in manifest[field].chunks:
            stored = chunk.dictionary
            spelling = {plain: value for value, plain in sorted(normalized_values(stored).items(), reverse=True)}
            for plain in stored.filter(pc.is_in(stored, pa.array(list(spelling), pa.string()))).to_pylist():
                del spelling[plain]  # the set has it in both spellings
            files = files.set_column(files.column_names.index(field), field, replace_values(files[field], spelling))
    return files


def _check_fields(
    existing: ExistingSet, scan: Scan, roles: FieldRoles, names: pa.Array, known: np.ndarray, rows: np.ndarray
) -> None:
    """Raise ValueError when a packed image has another class, group, ... now, as after an edit of the table."""
    for name, column in roles.columns(scan.files).items():
        before = as_array(normalize_column(existing.manifest[name], name)[0]).take(pa.array(rows))
        now = as_array(column).take(pa.array(known))
        differs = pc.not_equal(before.fill_null(""), now.fill_null("")).to_numpy(zero_copy_only=False)
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            raise _changed_images(existing, f"{names[int(known[at])]} has {name} {now[at]} now and had {before[at]}")


def _changed_images(existing: ExistingSet, change: str, more: str = "") -> ValueError:
    return ValueError(
        f"{existing.folder} holds a set built from other images (for example, {change}): choose another --out, or remove it{more}"
    )


def _digests(files: pa.Table, pool: ProcessPool) -> list[str]:
    """The sha256 of each file, "" where it cannot be read."""
    # By take: a slice is pickled with the whole table.
    chunks = (files.take(pa.array(np.arange(start, min(start + _CHUNK, len(files))))) for start in range(0, len(files), _CHUNK))
    return [digest for chunk in pool.map(_chunk_digests, chunks, total=len(files), title="comparing") for digest in chunk]


def _chunk_digests(files: pa.Table) -> list[str]:
    with FileReader() as reader:
        digests = [read_digest(reader, *location) or "" for location in file_locations(files)]
    report_progress(len(files))
    return digests


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
