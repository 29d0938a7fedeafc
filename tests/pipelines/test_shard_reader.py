"""Patch id -> bytes."""

import hashlib
import shutil
import tarfile

import numpy as np
import pytest

from pipelines.shard_reader import ShardReader
from sharding.manifest import shard_file


def test_reads_the_bytes_that_were_packed(shard_set):
    reader = ShardReader(shard_set)
    assert len(reader) == 55
    ids = np.random.default_rng(0).permutation(55)
    for i, data in zip(ids, reader.read(ids), strict=True):
        row = reader.manifest.slice(int(i), 1).to_pylist()[0]
        assert data.dtype == np.uint8
        assert hashlib.sha256(data.tobytes()).hexdigest() == row["sha256"]
        assert (reader.sizes[i].tolist(), reader.labels[i]) == ([row["height"], row["width"]], row["label"])


def test_reads_what_tar_reads(shard_set):
    reader = ShardReader(shard_set)
    for shard in range(3):
        with tarfile.open(shard_set / shard_file(shard)) as tar:
            for row in reader.manifest.to_pylist():
                if row["shard"] == shard:
                    extension = {"jpeg": "jpg", "png": "png"}[row["format"]]
                    member = tar.extractfile(f"{row['key']}.{extension}").read()
                    assert reader.read(np.array([row["id"]]))[0].tobytes() == member


def test_reading_copies_nothing(shard_set):
    """Slices of one mapping per shard: the same patch twice is the same memory."""
    reader = ShardReader(shard_set)
    one, two = reader.read(np.array([4, 4]))
    assert np.shares_memory(one, two)
    assert not one.flags.writeable


def test_check_names_the_first_damaged_patch(shard_set, tmp_path):
    copied = shutil.copytree(shard_set, tmp_path / "copied")
    reader = ShardReader(copied)
    reader.check(np.arange(55))
    row = reader.manifest.to_pylist()[30]
    path = copied / shard_file(row["shard"])
    data = bytearray(path.read_bytes())
    data[row["offset"] + row["size"] - 1] ^= 1
    path.write_bytes(data)
    damaged = ShardReader(copied)
    damaged.check(np.delete(np.arange(55), 30))
    with pytest.raises(ValueError, match="changed or damaged") as error:
        damaged.check(np.arange(55))
    assert row["key"] in str(error.value) and str(path) in str(error.value)
