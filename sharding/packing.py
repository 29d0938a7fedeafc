"""Image folders -> shard set, in two passes.

The first reads, hashes and fully decodes every image. From that alone follows a plan: split, order, shard and offset of
every patch (`plan`). The second copies the bytes there and checks that they are still those of the first pass.

Everything is written into `<out>.partial` and renamed at the very end, so nothing half-written ever has the final name. A
build that was cut off goes on from its finished shards. The same images and arguments give the same bytes, whatever the
number of workers.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.checks import Refusal, check_image, silent_decoders
from sharding.draws import priorities
from sharding.manifest import (
    FORMAT_VERSION,
    QUARANTINE_COLUMNS,
    decoded,
    manifest_table,
    read_dataset,
    read_manifest,
)
from sharding.plan import image_offsets, sample_key, shard_of_each
from sharding.sources import Record, Scan, printable, scan_sources
from sharding.splits import content_keys, parse_shares, shared_groups, split_groups, split_patches
from sharding.workers import available_cores, ordered_map
from sharding.writing import (
    ShardTask,
    check_space,
    clear_stale,
    partial_folder,
    publish,
    read_file,
    shard_length,
    shard_tasks,
    write_parquet,
    write_shard,
    write_whole,
)

_CHUNK = 64  # images per piece of work in the first pass
_ONE_SPLIT = "train=1"  # where no split is asked for


@dataclass
class Summary:
    """What a build did. counts: patches per split and class ("" where unlabelled); notes: one sentence each."""

    out: Path
    name: str
    found: int
    packed: int
    quarantined: int
    shards: int
    counts: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    was_there: bool = False


class Examined(NamedTuple):
    """What the first pass saw of one image file: a good image, or a refusal (its sha256 is "" if it cannot be read)."""

    sha256: str
    size: int
    format: str
    width: int
    height: int
    refusal: Refusal | None


def build_shards(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    layout: str | None = None,
    where: Sequence[str] = (),
    unlabelled: bool = False,
    split: str | None = None,
    group_by: str | None = None,
    split_by: Literal["auto", "patch", "group"] = "auto",
    encode: Literal["keep"] = "keep",
    name: str | None = None,
    min_size: int = 1,
    strict: bool = False,
    shard_size: float = 256,
    shard_patches: int | None = None,
    workers: int | None = 1,
    seed: int = 42,
) -> Summary:
    """Pack image folders into the shard set `out`.

    layout, where, unlabelled: see sharding.sources.scan_sources. split: shares such as "train=0.8,test=0.2"; without it all
    is "train". group_by: the field that names a patch's slide or patient. split_by: keep whole groups on one side ("group",
    which is what "auto" means where group_by is given) or not ("patch"). min_size: least side of an image, pixels. strict:
    a refused image is an error. shard_size: about how large a shard is, MB (10**6 bytes). shard_patches: at most how many
    patches a shard holds. workers: processes; 1 works in this one, None or 0 takes all cores.

    A set that was built from the same images with the same arguments is left as it is, and Summary.was_there is True.
    Raises ValueError for whatever is wrong with the arguments or the images, OSError where a file cannot be written.
    """
    out = Path(out).resolve()
    arguments: dict[str, Any] = {
        "sources": [printable(str(source)) for source in sources],
        "layout": layout,
        "where": list(where),
        "unlabelled": unlabelled,
        "split": split,
        "group_by": group_by,
        "split_by": ("group" if group_by else "patch") if split_by == "auto" else split_by,
        "encode": encode,
        "min_size": min_size,
        "shard_size": shard_size,
        "shard_patches": shard_patches,
        "seed": seed,
    }
    name = printable(name or out.name)
    workers = workers or available_cores()
    _check_arguments(arguments, workers)
    shares = parse_shares(split or _ONE_SPLIT)  # before the long pass, so that a slip is told at once
    scan = scan_sources([str(source) for source in sources], layout=layout, where=where, labelled=not unlabelled)
    if group_by and (scan.layout is None or group_by not in scan.layout.extra_columns):
        known = ", ".join(scan.layout.extra_columns) if scan.layout else ""
        raise ValueError(f"--group-by {group_by}: the layout has no such field; it has {known or 'none to group by'}")

    if (out / "dataset.json").exists():
        return _already_there(out, name, arguments, scan, workers)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a shard set: choose another --out, or remove it")

    with partial_folder(out) as partial:
        examined = _examine_all(scan.records, min_size=min_size, decode=True, workers=workers, title="checking")
        notes = scan.notes + _refusal_notes(out, scan.records, examined, strict)
        plan = _plan(scan, examined, shares, arguments)
        clear_stale(partial, plan.tasks)
        check_space(partial, plan.tasks)

        files: dict[str, str] = {}
        for written in ordered_map(
            functools.partial(write_shard, folder=partial), plan.tasks, workers=workers, weight=shard_length, title="packing"
        ):
            files |= written
        files["manifest.parquet"] = write_parquet(plan.manifest, partial / "manifest.parquet")
        files["quarantine.parquet"] = write_parquet(_quarantine_table(scan.records, examined), partial / "quarantine.parquet")
        dataset = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "classes": plan.classes,
            "patches": len(plan.manifest),
            "quarantined": len(examined) - len(plan.manifest),
            "shards": len(plan.tasks),
            "counts": count_patches(plan.manifest),
            "arguments": arguments,
            "files": dict(sorted(files.items())),
        }
        write_whole(partial / "dataset.json", [(json.dumps(dataset, indent=2, ensure_ascii=False) + "\n").encode()])
        publish(partial, out)
    return _summary(out, dataset, notes + plan.notes)


def count_patches(manifest: pa.Table) -> dict[str, dict[str, int]]:
    """Patches per split and class; the class is "" where unlabelled. Splits and classes in sorted order."""
    splits, split_names = decoded(manifest["split"])
    classes, class_names = decoded(manifest["class"])
    names = class_names or [""]
    codes = splits * len(names) + np.maximum(classes, 0)
    table = np.bincount(codes, minlength=len(split_names) * len(names)).reshape(len(split_names), len(names))
    return {split: dict(zip(names, map(int, row), strict=True)) for split, row in zip(split_names, table, strict=True)}


def _check_arguments(arguments: dict, workers: int) -> None:
    if arguments["split_by"] == "group" and not arguments["group_by"]:
        raise ValueError("--split-by group needs --group-by, the field that names a patch's group")
    for name in ("shard_size", "shard_patches", "min_size"):
        value = arguments[name]
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is out of range: give a number above 0")
    if workers < 1:
        raise ValueError(f"--workers {workers} is out of range: give at least 1, or 0 for all cores")
    if not 0 <= arguments["seed"] < 2**64:
        raise ValueError(f"--seed {arguments['seed']} is out of range: give a whole number from 0 to 2**64 - 1")


# The first pass


def _examine_all(records: Sequence[Record], *, min_size: int, decode: bool, workers: int, title: str) -> list[Examined]:
    paths = [record.path for record in records]
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    examine = functools.partial(_examine, min_size=min_size, decode=decode)
    results = ordered_map(examine, chunks, workers=workers, weight=len, title=title)
    return [seen for chunk in results for seen in chunk]


def _examine(paths: list[str], *, min_size: int, decode: bool) -> list[Examined]:
    """Read and hash each file, and check it where decode is True."""
    with silent_decoders():
        return [_examine_one(path, min_size, decode) for path in paths]


def _examine_one(path: str, min_size: int, decode: bool) -> Examined:
    try:
        data = read_file(path)
    except OSError as error:
        return Examined("", 0, "", 0, 0, Refusal("unreadable", error.strerror or "cannot be read"))
    digest = hashlib.sha256(data).hexdigest()
    if not decode:
        return Examined(digest, len(data), "", 0, 0, None)
    found = check_image(data, min_size=min_size)
    if isinstance(found, Refusal):
        return Examined(digest, len(data), "", 0, 0, found)
    return Examined(digest, len(data), found.format, found.width, found.height, None)


def _refusal_notes(out: Path, records: Sequence[Record], examined: Sequence[Examined], strict: bool) -> list[str]:
    refused = [(record, seen.refusal) for record, seen in zip(records, examined, strict=True) if seen.refusal]
    if not refused:
        return []
    record, refusal = refused[0]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(Counter(r.reason for _, r in refused).items()))
    images = "1 image was refused" if len(refused) == 1 else f"{len(refused):,} images were refused"
    first = f"{images} ({reasons}), the first: {record.source} ({refusal.detail})"
    if len(refused) == len(records):
        raise ValueError(f"all {first}: give images that can be decoded")
    if strict:
        raise ValueError(f"{first}; mend or remove it, or leave out --strict: nothing was written")
    return [f"{first}; the list is {out / 'quarantine.parquet'}"]


def _quarantine_table(records: Sequence[Record], examined: Sequence[Examined]) -> pa.Table:
    rows = [
        (record.source, seen.refusal.reason, seen.refusal.detail, seen.sha256)
        for record, seen in zip(records, examined, strict=True)
        if seen.refusal
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(QUARANTINE_COLUMNS)
    return pa.table(
        {name: pa.array(values, kind) for (name, kind), values in zip(QUARANTINE_COLUMNS.items(), columns, strict=True)}
    )


# The plan


class _Plan(NamedTuple):
    classes: list[str]
    manifest: pa.Table
    tasks: list[ShardTask]
    notes: list[str]


def _plan(scan: Scan, examined: Sequence[Examined], shares: dict[str, float], arguments: dict) -> _Plan:
    """Split, order, shard and offset of every good image."""
    seed, labelled = arguments["seed"], not arguments["unlabelled"]
    # Keyed by the position in the whole scan.
    good = np.flatnonzero([seen.refusal is None for seen in examined])
    order = good[np.argsort(priorities(good, seed=seed, stream="shuffle"), kind="stable")]
    records = [scan.records[i] for i in order]
    seen = [examined[i] for i in order]

    classes = sorted({str(record.fields["class"]) for record in records}) if labelled else []
    place = {name: index for index, name in enumerate(classes)}
    labels = np.array([place[str(r.fields["class"])] if labelled else -1 for r in records], np.int32)
    groups = [r.fields[arguments["group_by"]] if arguments["group_by"] else None for r in records]
    digests = [s.sha256 for s in seen]
    splits, notes = _split(labels, groups, digests, [r.source for r in records], shares, arguments)
    notes = [*_case_notes(classes, "class"), *_case_notes(groups, arguments["group_by"]), *notes]
    notes += _duplicate_notes(digests, splits, labels)

    sizes = np.array([s.size for s in seen], np.int64)
    shard_bytes = max(1, int(arguments["shard_size"] * 10**6))
    shards = shard_of_each(sizes, labelled, shard_bytes=shard_bytes, shard_patches=arguments["shard_patches"])
    keys = [sample_key(i, os.path.basename(record.source)) for i, record in enumerate(records)]
    names = list(shares)
    columns = {
        "id": np.arange(len(order)),
        "key": keys,
        "shard": shards,
        "offset": image_offsets(sizes, shards, labelled),
        "size": sizes,
        "label": labels,
        "class": [classes[label] if label >= 0 else None for label in labels],
        "group": groups,
        "split": [names[split] for split in splits],
        "width": [s.width for s in seen],
        "height": [s.height for s in seen],
        "format": [s.format for s in seen],
        "sha256": digests,
        "source": [r.source for r in records],
    }
    for name in scan.layout.extra_columns if scan.layout else ():
        columns[name] = [r.fields[name] for r in records]
    manifest = manifest_table(columns)
    return _Plan(classes, manifest, shard_tasks(manifest, [r.path for r in records]), notes)


def _split(
    labels: np.ndarray,
    groups: Sequence[str | None],
    digests: Sequence[str],
    sources: Sequence[str],
    shares: dict,
    arguments: dict,
) -> tuple[np.ndarray, list[str]]:
    """(n,) index of each patch's split, and what is to be said of it."""
    # Slide_1 and slide_1 are two names, but hardly two slides: they are kept together.
    folded = [None if group is None else group.casefold() for group in groups]
    codes, names = decoded(pa.chunked_array([pa.array(folded, pa.string())]))
    if arguments["split_by"] == "patch" or len(shares) == 1:
        splits = split_patches(labels, content_keys(digests), shares, seed=arguments["seed"])
        return splits, shared_groups(splits, codes, list(shares))
    if (codes < 0).any():
        example = sources[int(np.flatnonzero(codes < 0)[0])]
        raise ValueError(
            f"{int((codes < 0).sum()):,} patches have no {arguments['group_by']}, for example {example}: correct the layout, "
            "or say --split-by patch"
        )
    splits = split_groups(labels, codes, names, shares, seed=arguments["seed"])
    reached = " / ".join(f"{share:.1%}" for share in np.bincount(splits, minlength=len(shares)) / len(splits))
    asked = " / ".join(f"{share:.1%}" for share in shares.values())
    return splits, [f"every {arguments['group_by']} is whole in one split: {' / '.join(shares)} got {reached} (asked: {asked})"]


