"""How long do linear heads on frozen features take by a published protocol: ours, and a plain torch loop?

    python benchmarks/heads.py                       # 3,696 x 2,048 features: one head, and 4 fractions x 5 seeds

Both get the same drawn features. The plain loop trains by the same protocol (Adam), from the same initial weights and in the
same order, and must reach the same validation loss.

Results: <out>/<date>-heads.json and .md.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from harness import Result, RunFailed, check_at_least, cores_of, run_contender, script
from report import Record, Report, Target, judge, rounds_table, summarise, target_lines
from worker import Contender

from pipelines.sampler import epoch_order
from sharding.cli import option
from train.scoring import linear_heads
from train.scoring.linear_heads import PROTOCOLS, HeadTask, train_heads

PROTOCOL, CLASSES = PROTOCOLS["adam"], 3
FRACTIONS, SEEDS = (0.05, 0.25, 0.5, 1.0), 5  # of the grid
VALIDATION = 0.25  # as many rows again as this share of those that are learnt from
DEFAULT_SIZE = (3696, 2048, 100)  # rows, features, epochs
# Of the default size
TARGETS = (
    Target("ours one", "seconds", 3.0, "ours, 1 head on all rows, s", at_least=False),
    Target("ours grid", "seconds", 20.0, "ours, 4 fractions x 5 seeds, s", at_least=False),
)
_LOSS_ERROR = 1e-3  # relative; thousands of steps in float32, with sums in another order


@dataclass(frozen=True)
class Task:
    """What a process trains. rows to learn from, features: N and F."""

    rows: int
    features: int
    epochs: int
    cores: int
    seed: int = 42


# ---- The contenders: (features, labels, tasks, protocol) -> the best validation loss of each task, in nats ----


def plain(features, labels, tasks, protocol) -> list[float]:
    """The loop as it is usually written, without DataLoader, whose overhead would be another comparison."""
    import torch
    from torch.nn.functional import cross_entropy

    x, y, losses = torch.from_numpy(features), torch.from_numpy(labels), []
    for task in tasks:
        validation = torch.from_numpy(task.validation)
        head = torch.nn.Linear(features.shape[1], CLASSES)
        (initial,) = linear_heads._initial(task.seed, (features.shape[1], CLASSES), features.dtype)
        head.load_state_dict({name: torch.from_numpy(values) for name, values in initial._asdict().items()})
        optimizer = torch.optim.Adam(head.parameters(), lr=protocol.learning_rate)
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


def ours(features, labels, tasks, protocol) -> list[float]:
    heads = train_heads(features, labels, tasks, classes=CLASSES, protocol=protocol)
    return [float(head.validation_loss.min()) for head in heads]


def drawn(job: Task) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) as behind a ReLU, that know something of the labels (N,); the validation's rows come last."""
    rng = np.random.default_rng(job.seed)
    labels = rng.integers(0, CLASSES, job.rows + round(VALIDATION * job.rows))
    means = 2 / np.sqrt(job.features) * rng.normal(size=(CLASSES, job.features))
    return np.maximum(rng.normal(size=(len(labels), job.features)) + means[labels], 0).astype(np.float32), labels


def tasks_of(job: Task, *, grid: bool) -> list[HeadTask]:
    """The same share of the rows and of the validation, nested, for each fraction; one task, or all of the grid."""
    validation = np.arange(job.rows, job.rows + round(VALIDATION * job.rows))
    fractions, seeds = (FRACTIONS, SEEDS) if grid else ((1.0,), 1)
    return [
        HeadTask(np.arange(round(fraction * job.rows)), validation[: round(fraction * len(validation))], seed)
        for fraction in fractions
        for seed in range(seeds)
    ]


