"""How long do heads on frozen features take by a published protocol: ours, a plain torch loop, and scikit-learn for scale?

    python benchmarks/heads.py                       # 3,696 x 2,048 features: one head, and 4 fractions x 5 seeds
    python benchmarks/heads.py --protocol sgd --rounds 5

All contenders get the same drawn features. The plain loop trains by the same protocol, from the same initial weights and in the
same order, and must reach the same validation loss. scikit-learn's LogisticRegression minimises another objective to convergence.

Results: <out>/<date>-heads.json and .md.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from harness import Result, RunFailed, check_at_least, chosen, cores_of, run_contender, script
from report import Record, Report, Table, Target, cell, judge, summarise, target_lines
from worker import Contender

from pipelines.sampler import epoch_order
from sharding.cli import option
from train.scoring import linear_heads
from train.scoring.linear_heads import PROTOCOLS, HeadTask, train_heads

SCENARIOS = {"one": "1 head on all rows", "grid": "4 fractions (5, 25, 50, 100 %) x 5 seeds"}
FRACTIONS, SEEDS = (0.05, 0.25, 0.5, 1.0), 5
VALIDATION = 0.25  # as many rows again as this share of those that are learnt from
DEFAULT_SIZE = (3696, 2048, 100)  # rows, features, epochs
# Of the default size
TARGETS = (
    Target("one", "seconds", 3.0, f"ours, {SCENARIOS['one']}, s", at_least=False),
    Target("grid", "seconds", 20.0, f"ours, {SCENARIOS['grid']}, s", at_least=False),
)
_LOSS_ERROR = 1e-3  # relative; thousands of steps in float32, with sums in another order


@dataclass(frozen=True)
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


# ---- The contenders: (features, labels, tasks, classes, protocol) -> the best validation loss of each task, in nats ----


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


# ---- The command ----


@dataclass(frozen=True)
class Config:
    """Which heads, on how many features."""

    out: str = option("benchmarks/results", "folder for the results")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all)")
    protocol: Literal["adam", "sgd"] = option("adam", "by which the heads are trained")
    rows: int = option(DEFAULT_SIZE[0], "rows to learn from; a quarter as many are drawn for validation")
    features: int = option(DEFAULT_SIZE[1], "F, their width")
    classes: int = option(3, "K")
    epochs: int = option(DEFAULT_SIZE[2], "epochs, at most")
    rounds: int = option(3, "how often each contender runs")
    cores: int = option(0, "cores that every contender may use (0: all)")


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    check_at_least(config, rows=80, features=1, classes=2, epochs=1, rounds=1)
    cores = cores_of(config.cores)
    result = Result(config.out, "heads", ["torch", "numba", "numpy", "scikit-learn"], cores=cores)
    timed = {name: getattr(config, name) for name in ("protocol", "rows", "features", "classes", "epochs", "rounds")}
    runs: dict[str, dict[str, list[Record]]] = {scenario: {name: [] for name in names} for scenario in SCENARIOS}
    result.record |= {"timed": timed, "runs": runs}
    for scenario, number, name in itertools.product(SCENARIOS, range(1, config.rounds + 1), names):
        task = Task(scenario, config.protocol, config.rows, config.features, config.classes, config.epochs, cores)

        def measured(name: str = name, task: Task = task) -> Record:
            run = run_contender("heads", name, task)
            if wrong := other_loss(name, run, runs[task.scenario]):
                raise RunFailed(wrong)
            return run

        title = f"{scenario}, round {number}: {name}"
        result.note(runs[scenario][name], title, measured, lambda run: f"{run['seconds']:.2f} s")
    result.finish(report_of(result.record))


def other_loss(name: str, run: Record, runs: dict[str, list[Record]]) -> str | None:
    """What is wrong where ours and the plain loop do not reach the same loss, on the mean over the tasks."""
    other = {"plain": "ours", "ours": "plain"}.get(name)
    if other and runs.get(other):
        mine, theirs = (statistics.mean(each["validation_losses"]) for each in (run, runs[other][0]))
        if not abs(mine / theirs - 1) < _LOSS_ERROR:
            return f"its validation loss is {mine:.4g}, that of {CONTENDERS[other].title} {theirs:.4g}"
    return None


def report_of(record: Record) -> Report:
    timed, summary, rows = record["timed"], {}, []
    for scenario, runs in record["runs"].items():
        summary[scenario] = summarise(runs, "seconds", "first_s", ratios={"time_to_ours": ("ours", "seconds")})
        for name, found in summary[scenario].items():
            found["validation_loss"] = statistics.mean(runs[name][0]["validation_losses"])
            cells = [f"{found['seconds']:.2f}", cell(found["time_to_ours"])]
            cells += [f"{found['validation_loss']:.4f}", f"{found['first_s']:.2f}"]
            rows.append([f"{SCENARIOS[scenario]}: {CONTENDERS[name].title}", *cells])
    same_size = (timed["rows"], timed["features"], timed["epochs"]) == DEFAULT_SIZE
    mine = {scenario: here.get("ours", {}) for scenario, here in summary.items() if same_size}
    record = record | {"summary": summary, "targets": judge(mine, TARGETS)}
    text = (
        f"Seconds of training linear heads by the protocol {timed['protocol']!r} on {timed['rows']:,} x {timed['features']:,}"
        f" features of {timed['classes']} classes, {timed['epochs']} epochs at most, beside a validation part of a quarter as"
        f" many rows; medians over {timed['rounds']} rounds, each in a fresh process, after a first call on a tiny task, which"
        " compiles or loads. Ratios are medians of the ratios within a round. The validation loss is the mean over the heads,"
        " nats."
    )
    table = Table(["heads", "s", "/ ours", "validation loss", "first call, s"], rows)
    return Report(record, "Heads on frozen features", [text, table, *target_lines(record)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
