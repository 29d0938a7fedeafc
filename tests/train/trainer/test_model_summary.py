"""What is said of a run before it starts, and what is refused then."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.backbones import build_backbone
from train.records.data import Input, SetInput
from train.trainer.loop import Job
from train.trainer.methods import RotNet, SimCLR
from train.trainer.model_summary import describe_model, describe_rate

SIMCLR = SimCLR(projection_dim=8, temperature=0.5)


def describe(method=SIMCLR, *, backbone="test_resnet", init="scratch"):
    return describe_model(method, backbone=backbone, image_size=32, init=init, weight_decay=1e-6, optimizer="lars")


def test_weights_and_groups_are_said():
    backbone = build_backbone("test_resnet", 32)
    features = backbone.num_features
    kernels = [p.numel() for p in backbone.parameters() if p.ndim > 1] + [features * features, 8 * features]
    rest = [p.numel() for p in backbone.parameters() if p.ndim <= 1]
    assert describe() == [
        "test_resnet: random weights",
        f"head: random weights, {features * features + 8 * features:,} numbers",
        f"weights: {len(kernels)} tensors, {sum(kernels):,} numbers, weight decay 1e-06, layer adaptation on",
        f"biases and norms: {len(rest)} tensors, {sum(rest):,} numbers, weight decay 0, layer adaptation off",
    ]
    assert describe(RotNet())[1] == f"head: random weights, {4 * features + 4:,} numbers"


def test_what_was_not_loaded_of_a_file_is_said(tmp_path):
    state = build_backbone("test_resnet", 32).state_dict()
    torch.save(state | {"fc.weight": torch.zeros(3, 4), "projector.weight": torch.zeros(1)}, tmp_path / "theirs.pth")
    assert describe(init=str(tmp_path / "theirs.pth"))[:3] == [
        f"{tmp_path}/theirs.pth: {len(state)} tensors loaded",
        "1 tensors of the file's classification head ignored: fc.weight",
        "1 tensors of the file not used by this backbone: projector.weight",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": "test_resnett"}, r"test_resnett.*is not known to timm"),
        ({"backbone": "inception_v3"}, "inception_v3 cannot take images of 32 px"),
        ({"method": SimCLR(projection_dim=0, temperature=0.5)}, "projection_dim 0"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        describe(**changes)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not match this backbone"):
        describe(init=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "lars: learning rate 0.3, 0.2 epochs of warm-up, then half a cosine down to 0"),
        ({"schedule": "constant"}, "lars: learning rate 0.3, 0.2 epochs of warm-up, then constant"),
        (
            {"optimizer": "adam", "peak_learning_rate": 5e-6, "warmup_epochs": 0.0, "schedule": "constant"},
            "adam: learning rate 5e-06, constant",
        ),
    ],
)
def test_the_rate_s_course_is_said(changes, line):
    settings = {
        "folder": Path("never written"),
        "input": Input((SetInput("never read", "f", np.arange(8)),)),
        "method": SIMCLR,
        "backbone": "test_resnet",
        "init": "scratch",
        "image_size": 32,
        "batch_size": 4,
        "epochs": 2,
        "optimizer": "lars",
        "peak_learning_rate": 0.3,
        "weight_decay": 1e-6,
        "warmup_epochs": 0.2,
        "precision": "fp32",
        "seed": 3,
        "threads": 1,
        "compile": False,
        "log_every": 1,
        "checkpoint_every": 0,
        "max_failures": 0,
        "card": {},
    }
    assert describe_rate(Job(**(settings | changes))) == line
