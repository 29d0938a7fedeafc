"""Images -> shard set, in one pass: every source file is read once.

A scan lists the files; a seeded shuffle and their sizes decide which shard each goes to. Then shards are written, each by
itself (`writing`), and from the notes of all follow ids, splits and the manifest (`assembling`). Everything is written into
`<out>.partial`, which becomes `<out>` at the very end (`staging`). The same images and arguments give the same bytes,
whatever the number of workers, and however often a build was cut off.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from sharding.build_messages import refusals, treatments
from sharding.field_roles import Roles, find_roles
from sharding.images.image_checks import load_decoder
from sharding.images.image_processing import Treatment
from sharding.incremental import Existing, check_arguments, check_columns, read_existing, what_is_new
from sharding.manifest import FORMAT_VERSION, decoded, index_file, shard_file
from sharding.manifest_writer import Contents, Written, read_contents, write_manifest, write_quarantine
from sharding.new_splits import split_new
from sharding.philox import priorities
from sharding.process_pool import Crew, available_cores
from sharding.shard_format import shard_bounds, tar_sizes
from sharding.shard_writer import ShardTask, write_shard
from sharding.sources.image_table import PLACE
from sharding.sources.scan import Scan, printable, scan_sources
from sharding.staging import check_space, clear, clear_stale, link_files, partial_folder, publish, write_pieces

_FIXED = ("unlabelled", "split", "group_by", "split_by", "duplicates", "seed")  # what a set that grows cannot change


@dataclass
class Summary:
    """What a build did. counts: patches per split and class ("" where unlabelled); notes: one sentence each.

    found, packed and quarantined are of the whole set; added is of this build.
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


def build_shards(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    layout: str | None = None,
    table: str | Path | None = None,
    where: Sequence[str] = (),
    unlabelled: bool = False,
    split: str | None = None,
    group_by: str | None = None,
    split_by: Literal["auto", "patch", "group"] = "auto",
    duplicates: Literal["together", "apart"] = "together",
    encode: str = "keep",
    resize: int | None = None,
    check: Literal["decode", "header"] = "decode",
    min_size: int = 1,
    min_tissue: float = 0.0,
    strict: bool = False,
    append: bool = False,
    name: str | None = None,
    shard_size: float = 128,
    shard_patches: int | None = None,
    workers: int | None = 1,
    seed: int = 42,
) -> Summary:
    """Pack images into the shard set `out`.

    sources: folders, tars and zips. layout, table, where, unlabelled: see sharding.sources.scan.scan_sources. split: shares, such
    as "train=0.8,test=0.2", or "column:NAME", a field whose values are the splits; without it all is "train", or what a field
    `split` says. group_by: the field that names a patch's slide or patient (default: a field `group`). split_by: keep whole
    groups on one side ("group", which is what "auto" means where there are groups) or not ("patch"). duplicates: keep exact
    copies on one side ("together") or wherever they fall. encode, resize, check, min_size, min_tissue: see
    sharding.images.image_processing.Treatment. strict: a refused image is an error. append: add what is new to the set that is
    there. shard_size: about how large a shard is, MB (10**6 bytes). shard_patches: at most how many patches a shard holds.
    workers: processes; 1 works in this one, None or 0 takes all cores.

    A set that was built from the same images with the same arguments is left as it is, and Summary.was_there is True.
    Raises ValueError for whatever is wrong with the arguments or the images, OSError where a file cannot be written. What was
    packed by then waits in `<out>.partial` and is taken up by the next build.
    """
    out = Path(out).resolve()
    treatment = Treatment(encode=encode, check=check, min_size=min_size, min_tissue=min_tissue, resize=resize)
    workers = available_cores() if workers in (None, 0) else int(workers or 0)
    _check_numbers(workers, shard_size, shard_patches, seed)
    with Crew(workers, prepare=load_decoder) as crew:
        scan = scan_sources(
            [str(source) for source in sources],
            layout=layout,
            table=None if table is None else str(table),
            where=where,
            labelled=not unlabelled,
        )
        roles = find_roles(
            scan, labelled=not unlabelled, split=split, group_by=group_by, split_by=split_by, duplicates=duplicates
        )
        arguments: dict[str, Any] = {
            "sources": [printable(str(source)) for source in sources],
            "layout": layout,
            "table": None if table is None else printable(str(table)),
            "where": list(where),
            "unlabelled": unlabelled,
            "split": roles.split,
            "group_by": roles.group_by,
            "split_by": roles.by,
            "duplicates": duplicates,
            "encode": encode,
            "resize": resize,
            "check": check,
            "min_size": min_size,
            "min_tissue": min_tissue,
            "shard_size": shard_size,
            "shard_patches": shard_patches,
            "seed": seed,
        }
        name = printable(name or out.name)

        existing = _existing_set(out, append)
        if existing:
            check_arguments(existing, name, arguments, _FIXED if append else ("name", *arguments))
            check_columns(existing, roles.extra)
            scan, existing = what_is_new(existing, scan, roles, append=append, crew=crew)
            if not len(scan.files):
                return _summary(out, existing.dataset, scan.notes, was_there=True)

        with partial_folder(out) as partial:
            plan = _plan(scan, roles, existing, arguments)
            _write_shards(partial, scan, plan, treatment, crew)
            written = Written(partial, plan.first, plan.order, scan.files)
            contents = read_contents(written)
            if contents.refused and (strict or not len(contents.files)):
                clear(partial)
            notes = scan.notes + refusals(scan, contents, out, strict) + treatments(scan, contents, treatment)
            dataset, more = _finish(written, contents, scan, roles, existing, plan, name, arguments)
            publish(partial, out)
        return _summary(out, dataset, notes + more, added=len(contents.files))


