"""A new recipe is one entry in RECIPES: pretrain.py then offers it, accepts it, and still refuses wrong names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import assert_refused, copy_folders

ENTRY = '    "simclr-grey": dataclasses.replace(simclr(), grey=0.75),\n'
ACCEPTED = """
import numpy as np
from pipelines.views import draw_views
from sharding.cli import parse
from train.config import PretrainConfig
from train.trainer.methods import build_method

config = parse(PretrainConfig, ["--data", "x", "--name", "y", "--recipe", "simclr-grey"], prog="pretrain.py", description="")
recipe = build_method(config).recipe
print(draw_views(np.arange(1000), seed=1, epoch=0, recipe=recipe, sizes=np.full((1000, 2), 64)).grey.mean())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with one recipe more."""
    folder = copy_folders(tmp_path_factory.mktemp("project"), "sharding", "pipelines", "models", "train")
    path = folder / "pipelines" / "recipes.py"
    path.write_text(path.read_text().replace("RECIPES = {\n", "RECIPES = {\n" + ENTRY))
    return folder


def run(project: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(project), "COLUMNS": "140"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment, check=False)


def test_help_lists_it(project):
    done = run(project, "train/pretrain.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "simclr-grey" in done.stdout


def test_it_is_accepted_and_drawn(project):
    done = run(project, "-c", ACCEPTED)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.75, abs=0.05)


def test_a_wrong_name_is_refused(project):
    assert_refused(run(project, "train/pretrain.py", "--data", "x", "--name", "y", "--recipe", "simclr-gray"), "simclr-grey")


def test_the_command_line_imports_nothing_heavy(project):
    heavy = "print([name for name in ('torch', 'numpy', 'timm', 'ray') if name in sys.modules])"
    assert run(project, "-c", f"import sys, train.config; {heavy}").stdout == "[]\n"
