"""Two new manifest columns, added to a copy of the code: one of numbers and one of words.

New sets have values in them. Sets that were packed before can be read, inspected, verified, appended to and trained on, and have
nulls there.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from sharding.packing import build_shards
from tests.helpers import BREAST_LAYOUT, ROOT, encoded, write_tree

COLUMN = '    "sha256": pa.string(),  # of the image'
IN_MANIFEST = '    "brightness": pa.float32(),  # mean sample, 0 to 255\n    "scanner": WORDS,\n'
ROW = "            source_sha256=digest,\n"
IN_SHARD_WRITER = "            brightness=stored.data[-3],\n            scanner='abc'[len(stored.data) % 3],\n"

USE = """
import json, sys
from pipelines.loader import ViewLoader
from pipelines.recipes import RECIPES
from sharding.manifest import COLUMNS, read_manifest
from sharding.packing import build_shards
from sharding.selection import select

sources, old, new, layout = sys.argv[1:]
assert "brightness" in COLUMNS
before = read_manifest(old)
ids = select(before, fraction=0.5)
with ViewLoader(old, ids, batch_size=8, image_size=16, recipe=RECIPES["simclr"], seed=1, rank=0, world_size=1, device="cpu") as loader:
    batch = next(iter(loader))
build_shards([sources + "/first"], new, layout=layout)
build_shards([sources + "/first", sources + "/second"], old, layout=layout, append=True)
names = ["brightness", "scanner", "source", "size"]
print(json.dumps({
    "before": before.select(["brightness", "scanner"]).to_pylist(),
    "columns": [before.column_names, read_manifest(new).column_names],
    "subset": read_manifest(old, columns=["scanner", "id"]).column_names,
    "batch": list(batch.views.shape),
    "new": read_manifest(new, columns=names).to_pylist(),
    "grown": read_manifest(old, columns=names).to_pylist(),
}))
"""


@pytest.fixture
def changed(tmp_path):
    """A copy of the code with the two columns, in the two files that CONTRIBUTING.md names."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "sharding", copy / "sharding", ignore=shutil.ignore_patterns("__pycache__"))
    for file, line, addition in (("manifest", COLUMN, IN_MANIFEST), ("shard_writer", ROW, IN_SHARD_WRITER)):
        path = copy / "sharding" / f"{file}.py"
        text = path.read_text()
        assert text.count(line) == 1
        path.write_text(text.replace(line, addition + line))
    return copy


def run(copy, *arguments):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{ROOT}"}
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
    assert "24 patches are as they were packed" in shown
    told = json.loads(run(changed, "-c", USE, tmp_path / "in", old, new, BREAST_LAYOUT))
    assert told["before"] == [{"brightness": None, "scanner": None}] * 24
    assert told["columns"][0] == told["columns"][1]
    assert told["subset"] == ["scanner", "id"]
    assert told["batch"] == [2, 8, 3, 16, 16]

    def expected(row):
        data = open(row["source"], "rb").read()
        return data[-3], "abc"[len(data) % 3]

    for row in told["new"] + told["grown"][24:]:
        assert (row["brightness"], row["scanner"]) == expected(row)
    assert (len(told["new"]), len(told["grown"])) == (24, 36)
    assert {(row["brightness"], row["scanner"]) for row in told["grown"][:24]} == {(None, None)}
    assert "36 patches are as they were packed" in run(changed, "sharding/inspect_shards.py", old, "--verify", "--workers", 1)
