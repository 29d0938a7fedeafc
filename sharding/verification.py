"""Verify every byte of a shard set.

The sha256 of each file must match dataset.json, each tar's members, each index and the sha256 of each patch must match the
manifest, and each image must decode.
"""

import functools
import hashlib
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.images.image_checks import parsed_size, silent_decoders
from sharding.images.image_processing import check_stored
from sharding.manifest import (
    as_array,
    count_patches,
    decoded,
    index_file,
    listed_shard_files,
    read_dataset,
    read_manifest,
    shard_file,
)
from sharding.process_pool import ProcessPool, report_progress
from sharding.shard_format import EXTENSIONS, index_text

_COLUMNS = ("key", "format", "offset", "size", "label", "sha256", "height", "width")  # of _Shard, in its order


class _Shard(NamedTuple):
    """One shard by the manifest: a list entry per patch, in order."""

    number: int
    keys: list[str]
    formats: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    digests: list[str]
    heights: list[int | None]
    widths: list[int | None]


def verify(shards: str | Path, *, workers: int = 1) -> None:
    """Compare every byte of a shard set with its manifest. Raises ValueError at the first difference."""
    folder = Path(shards)
    dataset, manifest = read_dataset(folder), read_manifest(folder)
    if len(manifest) != dataset["patches"] or not np.array_equal(manifest["id"].to_numpy(), np.arange(len(manifest))):
        raise ValueError(
            f"{folder / 'manifest.parquet'} does not list the {dataset['patches']:,} patches of dataset.json in order"
        )
    if (np.diff(manifest["shard"].to_numpy()) < 0).any():
        raise ValueError(
            f"{folder / 'manifest.parquet'} does not list the patches in the order of the shards: copy the set again"
        )
    _check_classes(folder, dataset, manifest)
    _check_listing(folder, dataset)
    for name in sorted(dataset["files"]):
        if not name.endswith(".tar"):
            _check_file(folder, name, dataset["files"][name])
    check = functools.partial(_verify_shard, folder=folder, files=dataset["files"])
    with ProcessPool(min(workers, dataset["shards"])) as pool:
        for _ in pool.map(check, _shards(manifest, dataset["shards"]), total=len(manifest), title="verifying"):
            pass


def _check_classes(folder: Path, dataset: dict, manifest: pa.Table) -> None:
    """Raise ValueError unless dataset.json has the manifest's classes, in the order of the labels, and its counts."""
    labels = manifest["label"].to_numpy()
    given = [None, *dataset["classes"]]
    named = pa.array(given, pa.string()).take(pa.array(labels + 1))
    counts = count_patches(*decoded(manifest["split"]), labels, dataset["classes"])
    if not named.equals(as_array(manifest["class"])) or counts != dataset["counts"]:
        raise ValueError(
            f"{folder / 'dataset.json'} has other classes or counts than the manifest: copy the set again, or build it again"
        )


def _check_listing(folder: Path, dataset: dict) -> None:
    """Raise ValueError unless dataset.json lists the set's files and no others, and the folder has them and no other shards."""
    expected = {"manifest.parquet", "quarantine.parquet", *listed_shard_files(folder, dataset)}
    if missing := sorted(expected - dataset["files"].keys()):
        raise ValueError(f"{folder / 'dataset.json'} does not list {missing[0]}: copy the set again, or build it again")
    found = {path.name for path in folder.glob("shard-*") if path.suffix in (".tar", ".idx")}
    if stray := sorted((found | dataset["files"].keys()) - expected):
        raise ValueError(
            f"{folder / stray[0]} is no file of this set of {dataset['shards']:,} shards: remove it, or copy the set again"
        )
    if gone := sorted(expected - {path.name for path in folder.iterdir() if path.is_file()}):
        raise ValueError(f"{folder / gone[0]} is missing: copy the set again, or build it again")


def _shards(manifest: pa.Table, count: int) -> Iterator[_Shard]:
    bounds = np.searchsorted(manifest["shard"].to_numpy(), np.arange(count + 1)).tolist()
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = manifest.slice(start, end - start)
        yield _Shard(number, *(part[name].to_pylist() for name in _COLUMNS))


def _check_file(folder: Path, name: str, digest: str) -> None:
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(
                f"{folder / name} has changed since it was packed (its sha256 differs): copy it again, or build the set again"
            )


def _damaged_patches(tar: Path, shard: _Shard) -> str:
    """Which patches of a changed tar are not those of the manifest, in words for the end of a message."""
    damaged, length = [], tar.stat().st_size
    with tar.open("rb") as file:
        for key, offset, size, digest in zip(shard.keys, shard.offsets, shard.sizes, shard.digests, strict=True):
            file.seek(offset)
            if hashlib.sha256(file.read(min(size, length))).hexdigest() != digest:  # a manifest may claim any size
                damaged.append(key)
    if not damaged:
        return "; its patches are whole"
    others = f" and {len(damaged) - 3:,} more" if len(damaged) > 3 else ""
    return f"; damaged: {', '.join(damaged[:3])}{others}"


def _verify_shard(shard: _Shard, *, folder: Path, files: dict[str, str]) -> None:
    tar = folder / shard_file(shard.number)
    try:
        _check_file(folder, tar.name, files[tar.name])
    except ValueError as error:
        raise ValueError(f"{error}{_damaged_patches(tar, shard)}") from None
    extensions = [EXTENSIONS[name] for name in shard.formats]
    if (folder / index_file(shard.number)).read_text() != index_text(
        shard.keys, extensions, shard.offsets, shard.sizes, shard.labels
    ):
        raise ValueError(f"{folder / index_file(shard.number)} does not match the manifest")
    try:
        with tarfile.open(tar, "r:") as archive:
            members = {info.name: (info.offset_data, info.size) for info in archive}
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is not a tar: {error}") from error
    if len(members) != sum(1 + (label >= 0) for label in shard.labels):
        raise ValueError(f"{tar} has {len(members):,} members, and the manifest lists another number")
    with tar.open("rb") as file, silent_decoders():
        for i, (key, extension) in enumerate(zip(shard.keys, extensions, strict=True)):
            offset, size, label = shard.offsets[i], shard.sizes[i], shard.labels[i]
            if members.get(f"{key}.{extension}") != (offset, size):
                raise ValueError(f"{tar} does not have {key}.{extension} where the manifest says")
            file.seek(offset)
            data = file.read(size)
            if hashlib.sha256(data).hexdigest() != shard.digests[i]:
                raise ValueError(f"{tar}: the bytes of {key}.{extension} do not match the manifest")
            if refusal := check_stored(data):
                raise ValueError(
                    f"{tar}: {key}.{extension} cannot be decoded ({refusal.detail}): build the set again, without --check header"
                )
            size_px = shard.heights[i], shard.widths[i]
            if None not in size_px and parsed_size(data) != size_px:
                raise ValueError(
                    f"{tar}: {key}.{extension} has another height or width than the manifest says: build the set again"
                )
            if label >= 0:
                file.seek(members.get(f"{key}.cls", (0, 0))[0])
                if file.read(len(str(label))) != str(label).encode():
                    raise ValueError(f"{tar}: the label of {key} does not match the manifest")
            report_progress(1)
