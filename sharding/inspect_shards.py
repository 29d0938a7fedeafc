"""Show what a shard set holds, and check it.

    python sharding/inspect_shards.py shards/breast --verify

Without --verify only dataset.json and manifest.parquet are read. With it, every byte is: the sha256 of each file against
dataset.json, each tar and each index against the manifest, and the sha256 of each patch.
"""

import functools
import hashlib
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from sharding.command import option, positional, run_script
from sharding.manifest import decoded, fingerprint, index_file, read_dataset, read_manifest, shard_file
from sharding.packing import count_patches
from sharding.plan import index_text
from sharding.workers import available_cores, ordered_map
from sharding.writing import ShardTask, shard_tasks


@dataclass(frozen=True)
class InspectConfig:
    """The settings of an inspection."""

    shards: str = positional("the folder of the shard set")
    verify: bool = option(False, "read every byte and compare it with the manifest")
    workers: int = option(0, "processes to verify with (0: one per core)")


def main(config: InspectConfig) -> None:
    """Print the set's tables; verify it where asked."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    dataset, manifest = read_dataset(config.shards), read_manifest(config.shards)
    shards = "1 shard" if dataset["shards"] == 1 else f"{dataset['shards']:,} shards"
    size = pc.sum(manifest["size"]).as_py()
    console.print(
        f"{dataset['name']}: {len(manifest):,} patches, {size / 1e6:,.1f} MB in {shards}, {dataset['quarantined']:,} quarantined"
    )
    console.print(f"fingerprint {fingerprint(config.shards)}")
    console.print(_classes_table(manifest))
    console.print(_sizes_table(manifest))
    for line in _duplicates(manifest):
        console.print(line)
    if config.verify:
        if config.workers < 0:
            raise ValueError(f"--workers {config.workers} is out of range: give at least 1, or 0 for all cores")
        verify(config.shards, workers=config.workers or available_cores())
        console.print(f"verified: {len(dataset['files']):,} files and {len(manifest):,} patches are as they were packed")


def _classes_table(manifest: pa.Table) -> Table:
    """Patches (and groups) per class and split."""
    counts = count_patches(manifest)
    splits, split_names = decoded(manifest["split"])
    classes, class_names = decoded(manifest["class"])
    groups, group_names = decoded(manifest["group"])
    table = Table(
        "class",
        *split_names,
        "all",
        title="patches (groups) per class and split" if group_names else "patches per class and split",
    )
    for column in table.columns[1:]:
        column.justify = "right"

    def cell(patches: int, mask: np.ndarray) -> str:
        if not group_names:
            return f"{patches:,}"
        return f"{patches:,} ({len(np.unique(groups[mask & (groups >= 0)])):,})"

    everything = np.ones(len(manifest), bool)
    names = class_names or [""]
    for index, name in enumerate(names):
        mine = classes == index if class_names else everything
        cells = [cell(counts[split][name], mine & (splits == code)) for code, split in enumerate(split_names)]
        table.add_row(name or "(unlabelled)", *cells, cell(int(mine.sum()), mine))
    if len(names) > 1:
        cells = [cell(sum(counts[split].values()), splits == code) for code, split in enumerate(split_names)]
        table.add_row("all", *cells, cell(len(manifest), everything))
    return table


def _sizes_table(manifest: pa.Table) -> Table:
    """Patches per format and size in pixels, the most common first."""
    table = Table("format", "px", "patches", "mean KB", title="formats and sizes")
    for column in table.columns[2:]:
        column.justify = "right"
    plain = manifest.select(["width", "height", "size"]).append_column("format", manifest["format"].cast(pa.string()))
    found = plain.group_by(["format", "width", "height"]).aggregate([("size", "count"), ("size", "mean")])
    found = found.sort_by(
        [("size_count", "descending"), ("format", "ascending"), ("width", "ascending"), ("height", "ascending")]
    )
    shown = 12
    for row in found.slice(0, shown).to_pylist():
        table.add_row(
            row["format"], f"{row['width']} x {row['height']}", f"{row['size_count']:,}", f"{row['size_mean'] / 1e3:,.1f}"
        )
    if len(found) > shown:
        rest = pc.sum(found["size_count"].slice(shown)).as_py()
        table.add_row("", f"{len(found) - shown:,} other sizes", f"{rest:,}", "")
    return table


def _duplicates(manifest: pa.Table) -> Iterator[str]:
    copies = len(manifest) - pc.count_distinct(manifest["sha256"]).as_py()
    if copies:
        yield f"{copies:,} patches are exact copies of another one"


def verify(shards: str | Path, *, workers: int = 1) -> None:
    """Compare every byte of a shard set with what its manifest says. Raises ValueError at the first difference."""
    folder = Path(shards)
    dataset, manifest = read_dataset(folder), read_manifest(folder)
    if len(manifest) != dataset["patches"] or not np.array_equal(manifest["id"].to_numpy(), np.arange(len(manifest))):
        raise ValueError(
            f"{folder / 'manifest.parquet'} does not list the {dataset['patches']:,} patches of dataset.json in order"
        )
    expected = {shard_file(n) for n in range(dataset["shards"])} | {index_file(n) for n in range(dataset["shards"])}
    if missing := sorted((expected | {"manifest.parquet", "quarantine.parquet"}) - dataset["files"].keys()):
        raise ValueError(f"{folder / 'dataset.json'} does not list {missing[0]}")
    for name in sorted(dataset["files"]):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if not name.endswith(".tar"):
            _check_file(folder, name, dataset["files"][name])
    check = functools.partial(_verify_shard, folder=folder, files=dataset["files"])
    for _ in ordered_map(
        check,
        shard_tasks(manifest, manifest["source"].to_pylist()),
        workers=workers,
        weight=lambda shard: len(shard.keys),
        title="verifying",
    ):
        pass


def _check_file(folder: Path, name: str, digest: str) -> None:
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(
                f"{folder / name} is not as it was packed (its sha256 differs): copy it again, or build the set again"
            )


def _verify_shard(shard: ShardTask, *, folder: Path, files: dict[str, str]) -> int:
    """Check a tar's bytes, its members, its index and its patches."""
    tar = folder / shard_file(shard.number)
    _check_file(folder, tar.name, files[tar.name])
    text = index_text(shard.keys, shard.extensions, shard.offsets, shard.sizes, shard.labels)
    if (folder / index_file(shard.number)).read_text() != text:
        raise ValueError(f"{folder / index_file(shard.number)} does not fit the manifest")
    try:
        with tarfile.open(tar, "r:") as archive:
            members = {info.name: (info.offset_data, info.size) for info in archive}
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is not a tar: {error}") from error
    with tar.open("rb") as file:
        for key, extension, offset, size, label, digest in zip(
            shard.keys, shard.extensions, shard.offsets, shard.sizes, shard.labels, shard.digests, strict=True
        ):
            if members.get(f"{key}.{extension}") != (offset, size):
                raise ValueError(f"{tar} does not hold {key}.{extension} where the manifest says")
            file.seek(offset)
            if hashlib.sha256(file.read(size)).hexdigest() != digest:
                raise ValueError(f"{tar}: the bytes of {key}.{extension} are not those of the manifest")
            if label >= 0:
                file.seek(members.get(f"{key}.cls", (0, 0))[0])
                if file.read(len(str(label))) != str(label).encode():
                    raise ValueError(f"{tar}: the label of {key} is not that of the manifest")
    return len(shard.keys)


DESCRIPTION = (
    "Show what a shard set holds: patches per class, split and group, formats and sizes. With --verify, read every byte and "
    "compare it with what was packed. Example: python sharding/inspect_shards.py shards/breast --verify"
)

if __name__ == "__main__":
    sys.exit(run_script(main, InspectConfig, prog="sharding/inspect_shards.py", description=DESCRIPTION))
