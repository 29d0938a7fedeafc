"""Learning rates by the step, and optimisers by name."""

import pytest
import torch
from torch import nn

from models.lars import LARS
from train.schedules import build_optimizer, default_learning_rate, learning_rate

RUN = {"peak": 0.8, "steps": 100, "warmup_steps": 10}


def test_warm_up_is_linear_and_ends_at_the_peak():
    rates = [learning_rate(step, **RUN) for step in range(11)]
    assert rates[:10] == pytest.approx([0.08 * (step + 1) for step in range(10)])
    assert rates[9] == rates[10] == pytest.approx(0.8)


def test_half_a_cosine_follows():
    assert learning_rate(55, **RUN) == pytest.approx(0.4)
    assert learning_rate(10 + 30, **RUN) == pytest.approx(0.6)  # a third of the way: cos 60 degrees is a half
    assert learning_rate(100, **RUN) == pytest.approx(0.0, abs=1e-12)
    assert 0 < learning_rate(99, **RUN) < 0.001
    rates = [learning_rate(step, **RUN) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_it_is_a_function_of_the_step_alone():
    """Asked in any order, and again."""
    steps = [70, 3, 99, 3, 0, 70]
    once = {step: learning_rate(step, **RUN) for step in range(100)}
    assert [learning_rate(step, **RUN) for step in steps] == [once[step] for step in steps]


def test_without_warm_up_and_with_one_step():
    assert learning_rate(0, peak=0.5, steps=10, warmup_steps=0) == 0.5
    assert learning_rate(0, peak=0.5, steps=1, warmup_steps=0) == 0.5
    assert learning_rate(0, peak=0.5, steps=1, warmup_steps=1) == 0.5
    assert learning_rate(3, peak=0.5, steps=4, warmup_steps=4) == 0.5


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "rate"),
    [("lars", 256, 0.3), ("lars", 1024, 1.2), ("sgd", 128, 0.15), ("adam", 1024, 3e-4), ("adamw", 64, 3e-4)],
)
def test_default_learning_rates(optimizer, batch_size, rate):
    assert default_learning_rate(optimizer, batch_size) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "kind"), [("lars", LARS), ("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimisers_take_every_parameter_and_decay_weights_alone(name, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(name, model, weight_decay=0.1, fused=False)
    assert type(optimizer) is kind
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {n: decays[id(p)] for n, p in model.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "3.weight": 0.1, "3.bias": 0.0,
    }  # fmt: skip
    if name == "sgd":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
