"""Reading a shard set's description: dataset.json, manifest.parquet and quarantine.parquet.

    shards/breast/
      dataset.json          format version, name, class names, counts, the build's arguments, sha256 of every other file
      manifest.parquet      one row per patch, in id order
      shard-000000.tar      WebDataset: <key>.jpg|png|jp2, and <key>.cls (class index as text) where labelled
      shard-000000.idx      DALI's index of the tar, version 1.2
      quarantine.parquet    every refused file: source, reason, detail, sha256

dataset.json is written last, so a folder that has one is complete.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
QUARANTINE_COLUMNS = {"source": pa.string(), "reason": pa.string(), "detail": pa.string(), "sha256": pa.string()}


def shard_file(number: int) -> str:
    """The name of a shard's tar; its index has .idx instead of .tar."""
    return f"shard-{number:06d}.tar"


def index_file(number: int) -> str:
    """The name of the DALI index of a shard."""
    return f"shard-{number:06d}.idx"


def read_dataset(shards: str | Path) -> dict:
    """The content of dataset.json.

    Raises ValueError when the folder is missing, is no shard set, or was written in a newer format than this one.
    """
    folder = Path(shards)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; pack one with sharding/build.py")
    path = folder / "dataset.json"
    if not path.exists():
        raise ValueError(f"{folder} is not a shard set (it has no dataset.json); pack one with sharding/build.py")
    try:
        dataset = json.loads(path.read_bytes())
        version = dataset["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: pack the set again, or copy the file again") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {version}, and this PatchCLR reads format {FORMAT_VERSION}: upgrade PatchCLR")
    if version < FORMAT_VERSION:
        raise ValueError(f"{folder} has format {version}, and this PatchCLR reads format {FORMAT_VERSION}: pack the set again")
    if not isinstance(dataset.get("files"), dict) or not isinstance(dataset.get("classes"), list):
        raise ValueError(f"{path} is damaged: pack the set again, or copy the file again")
    return dataset


def read_manifest(shards: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """One row per patch, in id order; columns as in COLUMNS, and then one for each further field of the layout.

    columns: read only these, for sets whose whole manifest would take gigabytes. A column of COLUMNS that did not exist when the
    set was packed is null in every row.
    Raises ValueError as read_dataset does, and when manifest.parquet is missing or damaged.
    """
    read_dataset(shards)
    path = Path(shards) / "manifest.parquet"
    try:
        # Not memory-mapped: the set may be on a network drive that disconnects.
        with pq.ParquetFile(path, memory_map=False) as file:
            table = file.read(columns=columns)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: pack the set again, or copy it again") from None
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
    return table.unify_dictionaries().combine_chunks()


def fingerprint(shards: str | Path) -> str:
    """64 hex digits that depend on every byte of the set's patches, labels, splits and order, not on its location or name."""
    dataset = read_dataset(shards)
    content = {name: dataset[name] for name in ("format_version", "classes", "files")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def class_names(shards: str | Path) -> list[str]:
    """The names of the classes; a label is an index into this list. Empty for an unlabelled set."""
    return list(read_dataset(shards)["classes"])


def read_quarantine(shards: str | Path) -> pa.Table:
    """One row per refused file; columns as in QUARANTINE_COLUMNS. Raises ValueError when the file is missing or damaged."""
    path = Path(shards) / "quarantine.parquet"
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is missing or damaged: pack the set again, or copy it again") from error


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
