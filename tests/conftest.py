"""What all tests share: drawn shard sets, and one Ray for the whole run."""

import os
from pathlib import Path

import pytest

from sharding.packing import build_shards
from tests.helpers import breast_files, write_tree


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """A labelled shard set: 90 patches of 3 classes on 9 slides, over 3 shards, split 0.7/0.3 by slide."""
    folder = tmp_path_factory.mktemp("small")
    files = breast_files({"benign": 36, "종양 (tumour)": 30, "in situ": 24})
    write_tree(folder / "images", files)
    build_shards(
        [folder / "images"],
        folder / "shards",
        layout="{class}/{slide}/{magnification}/{name}",
        group_by="slide",
        split="train=0.7,test=0.3",
        shard_patches=30,
    )
    return folder / "shards"


@pytest.fixture(scope="session")
def ray_here():
    """One Ray of our own for the whole run, whatever else runs on this machine."""
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = "local"
    from train.workers import connect

    connect()
    import ray

    yield ray
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
