"""A new augmentation operation leaves alone what was made without it: embeddings, cached features and records of runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.recipes import RECIPES, describe_recipe
from tests.helpers import copy_folders
from train.config import EmbedConfig
from train.stages.embedding import embed

# Names of cached features, as they were before recipes left out defaults.
KEYS = {
    "simclr": "76bd11a1deb7c26646e41c8be44bb63a",
    "simclr-blur": "c464440ff56762cfe93851425133b2a8",
    "simclr-mild": "9cd46570914c848675565db608fab774",
    "pathology": "78ac40b069dbb87c73c8b772ec49e050",
    "rotnet": "ba06bd03a39b2838d9468f889d60a8b7",
    "rotnet-jitter": "bfc44b10954a62fe47140e59774dbf7e",
    "supervised": "41d2e1ec24da7c7abda2dc19e79530d3",
    "eval": "222a88518a8329737f48bbedd5d31e77",
    "eval-plain": "b2226688b21c57d31f8af9e370f33783",
}
# A new operation, and a new field of an old one.
CHANGES = {
    "    grey: float = 0.0\n": "    grey: float = 0.0\n    solarise: float = 0.0\n",
    "    strength: float\n": "    strength: float\n    probability: float = 1.0\n",
}
ASKED = """
import dataclasses, json, sys
import numpy as np
from pipelines.recipes import RECIPES, StainJitter, describe_recipe
from train.config import EmbedConfig
from train.stages.embedding import embed
from train.stages.feature_cache import FeaturePass, _key

def key(name):
    return _key(FeaturePass(None, "shards", "f" * 64, name, 64), "w" * 64, np.arange(5))

known = list(RECIPES)
RECIPES["solarised"] = dataclasses.replace(RECIPES["eval"], solarise=0.2)
RECIPES["rarely stained"] = dataclasses.replace(RECIPES["pathology"], stain=StainJitter(0.05, probability=0.5))
print(json.dumps({name: key(name) for name in RECIPES}))
print(json.dumps({name: describe_recipe(RECIPES[name]) for name in known}))
embed(EmbedConfig(**json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with the new fields."""
    folder = copy_folders(tmp_path_factory.mktemp("project"), "sharding", "pipelines", "models", "train")
    path = folder / "pipelines" / "recipes.py"
    text = path.read_text()
    for before, after in CHANGES.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    path.write_text(text)
    return folder


def test_what_was_made_without_it_is_found(project, small_set, tmp_path):
    """A finished embedding, the names of cached features, and the recipes' descriptions in run records."""
    settings = dict(data=str(small_set), backbone="scratch", architecture="test_resnet", image_size=32, threads=1)
    settings |= {"out": str(tmp_path / "out"), "storage": str(tmp_path / "runs"), "split": "test"}
    embed(EmbedConfig(**settings))
    environment = {**os.environ, "PYTHONPATH": str(project)}
    command = [sys.executable, "-c", ASKED, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    keys, described, *said = done.stdout.splitlines()
    keys = json.loads(keys)
    assert {name: keys[name] for name in KEYS} == KEYS
    assert keys["solarised"] != keys["eval"] and keys["rarely stained"] != keys["pathology"]
    assert json.loads(described) == json.loads(json.dumps({name: describe_recipe(recipe) for name, recipe in RECIPES.items()}))
    assert said[-1].endswith("finished already, 30 patches")
