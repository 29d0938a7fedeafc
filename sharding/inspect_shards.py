"""Show what is in a shard set: patches per class, split and group, formats and sizes, decoders, copies, refusals, conversions.

Without --verify, only dataset.json, manifest.parquet and quarantine.parquet are read. With it, every byte is read and compared
with the manifest, and every image is decoded. Example:

    python sharding/inspect_shards.py shards/breast --verify
"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from sharding.build_config import commands_of
from sharding.cli import option, positional, run_script
from sharding.decoders import decoder_path
from sharding.manifest import decoded, fingerprint, read_dataset, read_manifest, read_quarantine, source_digests
from sharding.process_pool import available_cores
from sharding.sources.file_listing import counted
from sharding.splits.assign import content_digests
from sharding.verification import verify

_MAX_ROWS = 12  # of a table that could be long


@dataclass(frozen=True)
class InspectConfig:
    """The settings of an inspection."""

    shards: str = positional("the folder of the shard set")
    verify: bool = option(False, "read every byte, compare it with the manifest, and decode every image")
    workers: int = option(0, "number of processes for --verify (0: one per core)")


def main(config: InspectConfig) -> None:
    """Print the set's tables, and verify it if asked."""
    if config.workers < 0:
        raise ValueError(f"--workers {config.workers} is out of range: give at least 1, or 0 for all cores")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    dataset, manifest = read_dataset(config.shards), read_manifest(config.shards)
    shards, size = counted(dataset["shards"], "shard"), pc.sum(manifest["size"]).as_py()
    console.print(
        f"{dataset['name']}: {len(manifest):,} patches, {size / 1e6:,.1f} MB in {shards}, {dataset['quarantined']:,} quarantined"
    )
    console.print(f"fingerprint {fingerprint(config.shards)}")
    for command in commands_of(config.shards):
        console.print(f"packed by: python sharding/build.py {shlex.join(command)}")
    for growth in dataset["appended"]:
        console.print(f"appended: {growth['patches']:,} patches, from id {growth['first_id']:,}")
    console.print(_classes_table(manifest))
    groups = _groups_table(manifest)
    if groups:
        console.print(groups)
    console.print(_sizes_table(manifest))
    console.print(_decoders_table(manifest))
    for table in (_words_table(manifest, "converted", "converted"), _quarantine_table(config.shards)):
        if table:
            console.print(table)
    for line in (*_losses(manifest), *_copies(manifest)):
        console.print(line)
    if config.verify:
        verify(config.shards, workers=config.workers or available_cores())
        files, patches = f"{len(dataset['files']):,} files", f"{len(manifest):,} patches"
        console.print(f"verified: {files} and {patches} are unchanged since they were packed, and every image decodes")


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """A table whose columns after the first `words` hold numbers."""
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[words:]:
        column.justify = "right"
    return table


def _classes_table(manifest: pa.Table) -> Table:
    """Patches (and groups) per class and split."""
    splits, split_names = decoded(manifest["split"])
    classes, class_names = decoded(manifest["class"])
    groups, group_names = decoded(manifest["group"])
    names = class_names or ["(unlabelled)"]
    classes = np.maximum(classes, 0)
    counts = np.zeros((len(names) + 1, len(split_names) + 1), np.int64)  # the last row and column are of all
    np.add.at(counts, (classes, splits), 1)
    counts[-1], counts[:, -1] = counts.sum(0), counts.sum(1)
    counts[-1, -1] = len(manifest)
    group_counts = _distinct(classes, splits, groups, counts.shape) if group_names else None
    what = "patches (groups)" if group_names else "patches"
    table = _table(f"{what} per class and split", "class", *split_names, "all")
    for row, name in enumerate([*names, "all"]):
        if name == "all" and len(names) == 1:
            continue
        cells = [
            f"{n:,}" if group_counts is None else f"{n:,} ({g:,})"
            for n, g in zip(counts[row], (group_counts if group_counts is not None else counts)[row], strict=True)
        ]
        table.add_row(name, *cells)
    return table


