"""A set that is there already: is it the one that a build would write, and which images would be new in it?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.field_roles import Roles
from sharding.manifest import COLUMNS, read_dataset, read_manifest, read_quarantine, source_digests
from sharding.process_pool import Crew, tick
from sharding.shard_writer import places, read_digest
from sharding.sources.archives import FileReader
from sharding.sources.scan import Scan, source_names

_CHUNK = 512  # files per piece of work


class Existing(NamedTuple):
    """A set that is there: its folder, its dataset.json, its manifest, and what it refused."""

    folder: Path
    dataset: dict
    manifest: pa.Table
    quarantine: pa.Table


def read_existing(folder: Path) -> Existing:
    """Raises ValueError as read_manifest does."""
    return Existing(folder, read_dataset(folder), read_manifest(folder), read_quarantine(folder))


def check_arguments(existing: Existing, name: str, arguments: dict[str, Any], fixed: Sequence[str]) -> None:
    """Raise ValueError at the first of the fixed arguments (or the name) that the set was not built with."""
    then = {"name": existing.dataset.get("name"), **existing.dataset.get("arguments", {})}
    now = {"name": name, **arguments}
    for key in fixed:
        if now[key] != then.get(key):
            flag = "the sources" if key == "sources" else "--" + key.replace("_", "-")
            raise ValueError(
                f"{existing.folder} holds a set built with {flag} {_shown(then.get(key))}, not {_shown(now[key])}: choose "
                "another --out, or remove it"
            )


def check_columns(existing: Existing, extra: Sequence[str]) -> None:
    """Raise ValueError where the set has other further columns than these."""
    there = [name for name in existing.manifest.column_names if name not in COLUMNS]
    if sorted(there) != sorted(extra):
        now, then = ", ".join(extra) or "none", ", ".join(there) or "none"
        raise ValueError(
            f"{existing.folder} has the further columns {then}, and these images have {now}: give a layout or table with "
            "the same fields, or choose another --out"
        )


def what_is_new(existing: Existing, scan: Scan, roles: Roles, *, append: bool, crew: Crew) -> tuple[Scan, Existing]:
    """The scan without what the set has already, and the set without the quarantined rows whose file was mended since.

    Files are compared by name, and those of the same name by their bytes and by what the scan says of them.
    Raises ValueError where a packed image has changed, because a set never changes what it has; and, unless append, where an
    image is new or gone.
    """
    packed = len(existing.manifest)
    stored = pa.concat_arrays([_joined(table["source"]) for table in (existing.manifest, existing.quarantine)])
    names = pa.array(source_names(scan.files), pa.string())
    if not append:
        absent = pc.invert(pc.is_in(stored, names))
        if pc.any(absent).as_py():
            raise _other(existing, f"{stored.filter(absent)[0]} is gone")
    place = pc.index_in(names, stored).fill_null(-1).to_numpy(zero_copy_only=False)
    known = np.flatnonzero(place >= 0)
    place = place[known]
    then = pa.concat_arrays([_joined(source_digests(existing.manifest)), _joined(existing.quarantine["sha256"])]).take(
        pa.array(place)
    )
    now = pa.array(_digests(scan.files.take(pa.array(known)), crew), pa.string())
    changed = pc.not_equal(then, now).to_numpy(zero_copy_only=False)
    if (spoiled := known[changed & (place < packed)]).size:
        raise _other(existing, f"{names[int(spoiled[0])]} has changed")
    _check_words(existing, scan, roles, names, known[place < packed], place[place < packed])

    mended = changed & (place >= packed)
    new = np.ones(len(names), bool)
    new[known[~mended]] = False
    if new.any() and not append:
        raise _other(existing, f"{names[int(np.flatnonzero(new)[0])]} is new", ", or add what is new with --append")
    notes = list(scan.notes)
    if append and not new.all():
        notes.append(f"{int((~new).sum()):,} of {len(new):,} images are in the set already")
    refused = np.ones(len(existing.quarantine), bool)
    refused[place[mended] - packed] = False
    left = existing._replace(quarantine=existing.quarantine.filter(pa.array(refused)))
    return Scan(scan.files.filter(pa.array(new)), scan.fields, notes), left


def _check_words(existing: Existing, scan: Scan, roles: Roles, names: pa.Array, rows: np.ndarray, place: np.ndarray) -> None:
    """Raise ValueError where a packed image has another class, group, ... in the scan: a table was edited."""
    for name, column in roles.words(scan.files).items():
        then = _joined(existing.manifest[name]).take(pa.array(place))
        now = _joined(column).take(pa.array(rows))
        differs = pc.not_equal(then.fill_null(""), now.fill_null("")).to_numpy(zero_copy_only=False)
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            raise _other(existing, f"{names[int(rows[at])]} has {name} {now[at]} now and had {then[at]}")


def _other(existing: Existing, change: str, more: str = "") -> ValueError:
    return ValueError(
        f"{existing.folder} holds a set built from other images (for example, {change}): choose another --out, or remove it{more}"
    )


def _digests(files: pa.Table, crew: Crew) -> list[str]:
    """The sha256 of each file, "" where it cannot be read."""
    chunks = (files.take(pa.array(np.arange(start, min(start + _CHUNK, len(files))))) for start in range(0, len(files), _CHUNK))
    mapped = crew.map(_digest_chunk, chunks, total=len(files), title="comparing")
    return [digest for chunk in mapped for digest in chunk]


def _digest_chunk(files: pa.Table) -> list[str]:
    with FileReader() as reader:
        digests = [read_digest(reader, *place) or "" for place in places(files)]
    tick(len(files))
    return digests


def _joined(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    plain = column.cast(pa.string())
    return (
        plain
        if isinstance(plain, pa.Array)
        else pa.concat_arrays(plain.chunks)
        if plain.num_chunks
        else pa.array([], pa.string())
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
