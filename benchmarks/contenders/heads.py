"""Contenders of the benchmark of heads on frozen features, each a function of the same tasks.

(features, labels, tasks, classes, protocol) -> the best validation loss of each task, in nats.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from worker import Contender

from pipelines.sampler import epoch_order
from train.scoring import linear_heads
from train.scoring.linear_heads import PROTOCOLS, HeadTask, train_heads

SCENARIOS = {"one": "1 head on all rows", "grid": "4 fractions (5, 25, 50, 100 %) x 5 seeds"}
FRACTIONS, SEEDS = (0.05, 0.25, 0.5, 1.0), 5
VALIDATION = 0.25  # as many rows again as this share of those that are learnt from


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process trains."""

    scenario: str
    protocol: str
    rows: int
    features: int
    classes: int
    epochs: int
    cores: int
    seed: int = 42


def plain(features, labels, tasks, classes, protocol) -> list[float]:
    """The loop as it is usually written, without DataLoader, whose overhead would be another comparison."""
    import torch
    from torch.nn.functional import cross_entropy

    x, y, losses = torch.from_numpy(features), torch.from_numpy(labels), []
    for task in tasks:
        validation = torch.from_numpy(task.validation)
        head = torch.nn.Linear(features.shape[1], classes)
        (initial,) = linear_heads._initial(task.seed, (features.shape[1], classes), features.dtype)
        head.load_state_dict({name: torch.from_numpy(values) for name, values in initial._asdict().items()})
        if protocol.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(head.parameters(), lr=protocol.learning_rate)
        else:
            optimizer = torch.optim.SGD(head.parameters(), lr=protocol.learning_rate, momentum=0.9)
        lowest, since = float("inf"), 0
        for epoch in range(protocol.epochs):
            order = torch.from_numpy(epoch_order(task.rows, seed=task.seed, epoch=epoch))
            for batch in order.split(protocol.batch_size):
                optimizer.zero_grad()
                cross_entropy(head(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                loss = cross_entropy(head(x[validation]), y[validation]).item()
            since += 1
            if loss < lowest:
                lowest, since = loss, 0
                best = {name: values.clone() for name, values in head.state_dict().items()}
            if since == protocol.patience:
                break
        head.load_state_dict(best)
        losses.append(lowest)
    return losses


def ours(features, labels, tasks, classes, protocol) -> list[float]:
    heads = train_heads(features, labels, tasks, classes=classes, protocol=protocol)
    return [float(head.validation_loss.min()) for head in heads]


def sklearn(features, labels, tasks, classes, protocol) -> list[float]:
    from sklearn.linear_model import LogisticRegression

    losses = []
    for task in tasks:
        found = LogisticRegression(max_iter=1000).fit(features[task.rows], labels[task.rows])
        p = found.predict_proba(features[task.validation])[np.arange(len(task.validation)), labels[task.validation]]
        losses.append(float(-np.log(np.maximum(p, 1e-15)).mean()))
    return losses


# ---- The measurement ----


def drawn(job: Task) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) as behind a ReLU, that know something of the labels (N,); the validation's rows come last."""
    rng = np.random.default_rng(job.seed)
    labels = rng.integers(0, job.classes, job.rows + round(VALIDATION * job.rows))
    means = 2 / np.sqrt(job.features) * rng.normal(size=(job.classes, job.features))
    return np.maximum(rng.normal(size=(len(labels), job.features)) + means[labels], 0).astype(np.float32), labels


def tasks_of(job: Task) -> list[HeadTask]:
    """The same share of the rows and of the validation, nested, for each fraction; one task, or all of the grid."""
    validation = np.arange(job.rows, job.rows + round(VALIDATION * job.rows))
    fractions, seeds = ((1.0,), 1) if job.scenario == "one" else (FRACTIONS, SEEDS)
    return [
        HeadTask(np.arange(round(fraction * job.rows)), validation[: round(fraction * len(validation))], seed)
        for fraction in fractions
        for seed in range(seeds)
    ]


def measure(train: Callable[..., list[float]], job: Task) -> dict[str, Any]:
    """seconds for all tasks, first_s for a tiny one before them (compiling, or reading what was compiled), and losses."""
    import torch

    torch.set_num_threads(job.cores)
    protocol = dataclasses.replace(PROTOCOLS[job.protocol], epochs=job.epochs)
    features, labels = drawn(job)
    tiny = HeadTask(np.arange(8), np.arange(4), 0)
    started = time.perf_counter()
    train(features[:8], np.arange(8) % 2, [tiny], 2, dataclasses.replace(protocol, epochs=1))
    first_s, started = time.perf_counter() - started, time.perf_counter()
    losses = train(features, labels, tasks_of(job), job.classes, protocol)
    return {"seconds": time.perf_counter() - started, "first_s": first_s, "validation_losses": losses}


# In the order of the rounds
CONTENDERS = {
    "plain": Contender("plain torch loop", functools.partial(measure, plain)),
    "ours": Contender("ours", functools.partial(measure, ours)),
    "sklearn": Contender("scikit-learn's LogisticRegression", functools.partial(measure, sklearn)),
}
