"""Classifiers on frozen features, trained step by step as published protocols have it: hundreds on one feature matrix.

For comparison with a paper's numbers; `train.scoring.logistic` finds the best linear classifier outright. Features are not
standardised, as published.

Each task (a fraction of the labels and a seed) is trained as if it were alone. There are two implementations:

- Linear heads on the CPU, the usual case, are compiled loops (train/scoring/compiled_heads.py), a task per thread. Heads that are
  stacked and multiplied by `baddbmm` took 10 times as long (20 heads of 2,048 features and 3 classes, one thread), because each
  of thousands of small steps copies its rows out of the feature matrix. Their last digits differ too.
- Perceptrons, whose time goes into products of matrices, are stacks of heads in torch, with its optimisers: one at a time on the
  CPU, together on a GPU.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch.nn.functional import log_softmax

from pipelines.sampler import epoch_order, steps_per_epoch
from sharding.philox import uniforms
from train.scoring.compiled_heads import BETAS, EPSILON, MOMENTUM, Layer, linear_epoch, linear_loss

# N rows of the feature matrix, n that a task learns from, m that it is validated on, F features, K classes, T heads in a stack,
# B rows in a batch, S steps in an epoch, E epochs

MOST_HIDDEN = 512
_STACK_BYTES = 2**31  # of heads on a GPU and what a step of theirs needs, beside the features


@dataclass(frozen=True)
class Protocol:
    """How a head is trained: cross-entropy in batches of `batch_size`, the last one of an epoch being what is left.

    optimizer: adam, or sgd with momentum 0.9; learning_rate is constant. After each epoch the validation loss is taken, and
    the weights kept are those of the epoch where it was lowest, the first of equals. patience: so many epochs without a lower
    one end the training; None: all epochs are run.
    head: linear, or mlp: a hidden layer of as many units as features but 512 at most, ReLU, and a linear layer; wider ones
    cost more than the backbones that they judge. weight_decay: as in torch.optim, on weights and not on biases.
    """

    name: str
    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    batch_size: int
    epochs: int
    patience: int | None = None
    head: Literal["linear", "mlp"] = "linear"
    weight_decay: float = 0.0


# With another head: dataclasses.replace(PROTOCOLS["adam"], head="mlp").
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("adam", "adam", learning_rate=3e-4, batch_size=64, epochs=100),
        Protocol("sgd", "sgd", learning_rate=0.2, batch_size=256, epochs=100, patience=10),
    )
}


@dataclass(frozen=True)
class HeadTask:
    """What one head is trained on. rows: (n,) and validation: (m,) int64, rows of the feature matrix, each at most once.

    seed: of the initial weights and of the order of every epoch.
    """

    rows: np.ndarray = field(repr=False)
    validation: np.ndarray = field(repr=False)
    seed: int


@dataclass(frozen=True)
class TrainedHead:
    """The weights of the best epoch, and how it came to them.

    layers: with ReLU between them; best_epoch: counted from 1; train_loss: (E,), the mean over an epoch's rows, each as its
    batch found the head; validation_loss: (E,), at the end of each epoch. Both in nats, for the epochs that were run.
    """

    layers: tuple[Layer, ...] = field(repr=False)
    best_epoch: int
    train_loss: np.ndarray = field(repr=False)
    validation_loss: np.ndarray = field(repr=False)

    @property
    def epochs_run(self) -> int:
        return len(self.validation_loss)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(n, F) features -> (n, K) float64 class probabilities."""
        x = features.astype(np.float64)
        for layer in self.layers[:-1]:
            x = np.maximum(x @ layer.weight.T.astype(np.float64) + layer.bias, 0)
        return softmax(x @ self.layers[-1].weight.T.astype(np.float64) + self.layers[-1].bias, axis=1)


