"""Heads trained step by step: against torch's layers, gradients and optimisers, alone and among others."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.sampler import epoch_order
from train.scoring import linear_heads
from train.scoring.linear_heads import PROTOCOLS, HeadTask, Protocol, TrainedHead, train_heads

LINEAR = Protocol("short", "adam", learning_rate=1e-2, batch_size=8, epochs=4)
MLP = dataclasses.replace(LINEAR, head="mlp")


def some_features(seed, n=80, width=12, classes=3, dtype=np.float64):
    """Features that know something of the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (rng.normal(size=(n, width)) + rng.normal(size=(classes, width))[labels]).astype(dtype), labels


def some_tasks():
    """Of different sizes and parts, seeds shared and not, in no order; the last batch of 8 is whole, of 1, and of 3."""
    rows = np.random.default_rng(5).permutation(80)
    parts = [
        (rows[:33], rows[60:]),
        (rows[:48], rows[50:61]),
        (rows[20:31], rows[:20]),
        (rows[:33], rows[70:]),
        (rows[:1], rows[1:2]),
    ]
    return [HeadTask(*part, seed=seed) for part, seed in zip(parts, (1, 2, 1, 3, 0), strict=True)]


def torchs(features, labels, task, protocol, classes=3):
    """As anyone would write it, with the same initial weights and orders: layers, best epoch and the losses."""
    widths = linear_heads._widths(features.shape[1], classes, protocol)
    modules = []
    for initial in linear_heads._initial(task.seed, widths, features.dtype):
        modules += [nn.ReLU()] * bool(modules) + [nn.Linear(*initial.weight.shape[::-1], dtype=torch.float64)]
        modules[-1].load_state_dict({name: torch.from_numpy(values) for name, values in initial._asdict().items()})
    head = nn.Sequential(*modules)
    weights = [parameter for parameter in head.parameters() if parameter.ndim == 2]
    biases = [parameter for parameter in head.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": protocol.weight_decay}, {"params": biases, "weight_decay": 0}]
    kind, more = {"adam": (torch.optim.Adam, {}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}[protocol.optimizer]
    optimizer = kind(groups, lr=protocol.learning_rate, **more)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    train, validation, layers = [], [], []
    for epoch in range(protocol.epochs):
        total = 0.0
        order = torch.from_numpy(epoch_order(task.rows, seed=task.seed, epoch=epoch))
        for rows in order.split(protocol.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(head(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        train.append(total / len(order))
        with torch.no_grad():
            validation.append(cross_entropy(head(x[task.validation]), y[task.validation]).item())
        layers.append([parameter.detach().numpy().copy() for parameter in head.parameters()])
    best = int(np.argmin(validation))
    return layers[best], best + 1, train, validation


def trained(features, labels, tasks, protocol, classes=3) -> list[TrainedHead]:
    return train_heads(features, labels, tasks, classes=classes, protocol=protocol, device="cpu")


def arrays_of(head):
    return [*(array for layer in head.layers for array in layer), head.train_loss, head.validation_loss, head.best_epoch]


def assert_close(head, other, **tolerance):
    for one, two in zip(arrays_of(head), arrays_of(other), strict=True):
        np.testing.assert_allclose(one, two, **tolerance)


# What is computed


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e-2), ("sgd", 0.05)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_is_what_torch_would_do(head, optimizer, rate, decay):
    """Gradients, optimisers, batches and losses at once, in float64, with last batches of 1 and of 3 rows."""
    features, labels = some_features(0)
    protocol = Protocol("short", optimizer, rate, batch_size=8, epochs=4, head=head, weight_decay=decay)
    tasks = some_tasks()
    for found, task in zip(trained(features, labels, tasks, protocol), tasks, strict=True):
        layers, best_epoch, train, validation = torchs(features, labels, task, protocol)
        assert (found.best_epoch, found.epochs_run) == (best_epoch, 4)
        for one, two in zip((array for layer in found.layers for array in layer), layers, strict=True):
            assert one.shape == two.shape
            np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.train_loss, train, rtol=1e-10)
        np.testing.assert_allclose(found.validation_loss, validation, rtol=1e-10)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_float32_follows_float64(name):
    features, labels = some_features(1, n=400, width=40)
    protocol = dataclasses.replace(PROTOCOLS[name], epochs=20, patience=None)
    task = HeadTask(np.arange(300), np.arange(300, 400), seed=7)
    (single,), (double,) = (trained(features.astype(dtype), labels, [task], protocol) for dtype in (np.float32, np.float64))
    assert single.layers[0].weight.dtype == np.float32
    np.testing.assert_allclose(single.validation_loss, double.validation_loss, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(single.probabilities(features), double.probabilities(features), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from(["linear", "mlp"]))
def test_an_epoch_sees_each_row_once(n, batch_size, head):
    """At a rate of 0 the losses of the rows stay what they were, and the mean is that of all rows, whatever the batches."""
    features, labels = some_features(2)
    protocol = Protocol("still", "sgd", 0.0, batch_size, epochs=3, head=head)
    task = HeadTask(np.arange(20, 20 + n), np.arange(5), seed=1)
    (found,) = trained(features, labels, [task], protocol)
    p = found.probabilities(features[task.rows])[np.arange(n), labels[task.rows]]
    np.testing.assert_allclose(found.train_loss, [-np.log(p).mean()] * 3, rtol=1e-10)
    assert found.best_epoch == 1  # the first of equals


@pytest.mark.parametrize("protocol", [LINEAR, MLP], ids=["linear", "mlp"])
def test_the_weights_are_those_of_the_lowest_validation_loss(protocol):
    features, labels = some_features(3)
    protocol = dataclasses.replace(protocol, optimizer="sgd", learning_rate=0.4, epochs=30)  # up and down
    tasks = some_tasks()[:4]
    best = set()
    for task, head in zip(tasks, trained(features, labels, tasks, protocol), strict=True):
        assert head.epochs_run == len(head.train_loss) == 30
        assert head.best_epoch == head.validation_loss.argmin() + 1
        p = head.probabilities(features[task.validation])
        assert p.shape == (len(task.validation), 3) and p.dtype == np.float64
        np.testing.assert_allclose(p.sum(1), 1)
        chosen = p[np.arange(len(p)), labels[task.validation]]
        assert -np.log(chosen).mean() == pytest.approx(head.validation_loss.min(), rel=1e-9)
        best.add(head.best_epoch)
    assert best != {1} and best != {30}


@pytest.mark.parametrize("protocol", [LINEAR, MLP], ids=["linear", "mlp"])
def test_patience_ends_the_training_of_each_head_for_itself(protocol):
    features, labels = some_features(0)
    protocol = dataclasses.replace(protocol, optimizer="sgd", learning_rate=0.2, epochs=40)
    tasks = some_tasks()[:4]
    patient = trained(features, labels, tasks, protocol)
    stopped = trained(features, labels, tasks, dataclasses.replace(protocol, patience=3))
    for whole, short in zip(patient, stopped, strict=True):
        worse = 0
        for epoch, loss in enumerate(whole.validation_loss, start=1):
            worse = 0 if loss < whole.validation_loss[: epoch - 1].min(initial=np.inf) else worse + 1
            if worse == 3:
                break
        assert short.epochs_run == epoch
        np.testing.assert_array_equal(short.validation_loss, whole.validation_loss[:epoch])
        assert short.best_epoch == short.validation_loss.argmin() + 1
    assert len({head.epochs_run for head in stopped}) > 1 and min(head.epochs_run for head in stopped) < 40


# Alone and among others


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_head_has_the_same_bits_whatever_others_are_trained(name, head):
    features, labels = some_features(5, width=33, dtype=np.float32)
    protocol = dataclasses.replace(PROTOCOLS[name], head=head, epochs=6, batch_size=16)
    tasks = some_tasks()
    among = trained(features, labels, tasks * 3, protocol)
    backwards = trained(features, labels, tasks[::-1], protocol)[::-1]
    for i, task in enumerate(tasks):
        (alone,) = trained(features, labels, [task], protocol)
        for other in (among[i], among[i + len(tasks)], backwards[i]):
            assert_close(other, alone, rtol=0, atol=0)


def test_threads_change_nothing():
    features, labels = some_features(6, dtype=np.float32)
    before = trained(features, labels, some_tasks(), LINEAR)
    torch.set_num_threads(3)
    try:
        after = trained(features, labels, some_tasks(), LINEAR)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(before, after, strict=True):
        assert_close(one, other, rtol=0, atol=0)


def test_how_rows_are_listed_changes_nothing_but_rounding():
    features, labels = some_features(7)
    task = some_tasks()[0]
    (found,), (other,) = (
        trained(features, labels, [each], LINEAR) for each in (task, HeadTask(task.rows[::-1], task.validation[::-1], task.seed))
    )
    assert_close(found, other, rtol=1e-12)


@pytest.mark.parametrize("protocol", [LINEAR, MLP], ids=["linear", "mlp"])
def test_only_its_own_rows_matter_to_a_task(protocol):
    """Not even where the others' scores overflow."""
    features, labels = some_features(8, dtype=np.float32)
    tasks = [HeadTask(np.arange(1, 34), np.arange(60, 70), seed=1), HeadTask(np.arange(10, 46), np.arange(50, 79), seed=2)]
    before = trained(features, labels, tasks, protocol)
    others = [0, *range(46, 50), 79]
    features[others], labels[others] = 3e38, -1
    for one, other in zip(before, trained(features, labels, tasks, protocol), strict=True):
        assert_close(one, other, rtol=0, atol=0)


# The initial weights


def test_initial_weights_are_drawn_as_torch_draws_them():
    (first, last) = linear_heads._initial(3, (900, 100, 40), np.dtype(np.float32))
    for layer, inputs in ((first, 900), (last, 100)):
        torchs_own = nn.Linear(inputs, len(layer.bias))
        assert layer.weight.shape == tuple(torchs_own.weight.shape) and layer.bias.shape == tuple(torchs_own.bias.shape)
        assert layer.weight.dtype == layer.bias.dtype == np.float32
        for array, theirs in zip(layer, (torchs_own.weight, torchs_own.bias), strict=True):
            assert np.abs(array).max() <= inputs**-0.5
            assert np.abs(array).max() == pytest.approx(theirs.abs().max().item(), rel=0.15)
        assert layer.weight.std() == pytest.approx(torchs_own.weight.std().item(), rel=0.05)
        assert abs(layer.weight.mean()) < 0.05 * inputs**-0.5
    assert abs(np.corrcoef(first.weight.ravel()[:4000] * 30, last.weight.ravel() * 10)[0, 1]) < 0.1
    other, _ = linear_heads._initial(4, (900, 100, 40), np.dtype(np.float32))
    assert abs(np.corrcoef(first.weight.ravel(), other.weight.ravel())[0, 1]) < 0.02


def test_initial_weights_are_those_of_published_results():
    """Pinned: whoever changes them changes every result."""
    (layer,) = linear_heads._initial(42, (4, 2), np.dtype(np.float64))
    np.testing.assert_allclose(layer.bias, [0.2248001762, -0.0044058673], atol=1e-9)
    np.testing.assert_allclose(layer.weight[0], [-0.0971992253, 0.2197380383, -0.2244706762, 0.4244541486], atol=1e-9)


# The published settings


def test_published_protocols():
    assert PROTOCOLS["adam"] == Protocol("adam", "adam", 3e-4, 64, 100, patience=None, head="linear", weight_decay=0)
    assert PROTOCOLS["sgd"] == Protocol("sgd", "sgd", 0.2, 256, 100, patience=10, head="linear", weight_decay=0)
    assert linear_heads._widths(2048, 5, PROTOCOLS["adam"]) == (2048, 5)
    assert linear_heads._widths(2048, 5, MLP) == (2048, 512, 5)
    assert linear_heads._widths(64, 5, MLP) == (64, 64, 5)


def test_an_mlp_learns_what_a_linear_head_cannot():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 8)).astype(np.float32)
    labels = (features[:, 0] * features[:, 1] > 0).astype(np.int64)
    task = HeadTask(np.arange(400), np.arange(400, 500), seed=0)
    right = {}
    for protocol in (LINEAR, MLP):
        (head,) = trained(features, labels, [task], dataclasses.replace(protocol, epochs=60), classes=2)
        right[protocol.head] = (head.probabilities(features[500:]).argmax(1) == labels[500:]).mean()
    assert right["linear"] < 0.65 and right["mlp"] > 0.75


# What goes wrong


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_features_that_are_no_numbers(number):
    features, labels = some_features(10)
    features[79, 3] = number
    with pytest.raises(ValueError, match="the features contain NaN or infinity"):
        trained(features, labels, some_tasks(), LINEAR)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_training_that_diverges_is_told(head):
    features, labels = some_features(11, dtype=np.float32)
    protocol = dataclasses.replace(PROTOCOLS["sgd"], head=head, learning_rate=1e30, epochs=3)
    with pytest.raises(ValueError, match="'sgd' diverged on these features"):
        trained(features * 1e20, labels, some_tasks(), protocol)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": np.arange(0)},
        {"validation": np.arange(0)},
        {"rows": np.array([3, 3])},
        {"rows": np.array([80])},
        {"validation": np.array([-1])},
    ],
)
def test_parts_must_be_rows_of_the_matrix(changes):
    features, labels = some_features(12)
    with pytest.raises(AssertionError, match="rows"):
        trained(features, labels, [dataclasses.replace(some_tasks()[0], **changes)], LINEAR)


def test_labels_must_be_of_the_classes():
    features, labels = some_features(13)
    with pytest.raises(AssertionError, match="labels"):
        trained(features, labels, some_tasks(), LINEAR, classes=2)
    assert trained(features, labels, [], LINEAR) == []
