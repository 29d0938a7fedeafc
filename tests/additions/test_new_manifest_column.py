"""Two new manifest columns, added to a copy of the code: one of numbers and one of words.

New sets have values in them. Sets that were packed before can be read, inspected, verified, appended to and trained on, and have
nulls there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.loader import ViewLoader
from pipelines.recipes import RECIPES
from sharding.manifest import COLUMNS, WORDS, read_manifest
from sharding.packing import build_shards
from sharding.selection import select
from tests.helpers import BREAST_LAYOUT, copy_folders, encoded, replace_manifest, write_tree

COLUMN = '    "sha256": pa.string(),  # of the image'
IN_MANIFEST = '    "brightness": pa.float32(),  # mean sample, 0 to 255\n    "scanner": WORDS,\n'
ROW = "            source_sha256=digest,\n"
IN_SHARD_WRITER = "            brightness=image.data[-3],\n            scanner='abc'[len(image.data) % 3],\n"

USE = """
import json, sys
from sharding.manifest import COLUMNS, read_manifest
from sharding.packing import build_shards

sources, old, new, layout = sys.argv[1:]
assert "brightness" in COLUMNS
before = read_manifest(old)
build_shards([sources + "/first"], new, layout=layout)
build_shards([sources + "/first", sources + "/second"], old, layout=layout, append=True)
names = ["brightness", "scanner", "source", "size"]
print(json.dumps({
    "before": before.select(["brightness", "scanner"]).to_pylist(),
    "columns": [before.column_names, read_manifest(new).column_names],
    "subset": read_manifest(old, columns=["scanner", "id"]).column_names,
    "new": read_manifest(new, columns=names).to_pylist(),
    "grown": read_manifest(old, columns=names).to_pylist(),
}))
"""


@pytest.fixture
def changed(tmp_path):
    """A copy of the code with the two columns, in the two files that CONTRIBUTING.md names."""
    copy = tmp_path / "copy"
    copy_folders(copy, "sharding")
    for file, line, addition in (("manifest", COLUMN, IN_MANIFEST), ("shard_writer", ROW, IN_SHARD_WRITER)):
        path = copy / "sharding" / f"{file}.py"
        text = path.read_text()
        assert text.count(line) == 1
        path.write_text(text.replace(line, addition + line))
    return copy


def run(copy, *arguments):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_new_columns_have_values_in_new_sets_and_nulls_in_old_ones(tmp_path, changed):
    def images(begin, end):
        return {f"{'ab'[i % 2]}/s{i % 3}/x40/{i}.jpg": encoded(i) for i in range(begin, end)}

    write_tree(tmp_path / "in/first", images(0, 24))
    write_tree(tmp_path / "in/second", images(24, 36))
    old, new = tmp_path / "old", tmp_path / "new"
    build_shards([tmp_path / "in/first"], old, layout=BREAST_LAYOUT)

    shown = run(changed, "sharding/inspect_shards.py", old, "--verify", "--workers", 1)
    assert "24 patches are unchanged since they were packed" in shown
    told = json.loads(run(changed, "-c", USE, tmp_path / "in", old, new, BREAST_LAYOUT))
    assert told["before"] == [{"brightness": None, "scanner": None}] * 24
    assert told["columns"][0] == told["columns"][1]
    assert told["subset"] == ["scanner", "id"]

    def expected(row):
        data = Path(row["source"]).read_bytes()
        return data[-3], "abc"[len(data) % 3]

    for row in told["new"] + told["grown"][24:]:
        assert (row["brightness"], row["scanner"]) == expected(row)
    assert (len(told["new"]), len(told["grown"])) == (24, 36)
    assert {(row["brightness"], row["scanner"]) for row in told["grown"][:24]} == {(None, None)}
    assert "36 patches are unchanged since they were packed" in run(
        changed, "sharding/inspect_shards.py", old, "--verify", "--workers", 1
    )


def test_training_reads_a_set_that_lacks_the_columns(small_set, monkeypatch):
    monkeypatch.setitem(COLUMNS, "brightness", pa.float32())
    monkeypatch.setitem(COLUMNS, "scanner", WORDS)
    manifest = read_manifest(small_set)
    assert manifest["brightness"].null_count == manifest["scanner"].null_count == len(manifest)
    ids = select(manifest, split="train", fraction=0.5)
    settings = dict(batch_size=8, image_size=16, recipe=RECIPES["simclr"], seed=1, backend="torchvision")
    with ViewLoader(small_set, ids, **settings) as loader:
        assert next(iter(loader)).views.shape == (2, 8, 3, 16, 16)


def test_a_set_without_a_column_that_it_always_had_is_damaged(small_set, tmp_path):
    copy = shutil.copytree(small_set, tmp_path / "set")
    table = pq.read_table(copy / "manifest.parquet")
    replace_manifest(copy, table.drop(["offset"]))
    for columns in (None, ["offset"]):
        with pytest.raises(ValueError, match="has no column 'offset'"):
            read_manifest(copy, columns=columns)
