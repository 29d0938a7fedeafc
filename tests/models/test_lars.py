import io

import numpy as np
import pytest
import torch
from torch import nn

from models.heads import ProjectionHead
from models.lars import LARS, describe_groups, parameter_groups


def google_lars(w, gradients, rates, *, momentum, decay, eeta, excluded):
    """lars_optimizer.py of google-research/simclr, apply_gradients with classic momentum, in NumPy."""
    w, v = w.copy(), np.zeros_like(w)
    for gradient, learning_rate in zip(gradients, rates, strict=True):
        grad = gradient.copy()
        if not excluded:
            grad += decay * w
        trust_ratio = 1.0
        if not excluded:
            w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(grad)
            trust_ratio = eeta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
        scaled_lr = learning_rate * trust_ratio
        next_v = momentum * v + scaled_lr * grad
        w, v = w - next_v, next_v
    return w


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).double()
    nn.init.zeros_(model[3].weight)  # a length of 0: the ratio must be 1, or it would never move
    return model


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_steps_are_those_of_the_published_formula(model, decay):
    rates = [0.5, 2.0, 1.0, 0.1, 0.0, 3.0]
    generator = np.random.default_rng(4)
    gradients = {name: [generator.normal(size=p.shape) for _ in rates] for name, p in model.named_parameters()}
    gradients["0.weight"][0][:] = 0  # without decay, a gradient of length 0
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = LARS(parameter_groups(model, decay), lr=1.0)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in model.named_parameters():
            p.grad = torch.tensor(gradients[name][step])
        optimizer.step()
    for name, p in model.named_parameters():
        excluded = p.ndim <= 1
        expected = google_lars(start[name], gradients[name], rates, momentum=0.9, decay=decay, eeta=0.001, excluded=excluded)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


def test_a_state_dict_goes_on_where_it_was(model):
    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    optimizer = LARS(parameter_groups(model, 1e-4), lr=0.3)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 2)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).double()
    again.load_state_dict(saved["model"])
    other = LARS(parameter_groups(again, 0.5), lr=7.0)
    other.load_state_dict(saved["optimizer"])
    assert [group["weight_decay"] for group in other.param_groups] == [1e-4, 0.0]
    train(again, other, 2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_are_left_alone_and_tensors_without_one_stay(model):
    optimizer = LARS(parameter_groups(model, 1e-2), lr=1.0)
    before = model[3].weight.detach().clone()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    assert (model[0].weight.grad == 1).all()
    assert torch.equal(model[3].weight, before)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, LARS])
def test_groups_suit_every_optimiser(model, optimizer):
    model[3].bias.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    built = optimizer(groups, lr=0.1)
    assert [group["name"] for group in built.param_groups] == ["weights", "biases and norms"]
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]
    assert [[p.ndim for p in group["params"]] for group in built.param_groups] == [[4, 2], [1, 1, 1]]
    assert describe_groups(built.param_groups, adapted=optimizer is LARS) == [
        "weights: 2 tensors, 188 numbers, weight decay 0.1" + ", layer adaptation on" * (optimizer is LARS),
        "biases and norms: 3 tensors, 12 numbers, weight decay 0" + ", layer adaptation off" * (optimizer is LARS),
    ]


def test_a_head_without_biases_has_one_group():
    assert [group["name"] for group in parameter_groups(ProjectionHead(8, 4), 0.1)] == ["weights"]


def test_what_a_user_did_wrong_is_said(model):
    with pytest.raises(ValueError, match=r"lr -1 must not be below 0"):
        LARS(model.parameters(), lr=-1)
    with pytest.raises(ValueError, match=r"momentum 1 must be at least 0 and below 1"):
        LARS(model.parameters(), lr=1, momentum=1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)
