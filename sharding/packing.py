"""Build a shard set from images in one pass: every source file is read once.

1. Scan the sources, and assign class, group and split their fields (`sources`, `field_roles`).
2. Decide which file goes to which shard, from a seeded shuffle and the files' sizes.
3. Write the shards independently of each other (`shard_writer`).
4. Split the patches (`new_splits`) and write the manifest (`manifest_writer`).

Everything is written into `<out>.partial`, which is renamed to `<out>` at the end (`staging`). The same images and arguments give
the same bytes, whatever the number of workers, and however often a build was interrupted.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sharding.build_config import BuildConfig, recorded_arguments
from sharding.build_messages import processing_messages, refusal_messages
from sharding.field_roles import FieldRoles, assign_roles, check_values, split_column
from sharding.folder_names import check_name
from sharding.images.image_checks import load_decoder
from sharding.images.image_processing import ImageOptions
from sharding.incremental import ExistingSet, check_arguments, check_columns, find_new_images, read_existing
from sharding.limits import MAX_FILE_BYTES
from sharding.manifest import FORMAT_VERSION, count_patches, decoded, listed_shard_files
from sharding.manifest_writer import ShardContents, WrittenShards, read_contents, write_manifest, write_quarantine
from sharding.new_splits import split_new
from sharding.philox import shuffle_keys
from sharding.process_pool import ProcessPool, available_cores
from sharding.shard_format import shard_bounds, tar_sizes
from sharding.shard_writer import ShardTask, write_shard
from sharding.sources.image_table import LOCATION
from sharding.sources.scan import Scan, printable, scan_sources
from sharding.staging import check_space, clear, clear_stale, link_files, partial_folder, publish, write_chunks


@dataclass
class Summary:
    """What a build did. counts: patches per split and class ("" where unlabelled). notes: one sentence each.

    found, packed and quarantined count the whole set, added this build alone.
    """

    out: Path
    name: str
    found: int
    packed: int
    quarantined: int
    shards: int
    counts: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    was_there: bool = False
    added: int = 0


def build_shards(sources: Sequence[str | Path], out: str | Path, *, workers: int = 1, **settings: Any) -> Summary:
    """Pack images into the shard set `out`.

    sources: folders, tars and zips. workers: processes; 1 works in this process, 0 uses all cores. settings: the other fields
    of BuildConfig, which has their defaults and says what they mean.

    A set that was built from the same images with the same arguments is left as it is, and Summary.was_there is True.
    Raises ValueError for invalid arguments or images, OSError where a file cannot be written. The shards written by then stay
    in `<out>.partial`, and the next build reuses them.
    """
    if settings.get("table") is not None:
        settings["table"] = str(settings["table"])
    settings["where"] = list(settings.get("where", ()))
    config = BuildConfig(sources=[str(source) for source in sources], out=str(out), workers=workers, **settings)
    target = Path(out).resolve()
    options = ImageOptions(**{each.name: getattr(config, each.name) for each in fields(ImageOptions)})
    workers = config.workers or available_cores()
    _check_numbers(workers, config)
    if config.name is not None and not (target / "dataset.json").exists():
        check_name(config.name)
    with ProcessPool(workers, prepare=load_decoder) as pool:
        scan = scan_sources(
            config.sources,
            layout=config.layout,
            table=config.table,
            where=config.where,
            labelled=not config.unlabelled,
            split_field=split_column(config.split) or "split",
            system_files=config.system_files,
        )
        roles = assign_roles(scan, config)
        arguments = recorded_arguments(config) | {"split": roles.split, "group_by": roles.group_by, "split_by": roles.by}
        name = printable(config.name or target.name)

        existing = _existing_set(target, config.append)
        if existing:
            check_arguments(existing, name, arguments, append=config.append)
            check_columns(existing, roles.extra)
            scan, existing = find_new_images(existing, scan, roles, append=config.append, pool=pool)
            if not len(scan.files):
                return _summary(target, existing.dataset, scan.notes, was_there=True)

        scan.notes += check_values(scan, roles, existing.manifest if existing else None)
        with partial_folder(target) as partial:
            assignment = _assign_shards(scan, roles, existing, config)
            _write_shards(partial, scan, assignment, options, pool)
            written = WrittenShards(partial, assignment.first, assignment.rows, scan.files)
            contents = read_contents(written)
            if contents.refused and (config.strict or not len(contents.files)):
                clear(partial)
            notes = scan.notes + refusal_messages(scan, contents, target, config.strict)
            notes += processing_messages(scan, contents, options)
            labels = assignment.labels[contents.files]
            dataset, more = _finish(written, contents, scan, roles, existing, assignment.classes, labels, name, arguments)
            publish(partial, target)
        return _summary(target, dataset, notes + more, added=len(contents.files))


def _existing_set(out: Path, append: bool) -> ExistingSet | None:
    """The set at `out`, or None. Raises ValueError if there must be one, or if `out` is something else."""
    if (out / "dataset.json").exists():
        return read_existing(out)
    if append:
        raise ValueError(f"{out} is not a shard set yet: build it without --append first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a shard set: choose another --out, or remove it")
    return None


def _check_numbers(workers: int, config: BuildConfig) -> None:
    for flag, value in (("--shard-size", config.shard_size), ("--shard-patches", config.shard_patches)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value:g} is out of range: give a number above 0")
    if workers < 1:
        raise ValueError(f"--workers {workers} is out of range: give at least 1, or 0 for all cores")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"--seed {config.seed} is out of range: give a whole number from 0 to 2**64 - 1")


class _ShardAssignment(NamedTuple):
    """Which files go to which shard.

    classes: the names, by label. labels: (n,) label of each file of the scan, -1 where unlabelled. first: number of the first new
    shard. rows: for each new shard, the rows of the scan that it is made of. needed: bytes of all tars, if files are kept as they
    are.
    """

    classes: list[str]
    labels: np.ndarray
    first: int
    rows: list[np.ndarray]
    needed: int


def _assign_shards(scan: Scan, roles: FieldRoles, existing: ExistingSet | None, config: BuildConfig) -> _ShardAssignment:
    classes = list(existing.dataset["classes"]) if existing else []
    labels = np.full(len(scan.files), -1, np.int64)
    if roles.labelled:
        codes, names = decoded(scan.files["class"])
        classes += [name for name in names if name not in classes]  # old labels stay
        labels = np.array([classes.index(name) for name in names], np.int64)[codes]
    sizes = np.maximum(scan.files["size"].to_numpy(), 0)
    sizes = np.where(sizes > MAX_FILE_BYTES, 0, sizes)  # which are refused unread
    order = np.argsort(shuffle_keys(np.arange(len(sizes)), seed=config.seed, stream="shuffle"), kind="stable")
    shard_bytes = max(1, int(config.shard_size * 10**6))
    bounds = shard_bounds(sizes[order], roles.labelled, shard_bytes=shard_bytes, shard_patches=config.shard_patches)
    first = existing.dataset["shards"] if existing else 0
    rows = [order[start:end] for start, end in itertools.pairwise(bounds.tolist())]
    return _ShardAssignment(classes, labels, first, rows, int(tar_sizes(sizes, roles.labelled).sum()))


def _write_shards(partial: Path, scan: Scan, assignment: _ShardAssignment, options: ImageOptions, pool: ProcessPool) -> None:
    clear_stale(partial, range(assignment.first, assignment.first + len(assignment.rows)))
    if options.encode == "keep":  # otherwise the size is not known yet
        check_space(partial, assignment.needed)
    locations = scan.files.select(list(LOCATION))
    tasks = (
        ShardTask(number, locations.take(pa.array(rows)), assignment.labels[rows].astype(np.int32))
        for number, rows in enumerate(assignment.rows, start=assignment.first)
    )
    write = functools.partial(write_shard, folder=partial, options=options)
    for _ in pool.map(write, tasks, total=len(locations), title="packing"):
        pass


def _finish(
    written: WrittenShards,
    contents: ShardContents,
    scan: Scan,
    roles: FieldRoles,
    existing: ExistingSet | None,
    classes: list[str],
    labels: np.ndarray,
    name: str,
    arguments: dict[str, Any],
) -> tuple[dict, list[str]]:
    """Write manifest, quarantine and, last, dataset.json. Returns its content, and messages about the splits.

    labels: (n,) of the new patches, in id order.
    """
    before = existing.manifest if existing else None
    labels_before = before["label"].to_numpy().astype(np.int64) if before else np.zeros(0, np.int64)
    if empty := set(range(len(classes))) - set(labels.tolist()) - set(labels_before.tolist()):
        refused = classes[min(empty)]
        raise ValueError(
            f"every image of class {refused!r} was refused: repair them, or leave the class out with --where 'class!={refused}'"
        )
    all_labels = np.concatenate([labels_before, labels])
    split, notes = split_new(scan, roles, contents, before, all_labels, classes, arguments["seed"])
    columns = {"class": (labels, classes), "split": (split.codes[len(labels_before) :], split.names)}
    for column, source in (("group", roles.group_by), *((extra, extra) for extra in roles.extra)):
        codes, values = decoded(scan.files[source]) if source else (np.full(len(scan.files), -1), [])
        columns[column] = (codes[contents.files], values)
    folder, refused_before = written.folder, existing.quarantine if existing else None
    files = dict(contents.digests)
    files["manifest.parquet"] = write_manifest(folder / "manifest.parquet", written, contents, columns, before)
    files["quarantine.parquet"] = write_quarantine(folder / "quarantine.parquet", written, refused_before)
    dataset = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "classes": classes,
        "patches": len(all_labels),
        "quarantined": contents.refused.total() + (len(refused_before) if refused_before else 0),
        "shards": written.first + len(written.rows),
        "counts": count_patches(split.codes, split.names, all_labels, classes),
        "arguments": arguments,
        "appended": [],
    }
    if existing:
        old = existing.dataset
        kept = listed_shard_files(existing.folder, old)
        link_files(existing.folder, folder, kept)
        files |= {name: old["files"][name] for name in kept}
        growth = {"arguments": arguments, "first_id": len(labels_before), "patches": len(labels)}
        dataset |= {"name": old["name"], "arguments": old["arguments"], "appended": [*old["appended"], growth]}
    dataset["files"] = dict(sorted(files.items()))
    write_chunks(folder / "dataset.json", [(json.dumps(dataset, indent=2, ensure_ascii=False) + "\n").encode()])
    return dataset, notes


def _summary(out: Path, dataset: dict, notes: list[str], *, was_there: bool = False, added: int = 0) -> Summary:
    name, packed, quarantined, shards, counts = (dataset[key] for key in ("name", "patches", "quarantined", "shards", "counts"))
    return Summary(out, name, packed + quarantined, packed, quarantined, shards, counts, notes, was_there, added)