def _existing_set(out: Path, append: bool) -> Existing | None:
    """The set that is there already; None where there is none and none is wanted."""
    if (out / "dataset.json").exists():
        return read_existing(out)
    if append:
        raise ValueError(f"{out} is no shard set yet: build it without --append first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a shard set: choose another --out, or remove it")
    return None


def _check_numbers(workers: int, shard_size: float, shard_patches: int | None, seed: int) -> None:
    for flag, value in (("--shard-size", shard_size), ("--shard-patches", shard_patches)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value:g} is out of range: give a number above 0")
    if workers < 1:
        raise ValueError(f"--workers {workers} is out of range: give at least 1, or 0 for all cores")
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed {seed} is out of range: give a whole number from 0 to 2**64 - 1")


class _Plan(NamedTuple):
    """What goes where. classes: the names, by label; labels: (n,) label of each file of the scan, -1 where unlabelled; first: the
    number of the first new shard; order: for each new shard, the rows of the scan that it is made of."""

    classes: list[str]
    labels: np.ndarray
    first: int
    order: list[np.ndarray]
    needed: int  # bytes of all tars, where the files are stored as they are


def _plan(scan: Scan, roles: Roles, existing: Existing | None, arguments: dict) -> _Plan:
    classes = list(existing.dataset["classes"]) if existing else []
    labels = np.full(len(scan.files), -1, np.int64)
    if roles.labelled:
        codes, names = decoded(scan.files["class"])
        classes += [name for name in names if name not in classes]  # a set that grows keeps its labels
        labels = np.array([classes.index(name) for name in names], np.int64)[codes]
    sizes = np.maximum(scan.files["size"].to_numpy(), 0)
    order = np.argsort(priorities(np.arange(len(sizes)), seed=arguments["seed"], stream="shuffle"), kind="stable")
    shard_bytes = max(1, int(arguments["shard_size"] * 10**6))
    bounds = shard_bounds(sizes[order], roles.labelled, shard_bytes=shard_bytes, shard_patches=arguments["shard_patches"])
    first = existing.dataset["shards"] if existing else 0
    shards = [order[start:end] for start, end in itertools.pairwise(bounds.tolist())]
    return _Plan(classes, labels, first, shards, int(tar_sizes(sizes, roles.labelled).sum()))