def _distinct(classes: np.ndarray, splits: np.ndarray, groups: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Number of groups per class and split. The totals are counted separately, because a group may be in several cells."""
    known = groups >= 0
    rows, columns = shape
    found = np.zeros(shape, np.int64)
    for row_codes in (classes, np.full(len(classes), rows - 1)):
        for column_codes in (splits, np.full(len(splits), columns - 1)):
            cell = (row_codes * columns + column_codes)[known]
            pairs = np.unique(cell * (groups.max() + 1) + groups[known]) // (groups.max() + 1)
            found += np.bincount(pairs, minlength=rows * columns).reshape(shape)
    return found


def _groups_table(manifest: pa.Table) -> Table | None:
    """The largest groups: patches and split."""
    groups, names = decoded(manifest["group"])
    if not names:
        return None
    splits, split_names = decoded(manifest["split"])
    known = groups >= 0
    counts = np.zeros((len(names), len(split_names)), np.int64)
    np.add.at(counts, (groups[known], splits[known]), 1)
    totals = counts.sum(1)
    low, high = totals.min(), totals.max()
    size = f"{low:,} patches" if low == high else f"{low:,} to {high:,} patches, median {np.median(totals):,.0f}"
    table = _table(f"{len(names):,} groups of {size}", "group", *split_names)
    order = sorted(range(len(names)), key=lambda group: (-totals[group], names[group]))
    for group in order[:_MAX_ROWS]:
        table.add_row(names[group], *(f"{n:,}" if n else "" for n in counts[group]))
    if len(names) > _MAX_ROWS:
        table.add_row(f"{len(names) - _MAX_ROWS:,} smaller", *(f"{n:,}" for n in counts[order[_MAX_ROWS:]].sum(0)))
    if not known.all():
        table.add_row("(no group)", *(f"{n:,}" for n in np.bincount(splits[~known], minlength=len(split_names))))
    return table


def _sizes_table(manifest: pa.Table) -> Table:
    """Patches per format and size in pixels, the most common first."""
    table = _table("formats and sizes", "format", "px", "patches", "mean KB", words=2)
    plain = manifest.select(["width", "height", "size"]).append_column("format", manifest["format"].cast(pa.string()))
    found = plain.group_by(["format", "width", "height"]).aggregate([("size", "count"), ("size", "mean")])
    found = found.sort_by(
        [("size_count", "descending"), ("format", "ascending"), ("width", "ascending"), ("height", "ascending")]
    )
    for row in found.slice(0, _MAX_ROWS).to_pylist():
        table.add_row(
            row["format"], f"{row['width']} x {row['height']}", f"{row['size_count']:,}", f"{row['size_mean'] / 1e3:,.1f}"
        )
    if len(found) > _MAX_ROWS:
        rest = pc.sum(found["size_count"].slice(_MAX_ROWS)).as_py()
        table.add_row("", f"{len(found) - _MAX_ROWS:,} other sizes", f"{rest:,}", "")
    return table


def _decoders_table(manifest: pa.Table) -> Table:
    """Patches per decoder on a GPU."""
    table = _table("decoder on a GPU", "decoder", "patches", "of which", words=1)
    table.columns[2].justify = "left"
    paths: dict[str, list[tuple[int, str]]] = {}
    kinds = pa.table({name: manifest[name].cast(pa.string()) for name in ("format", "coding")})
    for row in kinds.group_by(["format", "coding"]).aggregate([([], "count_all")]).to_pylist():
        kind = f"{row['format']} {row['coding'] or ''}".strip()
        paths.setdefault(decoder_path(row["format"], row["coding"]), []).append((row["count_all"], kind))
    for path, kinds_of in sorted(paths.items(), key=lambda item: -sum(count for count, _ in item[1])):
        text = ", ".join(f"{count:,} {kind}" for count, kind in sorted(kinds_of, reverse=True)[:6])
        table.add_row(path, f"{sum(count for count, _ in kinds_of):,}", text)
    if "hardware JPEG" in paths:
        table.caption = (
            "PatchCLR decodes these with CUDA too: the share that the hardware decodes would depend on the batch size."
        )
    return table


def _words_table(manifest: pa.Table, column: str, title: str) -> Table | None:
    counted = sorted(pc.value_counts(manifest[column].cast(pa.string()).drop_null()).to_pylist(), key=lambda row: -row["counts"])
    if not counted:
        return None
    table = _table(title, "what", "patches")
    for row in counted[:_MAX_ROWS]:
        table.add_row(row["values"], f"{row['counts']:,}")
    return table


def _quarantine_table(folder: str) -> Table | None:
    """Refused files by reason, with an example each."""
    refused = read_quarantine(folder)
    if not len(refused):
        return None
    table = _table("quarantined", "reason", "files", "for example")
    table.columns[2].justify = "left"
    counted = refused.group_by("reason", use_threads=False).aggregate(
        [([], "count_all"), ("source", "first"), ("detail", "first")]
    )
    for row in counted.sort_by([("count_all", "descending"), ("reason", "ascending")]).to_pylist():
        table.add_row(row["reason"], f"{row['count_all']:,}", f"{row['source_first']} ({row['detail_first']})")
    return table


def _losses(manifest: pa.Table) -> Iterator[str]:
    psnr = manifest["psnr"].drop_null()
    if len(psnr):
        mean, worst = pc.mean(psnr).as_py(), pc.min(psnr).as_py()
        yield f"{len(psnr):,} patches were encoded with loss: PSNR mean {mean:.1f} dB, worst {worst:.1f} dB"


def _copies(manifest: pa.Table) -> Iterator[str]:
    """Exact copies, by the source's content, and those in several splits or classes."""
    digests = content_digests(source_digests(manifest))
    _, content, counts = np.unique(digests, axis=0, return_inverse=True, return_counts=True)
    copies = len(digests) - len(counts)
    if not copies:
        yield "no patch is an exact copy of another one"
        return
    yield f"{copies:,} patches are exact copies of another one"
    for name, what in (("split", "splits"), ("class", "classes")):
        codes, names = decoded(manifest[name])
        pairs = np.unique(content.ravel() * (len(names) + 1) + codes + 1) // (len(names) + 1)
        spread = int((np.bincount(pairs) > 1).sum())
        if spread:
            yield f"{counted(spread, 'image is', 'images are')} in several {what} as exact copies"


if __name__ == "__main__":
    sys.exit(run_script(main, InspectConfig, prog="sharding/inspect_shards.py", description=" ".join((__doc__ or "").split())))
