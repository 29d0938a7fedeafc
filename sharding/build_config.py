"""The command that packs a set: its flags, and how it is typed again for a set that is there."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sharding.cli import option, positional, required
from sharding.manifest import read_dataset


@dataclass(frozen=True)
class BuildConfig:
    """The settings of a build, as sharding.packing.build_shards takes them."""

    sources: list[str] = positional("folders that hold the images, at any depth, or tars and zips of them")
    out: str = required("the folder of the shard set, such as shards/breast")
    layout: str | None = option(
        None,
        "what a path under a source means: a template such as {class}/{slide}/{name}, or regex: and a Python pattern with "
        "named groups, searched for in the path (default: {class}/{name})",
    )
    table: str | None = option(
        None, "a .csv, .tsv or .parquet with a column path (under a source, or absolute) and fields such as class, group, split"
    )
    where: list[str] = option([], "take only images with this value of a field, such as magnification=x40; != leaves them out")
    unlabelled: bool = option(False, "store no class; without --layout, take every image at any depth")
    split: str | None = option(
        None, "shares of each class, such as train=0.8,test=0.2, or column:NAME, a field that says it (default: all is train)"
    )
    group_by: str | None = option(None, "the field that names the slide or patient of a patch; it stays whole in one split")
    split_by: Literal["auto", "patch", "group"] = option(
        "auto", "group: keep each group whole in one split; patch: only record the groups; auto: group where --group-by is given"
    )
    duplicates: Literal["together", "apart"] = option("together", "keep exact copies in one split, or wherever they fall")
    encode: str = option(
        "keep", "keep: each file's bytes as they are; png, jpeg:QUALITY or jpeg2000 (lossless): what is not a JPEG becomes one"
    )
    resize: int | None = option(None, "shrink images to this shorter side, in pixels; needs --encode png, jpeg:95 or jpeg2000")
    check: Literal["decode", "header"] = option("decode", "decode every image in full, or (fast) look at its header only")
    min_size: int = option(1, "refuse images with a side below this, in pixels")
    min_tissue: float = option(0.0, "refuse images with a smaller share of tissue than this, such as 0.05 (0: keep blank ones)")
    strict: bool = option(False, "stop at refused images and write nothing, instead of listing them in quarantine.parquet")
    append: bool = option(False, "add what is new to the set that is there, as new shards; nothing of the old changes")
    name: str | None = option(None, "the set's name (default: that of the folder --out)")
    shard_size: float = option(128, "about how large each tar is, in MB")
    shard_patches: int | None = option(None, "at most how many patches each tar holds (never more than 16,384)")
    workers: int = option(0, "processes to work with (0: one per core)")
    seed: int = option(42, "seed of the split and of the stored order")


def commands_of(shards: str | Path) -> list[list[str]]:
    """The arguments of the commands that pack this set: of the build, then of each that made it grow.

    The same sources, as they were then, give the same fingerprint. Raises ValueError for what is no shard set.
    """
    return _commands(shards, str(shards))


def packed_by(shards: str | Path, place: str | None = None) -> list[str]:
    """These commands for readers elsewhere: of an absolute path the last part alone is said.

    place: folder or URL of the set, of which `shards` may be a copy; None: it is no copy.
    """

    def shown(word: str) -> str:
        return Path(word).name if Path(word).is_absolute() else word

    out = PurePosixPath(place or str(shards)).name
    return [shlex.join(["python", "sharding/build.py", *map(shown, command)]) for command in _commands(shards, out)]


def _commands(shards, out):
    dataset = read_dataset(shards)
    if "arguments" not in dataset:  # of another packer
        return []
    named = [] if dataset["name"] == PurePosixPath(out).name else ["--name", dataset["name"]]
    end = ["--out", out, *named]
    grown = [[*_arguments(growth["arguments"]), "--append", *end] for growth in dataset.get("appended", ())]
    return [[*_arguments(dataset["arguments"]), *end], *grown]


def _arguments(settled: Mapping[str, Any]) -> list[str]:
    """What is to be typed for arguments as dataset.json has them, without what goes without saying."""
    by_column = (settled["split"] or "").startswith("column:")
    usual = {each.name: each.default if each.default is not MISSING else [] for each in fields(BuildConfig)}
    usual["split_by"] = "group" if settled["group_by"] and not by_column else "patch"  # what auto comes to
    words = list(settled["sources"])
    for name, value in settled.items():
        if name == "sources" or value == usual[name]:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words
