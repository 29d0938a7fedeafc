"""Pack folders of patch images into a shard set: tars that WebDataset and DALI read, and a manifest with one row per patch.

Every image is decoded in full; images that cannot be decoded are left out and listed in quarantine.parquet. An interrupted
build resumes when you run the same command again. Example:

    python sharding/build.py data/breast --out shards/breast --layout '{class}/{slide}/{magnification}/{name}' \
        --where magnification=x40 --group-by slide --split train=0.8,test=0.2
"""

import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sharding.build_config import BuildConfig
from sharding.cli import run_script
from sharding.packing import Summary, build_shards
from sharding.sources.file_listing import counted


def main(config: BuildConfig) -> None:
    """Build the set and print a summary."""
    report(build_shards(**asdict(config)))


def report(summary: Summary) -> None:
    """Print the patches per class and split, the build's messages, and the set's path."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if summary.was_there:
        console.print("The set already contains all of these images.")
    splits = sorted(summary.counts, key=lambda split: -sum(summary.counts[split].values()))
    table = Table("class", *(f"{split}" for split in splits), "all")
    for column in table.columns[1:]:
        column.justify = "right"
    classes = list(next(iter(summary.counts.values())))
    for name in classes:
        counts = [summary.counts[split][name] for split in splits]
        table.add_row(name or "(unlabelled)", *(f"{count:,}" for count in [*counts, sum(counts)]))
    if len(classes) > 1:
        totals = [sum(summary.counts[split].values()) for split in splits]
        table.add_row("all", *(f"{count:,}" for count in [*totals, sum(totals)]))
    console.print(table)
    for note in summary.notes:
        console.print(f"- {note}")
    console.print(f"{counted(summary.found, 'image')} found = {summary.packed:,} packed + {summary.quarantined:,} quarantined")
    if summary.added and summary.added < summary.packed:
        console.print(counted(summary.added, "patch was added", "patches were added"))
    console.print(
        f"{summary.name}: {counted(summary.packed, 'patch', 'patches')} in {counted(summary.shards, 'shard')}: {summary.out}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main, BuildConfig, prog="sharding/build.py", description=" ".join((__doc__ or "").split())))
