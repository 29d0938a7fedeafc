"""What `ray submit` does to a script: it copies that one file into a home, runs it there, and cuts its arguments at blanks."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, assert_refused


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("sharding/build.py", "/images/of ours --out /shards --zip /more of them"),
        ("train/pretrain.py", "--data /shards of ours"),
        ("train/evaluate.py", "--data /shards of ours"),
        ("tune/grid.py", "/studies/of ours.yaml"),
    ],
)
def test_a_copied_script_finds_the_project_and_says_what_became_of_a_blank(script, arguments, tmp_path):
    copy = shutil.copy(ROOT / script, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HOME": str(tmp_path)}
    command = [sys.executable, copy, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False)
    assert_refused(done, "unrecognized arguments", "cuts arguments at spaces", "--config")
