"""Classifiers on frozen features, trained by SGD or Adam as in published protocols: hundreds on one feature matrix.

They serve to compare with a paper's numbers; `train.scoring.logistic` finds the best linear classifier directly. As published,
features are not standardised.

Each task (a fraction of the labels and a seed) is trained separately. There are two implementations:

- Linear heads, the usual case, are compiled loops on the CPU (train/scoring/compiled_heads.py), one task per thread. torch took
  10 times as long (20 heads of 2,048 features and 3 classes, one thread), because each of thousands of small steps copies its
  rows out of the feature matrix. Its last digits differ too.
- MLP heads, which spend their time in matrix products, are trained by torch, one after another.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from scipy.special import softmax
from torch.nn.functional import cross_entropy

from pipelines.sampler import epoch_order, steps_per_epoch
from sharding.philox import uniforms
from train.scoring.compiled_heads import BETAS, EPSILON, MOMENTUM, Layer, linear_epoch, linear_loss

# N rows of the feature matrix, n that a task learns from, m that it is validated on, F features, K classes, B rows in a
# batch, E epochs

MOST_HIDDEN = 512


@dataclass(frozen=True)
class Protocol:
    """How a head is trained: cross-entropy in batches of `batch_size`, the last one of an epoch being what is left.

    optimizer: adam, or sgd with momentum 0.9; learning_rate is constant. After each epoch the validation loss is taken, and
    the weights kept are those of the epoch where it was lowest, the first of equals. patience: training ends
    after this many epochs without a lower one; None: all epochs are run.
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
    tasks name. device: "cpu" or "cuda", of an mlp; None: a GPU if there is one. Linear heads are trained on the CPU.
    A head has the same bits whatever other tasks there are; on another device it is the same but for rounding.
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
        raise ValueError("the features contain NaN or infinity: the backbone's training diverged, so use an earlier one")
    features_NF, labels_N = np.ascontiguousarray(features_NF), np.ascontiguousarray(labels_N, np.int64)
    widths = _widths(features_NF.shape[1], classes, protocol)

    def initial(task: HeadTask) -> tuple[Layer, ...]:
        return _initial(task.seed, widths, features_NF.dtype)

    if protocol.head == "linear":
        train = functools.partial(_train_compiled, features_NF, labels_N, protocol=protocol)
        longest_first = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].rows))  # so that no thread is left with one
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the loops run without Python's lock
            futures = {i: pool.submit(train, tasks[i], initial(tasks[i])) for i in longest_first}
        found = [futures[i].result() for i in range(len(tasks))]
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        features, labels = torch.tensor(features_NF, device=device), torch.tensor(labels_N, device=device)
        found = [_train_in_torch(features, labels, task, initial(task), protocol) for task in tasks]
    if any(head.best_epoch == 0 for head in found):
        raise ValueError(
            f"the protocol {protocol.name!r} diverged on these features, with a validation loss of NaN in every epoch: use"
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


def _train_epochs(
    task: HeadTask,
    protocol: Protocol,
    train_epoch: Callable[[np.ndarray], tuple[float, float]],
    current_layers: Callable[[], tuple[Layer, ...]],
) -> TrainedHead:
    """Train a head, and keep the layers of its best epoch.

    train_epoch: takes the rows in an epoch's order; returns the training and the validation loss. current_layers: copies them.
    """
    best, best_epoch, losses = current_layers(), 0, []
    for epoch in range(1, protocol.epochs + 1):
        losses.append(train_epoch(epoch_order(task.rows, seed=task.seed, epoch=epoch - 1)))
        if losses[-1][1] < (losses[best_epoch - 1][1] if best_epoch else np.inf):
            best, best_epoch = current_layers(), epoch
        if protocol.patience is not None and epoch - best_epoch >= protocol.patience:
            break
    train, validation = np.array(losses).T
    return TrainedHead(best, best_epoch, train, validation)


def _train_compiled(features_NF, labels_N, task: HeadTask, initial: tuple[Layer, ...], protocol: Protocol) -> TrainedHead:
    """A linear head on the CPU."""
    (layer,) = initial
    slope, first, second = (Layer(np.zeros_like(layer.weight), np.zeros_like(layer.bias)) for _ in range(3))
    settings = (protocol.optimizer == "adam", protocol.batch_size, protocol.learning_rate, protocol.weight_decay)
    steps = 0

    def train_epoch(order):
        nonlocal steps
        train = linear_epoch(features_NF, labels_N, order, layer, slope, first, second, steps, *settings)
        steps += steps_per_epoch(len(order), protocol.batch_size, drop_last=False)
        return train, linear_loss(features_NF, labels_N, task.validation, layer)

    return _train_epochs(task, protocol, train_epoch, lambda: (Layer(layer.weight.copy(), layer.bias.copy()),))


def _train_in_torch(features_NF, labels_N, task: HeadTask, initial: tuple[Layer, ...], protocol: Protocol) -> TrainedHead:
    """A head of any layers, on the device of the features and labels, which are tensors."""
    device = features_NF.device
    # Contiguous, as the gradients are: else the optimiser copies one or the other at every step.
    weights = [torch.from_numpy(layer.weight.T.copy()).to(device).requires_grad_() for layer in initial]
    biases = [torch.from_numpy(layer.bias.copy()).to(device).requires_grad_() for layer in initial]
    groups = [{"params": weights, "weight_decay": protocol.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if protocol.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=protocol.learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=protocol.learning_rate, momentum=MOMENTUM, fused=True)

    def batch_losses(rows: np.ndarray) -> Iterator[torch.Tensor]:
        """The (B,) cross-entropies of each batch, in nats."""
        for rows_B in torch.from_numpy(rows).to(device).split(protocol.batch_size):
            x_BF = features_NF[rows_B]
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                x_BF = torch.addmm(bias, x_BF, weight).relu()
            scores_BK = torch.addmm(biases[-1], x_BF, weights[-1])
            yield cross_entropy(scores_BK, labels_N[rows_B], reduction="none")

    def train_epoch(order: np.ndarray) -> tuple[float, float]:
        train = validation = torch.zeros((), dtype=torch.float64, device=device)
        for losses_B in batch_losses(order):
            optimizer.zero_grad()
            losses_B.mean().backward()
            optimizer.step()
            train = train + losses_B.detach().sum()
        with torch.no_grad():
            for losses_B in batch_losses(task.validation):
                validation = validation + losses_B.sum()
        return float(train) / len(order), float(validation) / len(task.validation)

    def current_layers() -> tuple[Layer, ...]:
        arrays = (
            (weight.detach().cpu().numpy().T.copy(), bias.detach().cpu().numpy().copy())
            for weight, bias in zip(weights, biases, strict=True)
        )
        return tuple(Layer(*pair) for pair in arrays)

    return _train_epochs(task, protocol, train_epoch, current_layers)
