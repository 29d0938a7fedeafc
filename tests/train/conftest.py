"""One thread for torch and for BLAS: tiny models gain nothing from more, and threads that wait for each other are slow on
busy cores. And a second shard set, for mixtures."""

from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

from sharding.packing import build_shards
from tests.helpers import encoded, write_tree


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def other_set(tmp_path_factory) -> Path:
    """24 unlabelled patches over 2 shards, all of the split train; the folder's name has an "=" in it."""
    folder = tmp_path_factory.mktemp("other")
    write_tree(folder / "images", {f"{i}.png": encoded(10_000 + i, format="PNG") for i in range(24)})
    build_shards([folder / "images"], folder / "size=16", unlabelled=True, shard_patches=12)
    return folder / "size=16"
