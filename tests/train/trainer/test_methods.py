"""What each method makes of a batch of outputs."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.ntxent import alignment_uniformity, embedding_std, nt_xent
from pipelines.recipes import get_recipe
from sharding.manifest import fingerprint
from sharding.packing import build_shards
from train.config import PretrainConfig
from train.records.data import Input, SetInput
from train.records.runs import Run
from train.trainer.loop import Job, fit
from train.trainer.methods import METHODS, RotNet, SimCLR, Supervised, build_method
from train.trainer.worker import single_worker

LABELS = torch.tensor([0, 2, 1, 2])


def outputs(views, width):
    return torch.randn(views, 4, width, generator=torch.Generator().manual_seed(0))


def test_simclr():
    method, z = SimCLR(projection_dim=8, temperature=0.2), outputs(2, 8)
    assert method.recipe == get_recipe("simclr")
    assert SimCLR(8, 0.2, recipe_name="simclr-mild").recipe == get_recipe("simclr-mild")
    assert method.build_head(32)(torch.zeros(3, 32)).shape == (3, 8)
    assert method.loss(z, LABELS, None) == nt_xent(z, 0.2)
    assert method.loss(z, LABELS, None) != nt_xent(z, 0.5)
    twins = torch.eye(4).expand(2, 4, 4)
    assert method.metrics(twins, LABELS, None)["top1"] == 1.0
    found = method.metrics(z, LABELS, None)
    assert (found["alignment"], found["uniformity"]) == alignment_uniformity(z)
    assert found["embedding_std"] == embedding_std(z)


def test_simclr_s_head_has_the_layers_asked_for():
    assert len(list(SimCLR(8, 0.2).build_head(32))) == 3
    assert len(list(SimCLR(8, 0.2, projection_layers=3).build_head(32))) == 8


def test_rotnet():
    """Every patch's view k is of class k: the mean over views and patches, and labels of patches play no part."""
    method, z = RotNet(), outputs(4, 4)
    assert method.recipe == get_recipe("rotnet") and RotNet("rotnet-jitter").recipe == get_recipe("rotnet-jitter")
    assert method.build_head(32)(torch.zeros(5, 32)).shape == (5, 4)
    wanted = torch.stack([-torch.log_softmax(z[turn, b], 0)[turn] for turn in range(4) for b in range(4)]).mean()
    torch.testing.assert_close(method.loss(z, LABELS, None), wanted)
    assert method.loss(z, LABELS, None) == method.loss(z, LABELS - 3, None)
    right = torch.eye(4)[:, None].repeat(1, 4, 1)
    assert method.metrics(right, LABELS, None) == {"rotation_accuracy": 1.0}
    right[2, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert method.metrics(right, LABELS, None)["rotation_accuracy"] == pytest.approx(15 / 16)


@pytest.mark.parametrize("views", [1, 2])
def test_supervised(views):
    """Mean over patches and views, each view with its patch's label."""
    method, z = Supervised(classes=3), outputs(views, 3)
    assert method.recipe.views == 1
    assert method.build_head(32)(torch.zeros(5, 32)).shape == (5, 3)
    wanted = torch.stack([nn.functional.cross_entropy(z[v, b], LABELS[b]) for v in range(views) for b in range(4)]).mean()
    torch.testing.assert_close(method.loss(z, LABELS, None), wanted)
    right = nn.functional.one_hot(LABELS, 3).float().expand(views, 4, 3).clone()
    right[0, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert method.metrics(right, LABELS, None)["train_accuracy"] == pytest.approx(1 - 1 / (4 * views))


# What they have in common


@pytest.mark.parametrize(
    ("method", "views"), [(SimCLR(8, 0.2), 2), (RotNet(), 4), (Supervised(classes=8), 1)], ids=["simclr", "rotnet", "supervised"]
)
def test_loss_of_a_model_that_tells_nothing_apart_is_the_chance_loss(method, views):
    """The same output for every view: neither a view's partner nor its class can be told."""
    width = 4 if isinstance(method, RotNet) else 8
    for patches in (2, 4):
        loss = method.loss(torch.ones(views, patches, width), LABELS[:patches], None)
        assert float(loss) == pytest.approx(method.chance_loss(patches), rel=1e-5)
    assert RotNet().chance_loss(64) == math.log(4)


@pytest.mark.parametrize("method", [SimCLR(8, 0.2), RotNet(), Supervised(classes=4)], ids=["simclr", "rotnet", "supervised"])
def test_losses_are_computed_in_float32_or_float64(method):
    z = outputs(method.recipe.views, 4)
    assert method.loss(z.bfloat16(), LABELS, None).dtype == torch.float32
    assert method.loss(z.double(), LABELS, None).dtype == torch.float64


# By name


def config_of(**changes):
    return dataclasses.replace(PretrainConfig(data="shards", name="run"), **changes)


def test_every_method_has_a_recipe_that_suits_it():
    assert {"simclr", "rotnet", "rotnet-jitter"} <= METHODS.keys()
    for name in METHODS:
        method = build_method(config_of(method=name))
        assert method.takes(method.recipe) and method.summary and method.needs
    assert build_method(config_of(method="rotnet-jitter")).recipe_name == "rotnet-jitter"


def test_a_method_that_is_not_registered_is_refused():
    with pytest.raises(ValueError, match="there is no --method byol: choose one of simclr, rotnet, rotnet-jitter"):
        build_method(config_of(method="byol"))


def test_every_recipe_is_for_some_method():
    choice, _ = typing.get_args(typing.get_type_hints(PretrainConfig)["recipe"])
    for recipe in typing.get_args(choice):
        assert any(method.from_config(config_of(recipe=recipe)).takes(get_recipe(recipe)) for method in METHODS.values()), recipe


def test_settings_reach_the_method():
    method = build_method(config_of(recipe="pathology", projection_dim=64, temperature=0.1, projection_layers=3))
    assert method == SimCLR(projection_dim=64, temperature=0.1, recipe_name="pathology", projection_layers=3)
    assert build_method(config_of(method="rotnet", recipe="rotnet-jitter")) == RotNet("rotnet-jitter")


@pytest.mark.parametrize(
    ("method", "recipe", "sentence"),
    [
        ("simclr", "rotnet", "--recipe rotnet does not suit --method simclr, which needs two random views of each patch"),
        (
            "rotnet",
            "simclr",
            "needs four views of each patch, one for each quarter turn: leave it out, or give rotnet or rotnet-j",
        ),
        ("rotnet-jitter", "pathology", "--recipe pathology does not suit --method rotnet-jitter"),
    ],
)
def test_a_recipe_that_a_method_cannot_learn_from_is_refused(method, recipe, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        build_method(config_of(method=method, recipe=recipe))
    assert "supervised" not in str(error.value) and "eval" not in str(error.value)


# In the loop


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["rotnet", "rotnet-jitter"])
def test_rotnet_learns_which_way_is_up(tmp_path, name):
    """Patches that are bright on top and dark below, through the loader and the loop: the turn is plain to see."""
    (tmp_path / "images").mkdir()
    for k in range(16):
        rows = np.linspace(255 - 4 * k, 10 + 2 * k, 32)[:, None, None]
        Image.fromarray(np.broadcast_to(rows, (32, 32, 3)).astype(np.uint8)).save(tmp_path / "images" / f"{k}.png")
    shards = tmp_path / "shards"
    build_shards([tmp_path / "images"], shards, unlabelled=True)
    job = Job(
        folder=tmp_path / "run",
        input=Input((SetInput(str(shards), fingerprint(shards), np.arange(16)),)),
        method=build_method(config_of(method=name)),
        backbone="test_efficientnet_ln",
        init="scratch",
        image_size=32,
        batch_size=8,
        epochs=15,
        optimizer="adam",
        peak_learning_rate=3e-3,
        weight_decay=0.0,
        warmup_epochs=1.0,
        precision="fp32",
        seed=1,
        threads=1,
        compile=False,
        log_every=30,
        checkpoint_every=1000,
        max_failures=0,
        card={},
    )
    job.folder.mkdir()
    fit(job, single_worker(job.folder, torch.device("cpu")))
    (row,) = Run(job.folder).metrics()
    assert row["loss"] < 0.5 * math.log(4)
    assert row["rotation_accuracy"] > 0.9