def train_heads(
    features_NF: np.ndarray,
    labels_N: np.ndarray,
    tasks: Iterable[HeadTask],
    *,
    classes: int,
    protocol: Protocol,
    device: str | None = None,
) -> list[TrainedHead]:
    """A head for each task, in their order, each a function of (features, labels, its task, protocol) alone.

    features_NF: float32, or float64, in which everything is then computed; labels_N: from 0 to classes - 1 in the rows that
    tasks name. device: "cpu" or "cuda"; None: the CPU for linear heads, for an mlp a GPU where there is one.
    On the CPU a head has the same bits whatever other tasks there are. On a GPU, where heads are stacked, it is the same but
    for rounding. So are the two devices.
    Raises ValueError for features that are no numbers, and where no epoch of a task had a validation loss that is a number.
    """
    tasks = list(tasks)
    assert features_NF.ndim == 2 and features_NF.dtype in (np.float32, np.float64), (features_NF.shape, features_NF.dtype)
    assert len(features_NF) == len(labels_N) and protocol.epochs > 0 and protocol.batch_size > 0, protocol
    for task in tasks:
        assert len(task.rows) and len(task.validation), "both parts need rows"
        for rows in (task.rows, task.validation):
            assert len(np.unique(rows)) == len(rows) and 0 <= rows.min() <= rows.max() < len(features_NF), "rows of the matrix"
            assert 0 <= labels_N[rows].min() <= labels_N[rows].max() < classes, "labels of the classes"
    if not np.isfinite(features_NF).all():
        raise ValueError("the features are not all finite numbers: the backbone's training diverged, so take an earlier one")
    features_NF, labels_N = np.ascontiguousarray(features_NF), np.ascontiguousarray(labels_N, np.int64)
    if device is None:
        device = "cuda" if protocol.head == "mlp" and torch.cuda.is_available() else "cpu"
    if protocol.head == "linear" and device == "cpu":
        found = _compiled(features_NF, labels_N, tasks, classes, protocol)
    else:
        # One at a time on the CPU: a head's products of matrices are large enough there, and its bits depend on no other's.
        widths = _widths(features_NF.shape[1], classes, protocol)
        most = 1 if device == "cpu" else _heads_at_once(widths, features_NF.itemsize, protocol.batch_size)
        found = _stacked(features_NF, labels_N, tasks, classes, protocol, device, most)
    if any(head.best_epoch == 0 for head in found):
        raise ValueError(
            f"the protocol {protocol.name!r} diverged on these features: no epoch had a validation loss that is a number. Take"
            " another protocol, or a lower learning rate"
        )
    return found