def _write_shards(partial: Path, scan: Scan, plan: _Plan, treatment: Treatment, crew: Crew) -> None:
    clear_stale(partial, range(plan.first, plan.first + len(plan.order)))
    if treatment.encode == "keep":  # otherwise nobody knows yet
        check_space(partial, plan.needed)
    places = scan.files.select(list(PLACE))
    tasks = (
        ShardTask(number, places.take(pa.array(rows)), plan.labels[rows].astype(np.int32))
        for number, rows in enumerate(plan.order, start=plan.first)
    )
    write = functools.partial(write_shard, folder=partial, treatment=treatment)
    for _ in crew.map(write, tasks, total=len(places), title="packing"):
        pass


def _finish(
    written: Written,
    contents: Contents,
    scan: Scan,
    roles: Roles,
    existing: Existing | None,
    plan: _Plan,
    name: str,
    arguments: dict[str, Any],
) -> tuple[dict, list[str]]:
    """Write manifest, quarantine and, last, dataset.json. Returns its content, and what is to be said of the splits."""
    before = existing.manifest if existing else None
    labels = plan.labels[contents.files]
    labels_before = before["label"].to_numpy().astype(np.int64) if before else np.zeros(0, np.int64)
    if empty := set(range(len(plan.classes))) - set(labels.tolist()) - set(labels_before.tolist()):
        refused = plan.classes[min(empty)]
        raise ValueError(
            f"every image of class {refused!r} was refused: mend them, or leave the class out with --where 'class!={refused}'"
        )
    labels_now = np.concatenate([labels_before, labels])
    split, notes = split_new(scan, roles, contents, before, labels_now, plan.classes, arguments["seed"])
    columns = {"class": (labels, plan.classes), "split": (split.codes[len(labels_before) :], split.names)}
    for column, source in (("group", roles.group_by), *((extra, extra) for extra in roles.extra)):
        codes, words = decoded(scan.files[source]) if source else (np.full(len(scan.files), -1), [])
        columns[column] = (codes[contents.files], words)
    folder = written.folder
    files = dict(contents.digests)
    files["manifest.parquet"] = write_manifest(folder / "manifest.parquet", written, contents, columns, before)
    refused_before = existing.quarantine if existing else None
    files["quarantine.parquet"] = write_quarantine(folder / "quarantine.parquet", written, refused_before)
    dataset = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "classes": plan.classes,
        "patches": len(labels_now),
        "quarantined": contents.refused.total() + (len(refused_before) if refused_before else 0),
        "shards": plan.first + len(plan.order),
        "counts": _counts(split.codes, split.names, labels_now, plan.classes),
        "arguments": arguments,
        "appended": [],
    }
    if existing:
        kept = [name(number) for number in range(plan.first) for name in (shard_file, index_file)]
        link_files(existing.folder, folder, kept)
        then = existing.dataset
        files |= {name: then["files"][name] for name in kept}
        growth = {"arguments": arguments, "first_id": len(labels_before), "patches": len(labels)}
        dataset |= {"name": then["name"], "arguments": then["arguments"], "appended": [*then["appended"], growth]}
    dataset["files"] = dict(sorted(files.items()))
    write_pieces(folder / "dataset.json", [(json.dumps(dataset, indent=2, ensure_ascii=False) + "\n").encode()])
    return dataset, notes


def _counts(splits: np.ndarray, split_names: list[str], labels: np.ndarray, classes: list[str]) -> dict[str, dict[str, int]]:
    """Patches per split and class; the class is "" where unlabelled. Splits and classes in sorted order."""
    names = classes or [""]
    codes = splits * len(names) + np.maximum(labels, 0)
    table = np.bincount(codes, minlength=len(split_names) * len(names)).reshape(len(split_names), len(names))
    counted = {split: dict(sorted(zip(names, map(int, row), strict=True))) for split, row in zip(split_names, table, strict=True)}
    return {split: counted[split] for split in sorted(counted) if sum(counted[split].values())}


def _summary(out: Path, dataset: dict, notes: list[str], *, was_there: bool = False, added: int = 0) -> Summary:
    packed, quarantined = dataset["patches"], dataset["quarantined"]
    found = packed + quarantined
    return Summary(
        out, dataset["name"], found, packed, quarantined, dataset["shards"], dataset["counts"], notes, was_there, added
    )
