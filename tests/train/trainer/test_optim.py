"""Learning rates by the step, and optimisers by name."""

import pytest
import torch
from torch import nn

from models.lars import LARS
from train.trainer.optim import build_optimizer, learning_rate, peak_learning_rate

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


def test_constant_is_constant_after_warm_up():
    rates = [learning_rate(step, **RUN, schedule="constant") for step in range(100)]
    assert rates[:10] == [learning_rate(step, **RUN) for step in range(10)]
    assert rates[10:] == [0.8] * 90
    assert {learning_rate(step, peak=5e-6, steps=9, warmup_steps=0, schedule="constant") for step in range(9)} == {5e-6}


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "rule", "rate"),
    [
        ("lars", 256, "linear", 0.3),
        ("lars", 1024, "linear", 1.2),
        ("sgd", 128, "linear", 0.15),
        ("lars", 256, "sqrt", 1.2),
        ("sgd", 64, "sqrt", 0.6),
        ("adam", 1024, "linear", 3e-4),
        ("adamw", 64, "linear", 3e-4),
    ],
)
def test_default_learning_rates(optimizer, batch_size, rule, rate):
    assert peak_learning_rate(None, optimizer=optimizer, batch_size=batch_size, rule=rule) == pytest.approx(rate)


def test_the_two_rules_meet_at_a_batch_of_4096():
    rates = [peak_learning_rate(None, optimizer="lars", batch_size=4096, rule=rule) for rule in ("linear", "sqrt")]
    assert rates == pytest.approx([4.8, 4.8])


@pytest.mark.parametrize("optimizer", ["lars", "adam"])
def test_a_given_rate_is_taken(optimizer):
    assert peak_learning_rate(5e-6, optimizer=optimizer, batch_size=1024, rule="linear") == 5e-6


@pytest.mark.parametrize(
    ("given", "optimizer", "rule", "sentence"),
    [
        (0.0, "lars", "linear", "--learning-rate 0 must be above 0"),
        (-1.0, "adam", "linear", "--learning-rate -1 must be above 0"),
        (float("nan"), "adam", "linear", "--learning-rate nan must be above 0"),
        (float("inf"), "sgd", "linear", "--learning-rate inf must be above 0 and finite"),
        (0.1, "lars", "sqrt", "--lr-rule sqrt is for the default rate of lars and sgd: leave it out with --learning-rate"),
        (None, "adamw", "sqrt", "leave it out with --optimizer adamw"),
    ],
)
def test_rates_and_rules_that_cannot_be_are_refused(given, optimizer, rule, sentence):
    with pytest.raises(ValueError, match=sentence):
        peak_learning_rate(given, optimizer=optimizer, batch_size=256, rule=rule)


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
