"""The flags of sharding/build.py, and the command that packs a given set."""

import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sharding.cli import old_defaults, option, positional, required
from sharding.manifest import damaged_field, read_dataset
from sharding.sources.file_listing import printable


@dataclass(frozen=True)
class BuildConfig:
    """The settings of a build.

    dataset.json records the fields whose `identity` is True: they decide what is in the set. For a set that was packed before a
    field existed, the field's `old_default` holds, which is the default unless given.
    """

    sources: list[str] = positional("folders of images (at any depth), or tars and zips of them")
    out: str = required("folder of the new shard set, such as shards/breast", identity=False)
    layout: str | None = option(
        None,
        "how to read fields from the path below a source: a template such as {class}/{slide}/{name}, or regex: followed by a "
        "Python pattern with named groups, searched for in the path (default: {class}/{name})",
    )
    table: str | None = option(
        None,
        ".csv, .tsv or .parquet file with a column path (relative to a source, or absolute) and fields such as class or split",
    )
    where: list[str] = option(
        [], "keep only images with this value of a field, such as magnification=x40, or all others, such as class!=artefact"
    )
    system_files: bool = option(
        False, "also pack images in folders of operating systems and photo programs, such as @eaDir, __MACOSX or $RECYCLE.BIN"
    )
    unlabelled: bool = option(False, "store no classes; without --layout, pack every image at any depth")
    split: str | None = option(
        None,
        "share of each split, such as train=0.8,test=0.2, or column:NAME for a field that holds the split (default: all train)",
    )
    group_by: str | None = option(None, "field that names the slide or patient of a patch; each stays entirely in one split")
    split_by: Literal["auto", "patch", "group"] = option(
        "auto",
        "group: keep each group in one split; patch: split patches and only record groups; auto: group if --group-by is given",
    )
    duplicates: Literal["together", "apart"] = option(
        "together", "together: keep exact copies of an image in one split; apart: ignore copies"
    )
    encode: str = option(
        "keep",
        "keep: store the bytes of each file; png, jpeg:QUALITY or jpeg2000 (lossless): store all images but JPEGs in this format",
    )
    resize: int | None = option(
        None, "shrink the shorter side of images to this many pixels; needs --encode png, jpeg:QUALITY or jpeg2000"
    )
    check: Literal["decode", "header"] = option("decode", "decode every image in full, or read only its header, which is faster")
    min_size: int = option(1, "quarantine images with a side below this many pixels")
    min_tissue: float = option(0.0, "quarantine images with a smaller share of tissue, such as 0.05 (0: keep blank images)")
    strict: bool = option(False, "fail if an image would be quarantined, and write no set", identity=False)
    append: bool = option(
        False, "add new images to an existing set, as new shards; existing shards do not change", identity=False
    )
    name: str | None = option(None, "name of the set (default: the folder name of --out)", identity=False)
    shard_size: float = option(128, "approximate size of each tar, in MB")
    shard_patches: int | None = option(None, "maximum number of patches per tar, up to 16,384")
    workers: int = option(0, "number of processes (0: one per core)", identity=False)
    seed: int = option(42, "seed of the split and of the stored order")


# What --append cannot change: new patches get labels and splits by the same rules as old ones.
FIXED_ARGUMENTS = ("unlabelled", "split", "group_by", "split_by", "duplicates", "seed")


def recorded_arguments(config: BuildConfig) -> dict[str, Any]:
    """The arguments that dataset.json records, in the order of their fields."""
    arguments = {each.name: getattr(config, each.name) for each in fields(BuildConfig) if each.metadata["identity"]}
    arguments["sources"] = [printable(source) for source in config.sources]
    arguments["table"] = None if config.table is None else printable(config.table)
    return arguments


def recorded_builds(shards: str | Path, dataset: dict) -> list[dict[str, Any]]:
    """The arguments of the build and of each append that made a set, complete; empty for a set of another packer.

    An argument that did not exist yet has its field's `old_default`.
    Raises ValueError for an argument that only a newer version knows, and for one of another type than its field's.
    """
    path, hints = Path(shards) / "dataset.json", get_type_hints(BuildConfig)
    if "arguments" not in dataset:
        return []
    builds = [dataset["arguments"], *(append["arguments"] for append in dataset["appended"])]
    for recorded in builds:
        for name in [*recorded, "sources"]:
            if name not in hints:
                raise ValueError(
                    f"{path}: a newer version of PatchCLR made this set, with the argument {name!r}: use that version, or build "
                    "into another folder"
                )
            if not _is_of_type(recorded.get(name), hints[name]):
                raise damaged_field(path, f"arguments: {name}")
    return [old_defaults(BuildConfig) | recorded for recorded in builds]


def _is_of_type(value: object, hint: Any) -> bool:
    """Whether a value from JSON has the type of a field."""
    if get_origin(hint) is UnionType:
        return any(_is_of_type(value, each) for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of_type(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    return type(value) in ((int, float) if hint is float else (hint,))


def commands_of(shards: str | Path, out: str | None = None) -> list[list[str]]:
    """The arguments of the commands that pack this set: of the build, then of each append. Empty for a set of another packer.

    With the sources as they were then, they give the same fingerprint. out: their --out, the set's folder by default.
    Raises ValueError when the folder is no shard set, and as recorded_builds does.
    """
    dataset, out = read_dataset(shards), out or str(shards)
    end = ["--out", out] if dataset["name"] == PurePosixPath(out).name else ["--out", out, "--name", dataset["name"]]
    builds = recorded_builds(shards, dataset)
    return [[*_command_line(recorded), *(["--append"] if i else []), *end] for i, recorded in enumerate(builds)]


def packed_by(shards: str | Path, place: str | None = None) -> list[str]:
    """The commands that pack this set, for readers elsewhere: absolute paths are cut to their last part.

    place: folder or URL of the set when `shards` is a copy of it.
    """

    def shorten(argument: str) -> str:
        return Path(argument).name if Path(argument).is_absolute() else argument

    commands = commands_of(shards, out=PurePosixPath(place or str(shards)).name)
    return [shlex.join(["python", "sharding/build.py", *map(shorten, command)]) for command in commands]


def _command_line(recorded: dict[str, Any]) -> list[str]:
    """The command line that gives the arguments of `recorded_builds`. Defaults are left out."""
    defaults = {each.name: each.default if each.default is not MISSING else [] for each in fields(BuildConfig)}
    by_column = (recorded["split"] or "").startswith("column:")
    defaults["split_by"] = "group" if recorded["group_by"] and not by_column else "patch"  # what auto means
    words = list(recorded["sources"])
    for name, value in recorded.items():
        if name == "sources" or value == defaults[name]:
            continue
        words.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return words
