"""Two tiny shard sets: uneven noise of awkward sizes, and smooth drawn patches as training sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.plugin.numba import NumbaFunction
from PIL import Image

from sharding.drawn_patches.patches import draw_patch, encode
from sharding.packing import build_shards


@pytest.fixture(scope="session", autouse=True)
def _compile_once():
    """DALI compiles our step anew for every graph, a second each; these tests make many graphs."""
    originals = {name: getattr(NumbaFunction, name) for name in ("_get_run_fn_cpu", "_get_setup_fn_cpu")}
    for name, compile_function in originals.items():
        setattr(NumbaFunction, name, _kept(compile_function))
    yield
    for name, compile_function in originals.items():
        setattr(NumbaFunction, name, compile_function)


def _kept(compile_function):
    kept = {}

    def compile_or_reuse(self, function, *shapes):
        key = (function, repr(shapes))
        if key not in kept:
            kept[key] = compile_function(self, function, *shapes)
        return kept[key]

    return compile_or_reuse


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Threads that spin for each other are slow on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory) -> Path:
    """55 patches of 3 classes over 3 shards: JPEG and PNG, hardly one square, one of a single pixel, two of extreme shape."""
    folder = tmp_path_factory.mktemp("uneven")
    rng = np.random.default_rng(0)
    awkward = [(1, 1), (60, 3), (2, 50)]
    for i in range(55):
        width, height = awkward[i] if i < len(awkward) else rng.integers(20, 56, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        path = folder / "images" / ("benign", "종양", "in situ")[i % 3] / f"{i}.{'png' if i % 4 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
    summary = build_shards([folder / "images"], folder / "shards", shard_patches=19)
    assert (summary.packed, summary.shards) == (55, 3)
    return folder / "shards"


@pytest.fixture(scope="session")
def drawn_set(tmp_path_factory) -> Path:
    """24 drawn patches of 96 px, unlabelled: smooth, as stained tissue is."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "images").mkdir()
    for i in range(24):
        patch = draw_patch("kidney", None, index=i, slide=i % 3, size=96, seed=5)
        (folder / "images" / f"{i:02d}.jpg").write_bytes(encode(patch))
    build_shards([folder / "images"], folder / "shards", unlabelled=True)
    return folder / "shards"