def _initial(seed: int, widths: tuple[int, ...], dtype: np.dtype) -> tuple[Layer, ...]:
    """Weights and biases of a layer between each two widths, uniform within 1 / sqrt(inputs): as torch.nn.Linear draws them."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        count = (inputs + 1) * outputs
        # The layers are the stream's epochs.
        drawn = uniforms(np.arange(-(-count // 4)), 4, seed=seed, stream="head", epoch=number).ravel()[:count]
        values = ((2 * drawn - 1) / np.sqrt(inputs)).astype(dtype)
        layers.append(Layer(values[outputs:].reshape(outputs, inputs), values[:outputs]))
    return tuple(layers)


def _widths(features: int, classes: int, protocol: Protocol) -> tuple[int, ...]:
    return (features, min(features, MOST_HIDDEN), classes) if protocol.head == "mlp" else (features, classes)


class _LossHistory:
    """The losses of T heads so far, the best epoch of each, and which are still in training."""

    def __init__(self, heads: int, patience: int | None):
        self.patience = patience
        self.running = np.ones(heads, bool)
        self.best_epoch, self._lowest = np.zeros(heads, int), np.full(heads, np.inf)
        self._losses: list[list[tuple[float, float]]] = [[] for _ in range(heads)]

    def add(self, epoch: int, train_T: np.ndarray, validation_T: np.ndarray) -> np.ndarray:
        """(T,) bool, whose weights are the best so far. epoch: counted from 1. Heads that have stopped are ignored."""
        for i in np.flatnonzero(self.running):
            self._losses[i].append((train_T[i], validation_T[i]))
        better = self.running & (validation_T < self._lowest)
        self._lowest[better], self.best_epoch[better] = validation_T[better], epoch
        if self.patience is not None:
            self.running &= epoch - self.best_epoch < self.patience
        return better

    def head(self, i: int, layers: tuple[Layer, ...]) -> TrainedHead:
        train, validation = np.array(self._losses[i]).T
        return TrainedHead(layers, int(self.best_epoch[i]), train, validation)


# ---- Linear heads on the CPU ----


def _compiled(features_NF, labels_N, tasks, classes, protocol) -> list[TrainedHead]:
    def train(task):
        return _compiled_one(features_NF, labels_N, task, classes, protocol)

    found: dict[int, TrainedHead] = {}
    longest_first = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].rows))  # so that no thread is left with one at the end
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the loops run without Python's lock
        found = dict(zip(longest_first, pool.map(train, [tasks[i] for i in longest_first]), strict=True))
    return [found[i] for i in range(len(tasks))]


def _compiled_one(features_NF, labels_N, task: HeadTask, classes: int, protocol: Protocol) -> TrainedHead:
    dtype = features_NF.dtype
    (best,) = _initial(task.seed, _widths(features_NF.shape[1], classes, protocol), dtype)
    layer = Layer(best.weight.copy(), best.bias.copy())
    slope, first, second = (Layer(np.zeros_like(layer.weight), np.zeros_like(layer.bias)) for _ in range(3))
    settings = (protocol.optimizer == "adam", protocol.batch_size, protocol.learning_rate, protocol.weight_decay)
    history, steps = _LossHistory(1, protocol.patience), 0
    for epoch in range(protocol.epochs):
        order = epoch_order(task.rows, seed=task.seed, epoch=epoch)
        train = linear_epoch(features_NF, labels_N, order, layer, slope, first, second, steps, *settings)
        steps += steps_per_epoch(len(order), protocol.batch_size, drop_last=False)
        validation = linear_loss(features_NF, labels_N, task.validation, layer)
        if history.add(epoch + 1, np.array([train]), np.array([validation])).any():
            best = Layer(layer.weight.copy(), layer.bias.copy())
        if not history.running.any():
            break
    return history.head(0, (best,))


# ---- Stacks of heads in torch ----


class _Stacked(NamedTuple):
    """A layer of T heads: x -> x @ weight + bias. weight: (T, inputs, outputs); bias: (T, 1, outputs)."""

    weight: torch.Tensor
    bias: torch.Tensor


def _stacked(features_NF, labels_N, tasks, classes, protocol, device, most) -> list[TrainedHead]:
    widths = _widths(features_NF.shape[1], classes, protocol)
    features, labels = torch.tensor(features_NF, device=device), torch.tensor(labels_N, device=device)
    found: dict[int, TrainedHead] = {}
    for stack in _stacks(tasks, most, protocol.batch_size):
        initial = [_initial(tasks[i].seed, widths, features_NF.dtype) for i in stack]
        heads = _stack(features, labels, [tasks[i] for i in stack], initial, protocol)
        found |= zip(stack, heads, strict=True)
    return [found[i] for i in range(len(tasks))]


def _heads_at_once(widths: tuple[int, ...], itemsize: int, batch_size: int) -> int:
    parameters = sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    # Of each parameter its slope, two moments, a temporary and the best so far; of a batch inputs, outputs and slopes.
    return max(_STACK_BYTES // (itemsize * (6 * parameters + 3 * batch_size * sum(widths))), 1)


def _stacks(tasks: list[HeadTask], most: int, batch_size: int) -> Iterator[list[int]]:
    """Numbers of tasks that have equally many steps in an epoch, `most` at a time."""
    alike = defaultdict(list)
    for i, task in enumerate(tasks):
        alike[steps_per_epoch(len(task.rows), batch_size, drop_last=False)].append(i)
    for numbers in alike.values():
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


def _stack(features, labels, tasks: list[HeadTask], initial: list[tuple[Layer, ...]], protocol) -> list[TrainedHead]:
    """Heads whose steps are taken together. Those that have stopped early are still computed, and ignored."""
    device, size = features.device, protocol.batch_size
    layers = [
        _Stacked(_leaf([layer.weight.T for layer in same], device), _leaf([layer.bias[None] for layer in same], device))
        for same in zip(*initial, strict=True)
    ]
    parameters = [parameter for layer in layers for parameter in layer]
    best = [parameter.detach().clone() for parameter in parameters]
    optimizer = _optimizer(layers, protocol)
    validation_TM, counted_TM = _padded([task.validation for task in tasks], device)
    history = _LossHistory(len(tasks), protocol.patience)
    for epoch in range(protocol.epochs):
        orders = [epoch_order(task.rows, seed=task.seed, epoch=epoch) for task in tasks]
        train_T = torch.zeros(len(tasks), dtype=torch.float64, device=device)
        for rows_TB, counted_TB in _batches(*_padded(orders, device), size):
            losses_TB = _losses(features[rows_TB], labels[rows_TB], layers) * counted_TB
            optimizer.zero_grad()
            (losses_TB.sum(1) / counted_TB.sum(1)).sum().backward()  # no head's loss depends on another's weights
            optimizer.step()
            train_T += losses_TB.detach().sum(1)
        validation_T = torch.zeros_like(train_T)
        with torch.no_grad():
            for rows_TB, counted_TB in _batches(validation_TM, counted_TM, size):
                validation_T += (_losses(features[rows_TB], labels[rows_TB], layers) * counted_TB).sum(1)
        train = train_T.cpu().numpy() / [len(order) for order in orders]
        validation = validation_T.cpu().numpy() / [len(task.validation) for task in tasks]
        better = torch.from_numpy(history.add(epoch + 1, train, validation)).to(device)
        for kept, now in zip(best, parameters, strict=True):
            kept[better] = now.detach()[better]
        if not history.running.any():
            break
    arrays = [parameter.cpu().numpy() for parameter in best]
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    return [
        history.head(i, tuple(Layer(weight[i].T.copy(), bias[i, 0].copy()) for weight, bias in pairs)) for i in range(len(tasks))
    ]


def _leaf(arrays, device) -> torch.Tensor:
    # Contiguous, as the slopes come: else the optimiser copies one or the other at every step.
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays))).to(device).requires_grad_()


def _optimizer(layers, protocol: Protocol) -> torch.optim.Optimizer:
    """For a stack as for a single head: what either does to a weight depends on that weight alone."""
    groups = [
        {"params": [layer.weight for layer in layers], "weight_decay": protocol.weight_decay},
        {"params": [layer.bias for layer in layers], "weight_decay": 0.0},
    ]
    if protocol.optimizer == "adam":
        return torch.optim.Adam(groups, lr=protocol.learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    return torch.optim.SGD(groups, lr=protocol.learning_rate, momentum=MOMENTUM, fused=True)


def _padded(rows: list[np.ndarray], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, longest) rows, the last one repeated for what is not there, and which of them count.

    A task's own row, because another's might overflow with its weights, and nought times infinity is no number.
    """
    longest = max(len(of_head) for of_head in rows)
    padded = np.stack([np.pad(of_head, (0, longest - len(of_head)), mode="edge") for of_head in rows]).astype(np.int64)
    counted = np.arange(longest) < np.array([[len(of_head)] for of_head in rows])
    return torch.from_numpy(padded).to(device), torch.from_numpy(counted).to(device)


def _batches(rows_TM: torch.Tensor, counted_TM: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, rows_TM.shape[1], size):
        yield rows_TM[:, start : start + size], counted_TM[:, start : start + size]


def _losses(x_TBF: torch.Tensor, labels_TB: torch.Tensor, layers) -> torch.Tensor:
    """(T, B) cross-entropies, in nats."""
    for layer in layers[:-1]:
        x_TBF = torch.baddbmm(layer.bias, x_TBF, layer.weight).relu()
    scores_TBK = torch.baddbmm(layers[-1].bias, x_TBF, layers[-1].weight)
    return -log_softmax(scores_TBK, dim=-1).gather(-1, labels_TB[..., None])[..., 0]
