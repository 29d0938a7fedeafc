"""Reading a shard set's description: dataset.json, manifest.parquet and quarantine.parquet.

    shards/breast/
      dataset.json          format version, name, class names, counts, the build's arguments, sha256 of every other file
      manifest.parquet      one row per patch, in id order
      shard-000000.tar      WebDataset: <key>.jpg|png|jp2, and <key>.cls (class index as text) where labelled
      shard-000000.idx      DALI's index of the tar, version 1.2
      quarantine.parquet    every refused file: source, reason, detail, sha256

dataset.json is written last, so a folder that has one is complete.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.shard_format import EXTENSIONS

FORMAT_VERSION = 2

WORDS = pa.dictionary(pa.int32(), pa.string())  # few distinct values, stored once each

# To add a column: its name and type here, and its value in the row that `sharding.shard_writer` writes for each file. Sets
# that were packed before the column existed stay readable: in these it is null.
COLUMNS = {
    "id": pa.int64(),  # row number
    "key": pa.string(),  # the sample's name in the tar
    "shard": pa.int32(),
    "offset": pa.int64(),  # of the image's bytes in the tar
    "size": pa.int64(),  # of the image, bytes
    "label": pa.int32(),  # index into the class names, -1 where unlabelled
    "class": WORDS,
    "group": WORDS,  # slide or patient; null where not known
    "split": WORDS,
    "width": pa.int32(),  # pixels, as displayed
    "height": pa.int32(),
    "format": WORDS,  # jpeg, png or jpeg2000
    "coding": WORDS,  # of a JPEG, what a hardware decoder asks for: baseline 4:2:0, progressive 4:4:4, ...; otherwise null
    "converted": WORDS,  # what was done to the image; null where the bytes are those of the source
    "psnr": pa.float32(),  # dB, of the stored image against what was encoded; null where nothing lossy was written
    "sha256": pa.string(),  # of the image's bytes, hex
    "source_sha256": pa.string(),  # of the source's bytes; null where they are the image's
    "source": pa.string(),  # path as given
}
REQUIRED_COLUMNS = ("id", "key", "shard", "offset", "size", "label", "class", "group", "split", "format", "sha256", "source")
_NEVER_NULL = ("id", "key", "split", "format", "sha256")
QUARANTINE_COLUMNS = {"source": pa.string(), "reason": pa.string(), "detail": pa.string(), "sha256": pa.string()}


def shard_file(number: int) -> str:
    """The name of a shard's tar; its index has .idx instead of .tar."""
    return f"shard-{number:06d}.tar"


def index_file(number: int) -> str:
    """The name of the DALI index of a shard."""
    return f"shard-{number:06d}.idx"


def read_dataset(shards: str | Path) -> dict:
    """The content of dataset.json, with every field that this version reads; `arguments` is missing in sets of other packers.

    Raises ValueError when the folder is missing, is no shard set, or was written in a newer format than this one, and for a file
    that is damaged, with the name of the field.
    """
    folder = Path(shards)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; pack one with sharding/build.py")
    path = folder / "dataset.json"
    if not path.exists():
        raise ValueError(f"{folder} is not a shard set (it has no dataset.json); pack one with sharding/build.py")
    try:
        dataset = json.loads(path.read_bytes())
        json.dumps(dataset, ensure_ascii=False).encode()  # fails for half a surrogate pair, which no message could show
        version = dataset["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: pack the set again, or copy the file again") from error
    if not _is_count(version):
        raise damaged_field(path, "format_version")
    if version != FORMAT_VERSION:
        way_out = "upgrade PatchCLR" if version > FORMAT_VERSION else "pack the set again"
        raise ValueError(f"{folder} has format {version}, and this PatchCLR reads format {FORMAT_VERSION}: {way_out}")
    dataset = {"appended": []} | dataset
    for field, is_valid in _DATASET_FIELDS.items():
        if not is_valid(dataset.get(field)):
            raise damaged_field(path, field)
    if len({tuple(count) for count in dataset["counts"].values()}) != 1:  # every split counts the same classes
        raise damaged_field(path, "counts")
    if "arguments" in dataset and not isinstance(dataset["arguments"], dict):
        raise damaged_field(path, "arguments")
    return dataset


