"""Frozen features: each patch once, in order, from the cache the second time, by a backbone that stays as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from models.backbones import build_backbone
from models.weights import weights_hash
from pipelines.loader import ViewLoader
from pipelines.recipes import get_recipe
from pipelines.shard_reader import ShardReader
from sharding.manifest import fingerprint
from train.scoring import features
from train.scoring.features import compute_features
from train.stages import feature_cache
from train.stages.feature_cache import FeaturePass, WorkerOptions, frozen_features

EVAL = get_recipe("eval")


class MeanColour(nn.Module):
    """Three features that tell patches apart; counts how many images it was given."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.tensor(gain)), 0

    def forward(self, images):
        self.seen += len(images)
        return self.gain * images.mean(dim=(2, 3))


@pytest.fixture
def reader(small_set):
    return ShardReader(small_set)


def frozen(backbone, reader, ids, cache, **changes):
    what = {"recipe": "eval", "image_size": 16, "shards": str(reader.folder), "fingerprint": fingerprint(reader.folder)} | changes
    return frozen_features(FeaturePass(backbone, **what), ids, WorkerOptions(threads=1), cache=cache)


def by_hand(reader, ids, image_size=16):
    loader = ViewLoader(reader, ids, batch_size=1, image_size=image_size, recipe=EVAL, seed=0, threads=1, shuffle=False)
    return np.stack([batch.views[0, 0].mean(dim=(1, 2)).numpy() for batch in loader])


@pytest.mark.parametrize("batch", [128, 20, 7])
def test_each_patch_exactly_once_and_in_the_order_of_ids(reader, batch, monkeypatch):
    """Also where the last batch is a rest; 90 patches are in the set."""
    monkeypatch.setattr(features, "_BATCH", batch)
    ids = np.random.default_rng(0).permutation(90)[:75]
    backbone = MeanColour()
    found = compute_features(backbone, reader, ids, recipe=EVAL, image_size=16, threads=1)
    assert found.shape == (75, 3) and found.dtype == np.float32
    assert backbone.seen == 75
    np.testing.assert_allclose(found, by_hand(reader, ids), atol=1e-6)


def test_second_time_comes_from_the_cache(reader, tmp_path):
    backbone, ids = MeanColour(), np.arange(40)
    first = frozen(backbone, reader, ids, tmp_path / "cache")
    assert backbone.seen == 40
    again = MeanColour()
    np.testing.assert_array_equal(frozen(again, reader, ids, tmp_path / "cache"), first)
    assert again.seen == 0
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


@pytest.mark.parametrize("change", ["weights", "ids", "order", "recipe", "image_size", "data", "version"])
def test_anything_else_is_computed_anew(reader, tmp_path, change, monkeypatch):
    frozen(MeanColour(), reader, np.arange(10), tmp_path)
    other, ids, settings = MeanColour(2.0 if change == "weights" else 1.0), np.arange(10), {}
    if change == "ids":
        ids = np.arange(1, 11)
    if change == "order":
        ids = np.arange(9, -1, -1)
    if change == "recipe":
        settings["recipe"] = "eval-plain"
    if change == "image_size":
        settings["image_size"] = 24
    if change == "data":
        monkeypatch.setattr(feature_cache, "fingerprint", lambda folder: "other data")
        settings["fingerprint"] = "other data"
    if change == "version":
        monkeypatch.setattr(feature_cache, "FEATURES_VERSION", 99)
    found = frozen(other, reader, ids, tmp_path, **settings)
    assert other.seen == 10
    if change in ("ids", "order"):
        np.testing.assert_allclose(found, by_hand(reader, ids), atol=1e-6)


def test_backbone_stays_as_it_was(reader, tmp_path):
    """A backbone with batch norm, given in training mode: its weights and running statistics do not move."""
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet", 32).train()
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    before = weights_hash(backbone)
    found = frozen(backbone, reader, np.arange(24), tmp_path, image_size=32)
    assert weights_hash(backbone) == before
    assert found.shape == (24, backbone.num_features)
    alone = compute_features(backbone, reader, np.arange(3), recipe=EVAL, image_size=32, threads=1)
    np.testing.assert_allclose(found[:3], alone, atol=1e-5)  # batch norm looks at no other patch of the batch


def test_backbone_that_changes_is_caught(reader, tmp_path):
    class Drifting(MeanColour):
        def forward(self, images):
            self.gain.data += 1
            return super().forward(images)

    with pytest.raises(AssertionError, match="should have been frozen"):
        frozen(Drifting(), reader, np.arange(5), tmp_path)
    assert not list(tmp_path.iterdir())


def test_random_recipes_are_not_frozen(reader, tmp_path):
    with pytest.raises(AssertionError):
        frozen(MeanColour(), reader, np.arange(5), tmp_path, recipe="supervised")


@pytest.mark.parametrize("part", [7, 40, 90])
def test_parts_are_put_together_in_order(reader, tmp_path, monkeypatch, part):
    monkeypatch.setattr(feature_cache, "PART", part)
    ids, backbone = np.random.default_rng(1).permutation(90)[:40], MeanColour()
    np.testing.assert_allclose(frozen(backbone, reader, ids, tmp_path), by_hand(reader, ids), atol=1e-6)
    assert backbone.seen == 40 and len(list(tmp_path.iterdir())) == -(-40 // part)


def test_parts_that_were_computed_are_kept_when_another_fails(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "PART", 10)

    class Breaking(MeanColour):
        def forward(self, images):
            if self.seen >= 20:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        frozen(Breaking(), reader, np.arange(40), tmp_path)
    again = MeanColour()
    frozen(again, reader, np.arange(40), tmp_path)
    assert again.seen == 20


def test_a_set_that_was_changed_is_refused(reader, tmp_path):
    with pytest.raises(ValueError, match="this is not the shard set that the command started with"):
        frozen(MeanColour(), reader, np.arange(4), tmp_path, fingerprint="another")


def test_workers_give_the_same_features(ray_here, reader, tmp_path, monkeypatch):
    """Parts of 25 on three workers, and what a worker finds wrong is one sentence."""
    monkeypatch.setattr(feature_cache, "PART", 25)
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet", 32)
    what = FeaturePass(backbone, str(reader.folder), fingerprint(reader.folder), "eval", 32)
    found = frozen_features(what, np.arange(75), WorkerOptions(workers=3, threads=1), cache=tmp_path)
    alone = compute_features(backbone, reader, np.arange(75), recipe=EVAL, image_size=32, threads=1)
    np.testing.assert_allclose(found, alone, atol=1e-5)
    changed = FeaturePass(backbone, str(reader.folder), "another", "eval", 32)
    with pytest.raises(ValueError, match="this is not the shard set that the command started with"):
        frozen_features(changed, np.arange(75), WorkerOptions(workers=2, threads=1), cache=tmp_path)