def measure(train: Callable[..., list[float]], job: Task, *, grid: bool) -> dict[str, Any]:
    """seconds for all tasks, after a tiny one (which compiles, or reads what was compiled), and validation_loss, their mean."""
    import torch

    torch.set_num_threads(job.cores)
    protocol = dataclasses.replace(PROTOCOL, epochs=job.epochs)
    features, labels = drawn(job)
    train(features[:8], np.arange(8) % 2, [HeadTask(np.arange(8), np.arange(4), 0)], dataclasses.replace(protocol, epochs=1))
    started = time.perf_counter()
    losses = train(features, labels, tasks_of(job, grid=grid), protocol)
    return {"seconds": time.perf_counter() - started, "validation_loss": statistics.mean(losses)}


# In the order of the rounds
CONTENDERS = {
    f"{who} {scenario}": Contender(f"{title}: {maker}", functools.partial(measure, train, grid=scenario == "grid"))
    for scenario, title in (("one", "1 head on all rows"), ("grid", "4 fractions (5, 25, 50, 100 %) x 5 seeds"))
    for who, maker, train in (("plain", "plain torch loop", plain), ("ours", "ours", ours))
}


# ---- The command ----


@dataclass(frozen=True)
class Config:
    """Heads on how many features."""

    out: str = option("benchmarks/results", "folder for the results")
    rows: int = option(DEFAULT_SIZE[0], "rows to learn from; a quarter as many are drawn for validation")
    features: int = option(DEFAULT_SIZE[1], "F, their width")
    epochs: int = option(DEFAULT_SIZE[2], "epochs, at most")
    rounds: int = option(3, "how often each contender runs")
    cores: int = option(0, "cores that every contender may use (0: all)")


def main(config: Config) -> None:
    check_at_least(config, rows=80, features=1, epochs=1, rounds=1)
    cores = cores_of(config.cores)
    result = Result(config.out, "heads", ["torch", "numba", "numpy"], cores=cores)
    result.record["timed"] = {name: getattr(config, name) for name in ("rows", "features", "epochs", "rounds")}
    task = Task(config.rows, config.features, config.epochs, cores)

    def measured(name: str) -> Record:
        run = run_contender("heads", name, task)
        if wrong := other_loss(name, run, result.record["runs"]):
            raise RunFailed(wrong)
        return run

    result.rounds([*CONTENDERS], config.rounds, measured, lambda run: f"{run['seconds']:.2f} s")
    result.finish(report_of(result.record))


def other_loss(name: str, run: Record, runs: dict[str, list[Record]]) -> str | None:
    """What is wrong where ours and the plain loop do not reach the same loss."""
    who, scenario = name.split()
    other = f"{'ours' if who == 'plain' else 'plain'} {scenario}"
    if runs.get(other):
        mine, theirs = (each["validation_loss"] for each in (run, runs[other][0]))
        if not abs(mine / theirs - 1) < _LOSS_ERROR:
            return f"its validation loss is {mine:.4g}, that of {CONTENDERS[other].title} {theirs:.4g}"
    return None


def report_of(record: Record) -> Report:
    timed, runs = record["timed"], record["runs"]
    summary: Record = {}
    for scenario in ("one", "grid"):
        here = {name: found for name, found in runs.items() if name.endswith(scenario)}
        ratios = {"time_to_ours": (f"ours {scenario}", "seconds")}
        summary |= summarise(here, "seconds", "validation_loss", ratios=ratios)
    same_size = (timed["rows"], timed["features"], timed["epochs"]) == DEFAULT_SIZE
    record = record | {"summary": summary, "targets": judge(summary if same_size else {}, TARGETS)}
    text = (
        f"Seconds of training linear heads with Adam on {timed['rows']:,} x {timed['features']:,} features of {CLASSES} classes,"
        f" {timed['epochs']} epochs at most, beside a validation part of a quarter as many rows; a fresh process each time, after"
        " a first call on a tiny task, which compiles or loads. Ratios are medians of the ratios within a round. The validation"
        " loss is the mean over the heads, nats."
    )
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    columns = {"time / ours": ("time_to_ours", ".2f"), "validation loss": ("validation_loss", ".4f")}
    table = rounds_table(record, titles, "seconds", "s", columns)
    return Report(record, "Heads on frozen features", [text, table, *target_lines(record)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