def damaged_field(path: Path, field: str) -> ValueError:
    """The error for a field of dataset.json that is missing or has another type than it should."""
    return ValueError(f"{path} is damaged (see its field {field!r}): pack the set again, or copy the file again")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _mapping_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


def _is_append(value: object) -> bool:
    counts = ("first_id", "patches")
    return isinstance(value, dict) and isinstance(value.get("arguments"), dict) and all(_is_count(value.get(n)) for n in counts)


_DATASET_FIELDS = {
    "name": _is_text,
    "classes": _list_of(_is_text),
    "patches": _is_count,
    "quarantined": _is_count,
    "shards": _is_count,
    "counts": _mapping_of(_mapping_of(_is_count)),
    "appended": _list_of(_is_append),
    "files": _mapping_of(_is_text),
}


def listed_shard_files(shards: str | Path, dataset: dict) -> list[str]:
    """The names of all tars and indexes of a set. Raises ValueError for one that dataset.json does not list."""
    names = []
    for number in range(dataset["shards"]):
        for name in (shard_file(number), index_file(number)):
            if name not in dataset["files"]:
                raise ValueError(f"{Path(shards) / 'dataset.json'} does not list {name}: pack the set again, or copy it again")
            names.append(name)
    return names


def read_manifest(shards: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """One row per patch, in id order; columns as in COLUMNS, and then one for each further field of the layout.

    columns: read only these, for sets whose whole manifest would take gigabytes. A column of COLUMNS that did not exist when the
    set was packed is null in every row.
    Raises ValueError as read_dataset does, and when manifest.parquet is missing, damaged, or not the one that dataset.json names.
    """
    dataset, path = read_dataset(shards), Path(shards) / "manifest.parquet"
    _check_digest(path, dataset["files"])
    try:
        # Not memory-mapped: the set may be on a network drive that disconnects.
        with pq.ParquetFile(path, memory_map=False) as file:
            table = file.read(columns=columns)
        table.validate(full=True)  # Parquet has no checksum: an index into a dictionary may be out of its bounds
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: pack the set again, or copy it again") from error
    missing = [name for name in columns or COLUMNS if name not in table.column_names]
    for name in missing:
        if name in REQUIRED_COLUMNS or name not in COLUMNS:
            raise ValueError(f"{path} has no column {name!r}: pack the set again, or copy it again")
        table = table.append_column(name, pa.nulls(len(table), COLUMNS[name]))
    if missing:
        order = columns or [*COLUMNS, *(name for name in table.column_names if name not in COLUMNS)]
        table = table.select(order)
    _check_types(table, path)
    _check_ranges(table, path, labels=len(dataset["classes"]), shards=dataset["shards"])
    return table.unify_dictionaries().combine_chunks()


def _check_digest(path: Path, files: dict[str, str]) -> None:
    """Raise ValueError unless manifest.parquet has the sha256 of dataset.json. It is hashed again only if its state changed."""
    try:
        state = path.stat()
        digest = _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: pack the set again, or copy it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): pack the set again, or copy it again") from error
    if digest != files.get(path.name):
        raise ValueError(
            f"{path} is not the file that dataset.json describes: it was changed or damaged since the set was packed. To correct"
            " labels or splits, pack the set again with a corrected --table; else copy the set again"
        )


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *_state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_types(table: pa.Table, path: Path) -> None:
    """Raise ValueError for a column of COLUMNS that has another type, a null where there is none, or an unknown format."""
    for name in [name for name in COLUMNS if name in table.column_names]:
        column, kinds = table[name], [_plain_type(each) for each in (table[name].type, COLUMNS[name])]
        right = any(all(map(is_kind, kinds)) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_string))
        if column.null_count == len(column) > 0 and name not in REQUIRED_COLUMNS:
            continue  # a packer need not record it
        unknown = name == "format" and right and not set(column.unique().to_pylist()) <= EXTENSIONS.keys()
        if not right or unknown or (name in _NEVER_NULL and column.null_count):
            raise damaged_column(path, name)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(kind) else kind