def _case_notes(names: Iterable[str | None], field: str) -> list[str]:
    """A sentence where two names differ only in upper and lower case, which is mostly a slip."""
    spellings: dict[str, set[str]] = {}
    for name in {name for name in names if name is not None}:
        spellings.setdefault(name.casefold(), set()).add(name)
    doubled = sorted(sorted(same) for same in spellings.values() if len(same) > 1)
    if not doubled:
        return []
    return [f"{len(doubled):,} names of {field} differ only in upper and lower case, for example {' and '.join(doubled[0])}"]


def _duplicate_notes(digests: Sequence[str], splits: np.ndarray, labels: np.ndarray) -> list[str]:
    copies = Counter(digests)
    if len(copies) == len(digests):
        return []
    notes = [f"{len(digests) - len(copies):,} patches are exact copies of another one"]
    for values, what in ((splits, "splits"), (labels, "classes")):
        apart = Counter(digest for digest, _ in set(zip(digests, values.tolist(), strict=True)))
        if spread := sum(count > 1 for count in apart.values()):
            notes.append(f"{spread:,} {'image lies' if spread == 1 else 'images lie'} as exact copies in several {what}")
    return notes


def _already_there(out: Path, name: str, arguments: dict, scan: Scan, workers: int) -> Summary:
    """The summary of a set that is there already, if it is the one that this build would write."""
    dataset = read_dataset(out)
    way_out = "choose another --out, or remove it"
    now, then = {"name": name, **arguments}, {"name": dataset.get("name"), **dataset.get("arguments", {})}
    for key in now:
        if now[key] != then.get(key):
            flag = "the sources" if key == "sources" else "--" + key.replace("_", "-")
            raise ValueError(f"{out} holds a set built with {flag} {_shown(then.get(key))}, not {_shown(now[key])}: {way_out}")
    quarantine = pq.read_table(out / "quarantine.parquet")
    manifest = read_manifest(out)
    stored = {
        source: digest
        for table in (manifest, quarantine)
        for source, digest in zip(table["source"].to_pylist(), table["sha256"].to_pylist(), strict=True)
    }
    sources = {record.source for record in scan.records}
    if gone := sorted(stored.keys() ^ sources):
        change = "is new" if gone[0] in sources else "is gone"
        raise ValueError(f"{out} holds a set built from other images (for example, {gone[0]} {change}): {way_out}")
    examined = _examine_all(scan.records, min_size=1, decode=False, workers=workers, title="comparing")
    for record, seen in zip(scan.records, examined, strict=True):
        if stored[record.source] != seen.sha256:
            raise ValueError(f"{out} holds a set built from other images (for example, {record.source} has changed): {way_out}")
    return _summary(out, dataset, scan.notes, was_there=True)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary(out: Path, dataset: dict, notes: list[str], *, was_there: bool = False) -> Summary:
    packed, quarantined = dataset["patches"], dataset["quarantined"]
    found = packed + quarantined
    return Summary(out, dataset["name"], found, packed, quarantined, dataset["shards"], dataset["counts"], notes, was_there)
