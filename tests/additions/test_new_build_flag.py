"""A new flag of sharding/build.py, added to a copy of the code as one field of BuildConfig.

A set that was packed before is as if it had been packed with the field's `old_default`: it can be appended to, and its command
is still the right one.
"""

import ast
import os
import subprocess
import sys

import pytest

from sharding.build_config import packed_by
from sharding.manifest import fingerprint, read_dataset
from sharding.packing import build_shards
from tests.helpers import BREAST_LAYOUT, copy_folders, encoded, write_tree

FIELD = "    encode: str = option(\n"
NEW_FIELDS = """    scanner: str = option("any", "a new flag whose default is what was done before")
    tidy: bool = option(True, "a new flag whose default is something new", old_default=False)
"""
LAYOUT = ["--layout", BREAST_LAYOUT]


@pytest.fixture
def changed(tmp_path):
    """A copy of the code with two flags more, which --append cannot change."""
    copy = tmp_path / "copy"
    copy_folders(copy, "sharding")
    path = copy / "sharding/build_config.py"
    text = path.read_text()
    assert text.count(FIELD) == 1 and text.count("FIXED_ARGUMENTS = (") == 1
    text = text.replace(FIELD, NEW_FIELDS + FIELD).replace("FIXED_ARGUMENTS = (", 'FIXED_ARGUMENTS = ("scanner", "tidy", ')
    path.write_text(text)
    return copy


@pytest.fixture
def old(tmp_path):
    """A set that was packed before; then an image more is there."""
    tree = write_tree(tmp_path / "in", {f"{'ab'[i % 2]}/s/x40/{i}.jpg": encoded(i) for i in range(8)})
    build_shards([tree], tmp_path / "old", layout=BREAST_LAYOUT)
    return tmp_path / "old"


def run(copy, *arguments):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, timeout=120, check=False)


def test_an_old_set_is_as_if_packed_with_the_old_default(tmp_path, changed, old):
    tree, as_it_was = tmp_path / "in", fingerprint(old)
    build = ["sharding/build.py", tree, "--out", old, *LAYOUT, "--workers", 1]
    refused = run(changed, *build)
    assert refused.returncode == 2
    assert "--tidy False, not True" in refused.stderr  # the default is another one now
    again = run(changed, *build, "--no-tidy")
    assert "already contains all" in again.stdout, again.stderr
    assert "--scanner any, not other" in run(changed, *build, "--no-tidy", "--scanner", "other").stderr
    assert fingerprint(old) == as_it_was

    (before,) = packed_by(old)
    show = "import sys; from sharding.build_config import commands_of; print(*commands_of(sys.argv[1]), sep='\\n')"
    assert "'--no-tidy'" in run(changed, "-c", show, old).stdout

    write_tree(tree, {"a/s/x40/new.jpg": encoded(99)})
    grown = run(changed, *build, "--no-tidy", "--append")
    assert "1 patch was added" in grown.stdout, grown.stderr
    dataset = read_dataset(old)
    assert "tidy" not in dataset["arguments"] and dataset["appended"][0]["arguments"]["tidy"] is False
    first, second = map(ast.literal_eval, run(changed, "-c", show, old).stdout.splitlines())
    assert (first.count("--no-tidy"), second.count("--no-tidy")) == (1, 1)
    assert "--scanner" not in first + second
    assert "tidy" not in before


def test_a_flag_whose_default_changes_nothing_appends_without_a_word(tmp_path, changed, old):
    path = changed / "sharding/build_config.py"
    path.write_text(path.read_text().replace("option(True, ", "option(False, "))
    write_tree(tmp_path / "in", {"a/s/x40/new.jpg": encoded(99)})
    done = run(changed, "sharding/build.py", tmp_path / "in", "--out", old, *LAYOUT, "--workers", 1, "--append")
    assert done.returncode == 0, done.stderr