def damaged_column(path: Path, name: str) -> ValueError:
    """The error for a column of manifest.parquet with values that cannot be."""
    return ValueError(f"{path} is damaged (see its column {name!r}): pack the set again, or copy it again")


def _check_ranges(table: pa.Table, path: Path, *, labels: int, shards: int) -> None:
    """Raise ValueError for a number that cannot be, because readers use it as an index."""
    limits = {"shard": (0, shards), "label": (-1, labels), "offset": (0, 2**63), "size": (0, 2**63)}
    for name, (low, end) in {**limits, "width": (1, 2**31), "height": (1, 2**31)}.items():
        column = table[name] if name in table.column_names else pa.chunked_array([], pa.null())
        if not len(column) or (column.null_count == len(column) and name not in REQUIRED_COLUMNS):
            continue  # a packer need not record it
        least, most = pc.min_max(column).as_py().values() if pa.types.is_integer(column.type) else (-2, -2)
        if column.null_count or not low <= least <= most < end:
            raise damaged_column(path, name)


def fingerprint(shards: str | Path) -> str:
    """64 hex digits that depend on every byte of the set's patches, labels, splits and order, not on its location or name.

    Raises ValueError as read_manifest does: the manifest is checked. Shards count by their sha256 in dataset.json, which readers
    check by patch (`ShardReader.check`) and `sharding.verification.verify` by file.
    """
    dataset = read_dataset(shards)
    _check_digest(Path(shards) / "manifest.parquet", dataset["files"])
    return claimed_fingerprint(dataset)


def claimed_fingerprint(dataset: dict) -> str:
    """The fingerprint of a set with this dataset.json, if its files are those that it describes."""
    content = {name: dataset[name] for name in ("format_version", "classes", "files")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def class_names(shards: str | Path) -> list[str]:
    """The names of the classes; a label is an index into this list. Empty for an unlabelled set."""
    return list(read_dataset(shards)["classes"])


def read_quarantine(shards: str | Path) -> pa.Table:
    """One row per refused file; columns as in QUARANTINE_COLUMNS. Raises ValueError when the file is missing or damaged."""
    path = Path(shards) / "quarantine.parquet"
    try:
        return pq.read_table(path).select(list(QUARANTINE_COLUMNS))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged: pack the set again, or copy it again") from error


def count_patches(
    splits: np.ndarray, split_names: list[str], labels: np.ndarray, classes: list[str]
) -> dict[str, dict[str, int]]:
    """Patches per split and class, sorted; the class is "" where unlabelled."""
    names = classes or [""]
    codes = splits * len(names) + np.maximum(labels, 0)
    table = np.bincount(codes, minlength=len(split_names) * len(names)).reshape(len(split_names), len(names))
    counted = {split: dict(sorted(zip(names, map(int, row), strict=True))) for split, row in zip(split_names, table, strict=True)}
    return {split: counted[split] for split in sorted(counted) if sum(counted[split].values())}


def source_digests(manifest: pa.Table) -> pa.ChunkedArray:
    """The hex sha256 of each patch's source file, which is the same however the image is stored."""
    if "source_sha256" not in manifest.column_names:
        return manifest["sha256"]
    return pc.coalesce(manifest["source_sha256"], manifest["sha256"])  # null where the source's bytes are stored unchanged


def decoded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """A string column as (n,) int64 codes, -1 for null, and the sorted list of the distinct strings that the codes index."""
    array = column.combine_chunks()
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    if isinstance(array, pa.ChunkedArray):
        array = array.unify_dictionaries().combine_chunks()
    words = array.dictionary.to_pylist()
    codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    used = np.bincount(codes + 1, minlength=len(words) + 1)[1:] > 0  # filtering keeps strings that no row has any more
    order = sorted(word for word, occurs in zip(words, used, strict=True) if occurs)
    place = {word: index for index, word in enumerate(order)}
    lookup = np.array([place.get(word, -1) for word in words] + [-1], np.int64)  # -1 indexes the last: null stays -1
    return lookup[codes], order


def as_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A string or dictionary column as one array of strings."""
    strings = column.cast(pa.string())
    return strings if isinstance(strings, pa.Array) else pa.concat_arrays([pa.array([], pa.string()), *strings.chunks])
