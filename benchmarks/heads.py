"""How long do heads on frozen features take by a published protocol: ours, a plain torch loop, and scikit-learn for scale?

    python benchmarks/heads.py                       # 3,696 x 2,048 features: one head, and 4 fractions x 5 seeds
    python benchmarks/heads.py --protocol sgd --rounds 5

All contenders run in turn, round by round (A B C A B C), each in a fresh process, on the same drawn features. The plain loop
trains by the same protocol, from the same initial weights and in the same order, and must come to the same validation loss.
scikit-learn's LogisticRegression minimises another objective to convergence; it is there to say how long a classifier takes.

Results go to <out>/<date>-heads.json, written after every run, and at the end as a table to the same name's .md. A target that
was not reached is printed as MISSED; where a process failed, the exit code is 1.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from measuring import (  # noqa: E402
    RunFailed,
    chosen,
    conclude,
    heading,
    machine,
    markdown_table,
    new_path,
    record_of,
    run_fresh,
    target_lines,
    versions_of,
)

from pipelines.sampler import epoch_order  # noqa: E402
from sharding.cli import option, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import write_json  # noqa: E402
from train.scoring import linear_heads  # noqa: E402
from train.scoring.linear_heads import PROTOCOLS, HeadTask, Protocol, train_heads  # noqa: E402

Record = dict[str, Any]
SCENARIOS = {"one": "1 head on all rows", "grid": "4 fractions (5, 25, 50, 100 %) x 5 seeds"}
FRACTIONS, SEEDS = (0.05, 0.25, 0.5, 1.0), 5
MOST_SECONDS = {"one": 3.0, "grid": 20.0}  # ours, at the default size
DEFAULT_SIZE = (3696, 2048, 100)  # rows, features, epochs
VALIDATION = 0.25  # as many rows again as this share of those that are learnt from
_LOSS_ERROR = 1e-3  # relative; thousands of steps in float32, with sums in another order
_WORKER = "--worker"


@dataclass(frozen=True)
class Config:
    """Which heads, on how many features."""

    out: str = option("benchmarks/results", "folder for the results")
    contenders: list[str] = option([], "only these of plain, ours, sklearn (default: all)")
    protocol: Literal["adam", "sgd"] = option("adam", "by which the heads are trained")
    rows: int = option(DEFAULT_SIZE[0], "rows to learn from; a quarter as many are drawn for validation")
    features: int = option(DEFAULT_SIZE[1], "F, their width")
    classes: int = option(3, "K")
    epochs: int = option(DEFAULT_SIZE[2], "epochs, at most")
    rounds: int = option(3, "how often each contender runs")
    cores: int = option(0, "cores that every contender may use (0: all)")


@dataclass(frozen=True)
class Job:
    """What a process is to do. It travels as JSON."""

    scenario: str
    protocol: str
    rows: int
    features: int
    classes: int
    epochs: int
    cores: int
    seed: int = 42


class Contender(NamedTuple):
    """train: (features, labels, tasks, classes, protocol) -> the best validation loss of each task, in nats."""

    title: str
    train: Callable[[np.ndarray, np.ndarray, list[HeadTask], int, Protocol], list[float]]


# ---- Who trains ----


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


# In the order of the rounds
CONTENDERS = {
    "plain": Contender("plain torch loop", plain),
    "ours": Contender("ours", ours),
    "sklearn": Contender("scikit-learn's LogisticRegression", sklearn),
}


# ---- The measurement ----


def drawn(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) as behind a ReLU, that know something of the labels (N,); the validation's rows come last."""
    rng = np.random.default_rng(job.seed)
    labels = rng.integers(0, job.classes, job.rows + round(VALIDATION * job.rows))
    means = 2 / np.sqrt(job.features) * rng.normal(size=(job.classes, job.features))
    return np.maximum(rng.normal(size=(len(labels), job.features)) + means[labels], 0).astype(np.float32), labels


def tasks_of(job: Job) -> list[HeadTask]:
    """The same share of the rows and of the validation, nested, for each fraction; one task, or all of the grid."""
    validation = np.arange(job.rows, job.rows + round(VALIDATION * job.rows))
    fractions, seeds = ((1.0,), 1) if job.scenario == "one" else (FRACTIONS, SEEDS)
    return [
        HeadTask(np.arange(round(fraction * job.rows)), validation[: round(fraction * len(validation))], seed)
        for fraction in fractions
        for seed in range(seeds)
    ]


def measure(contender: Contender, job: Job) -> Record:
    """seconds for all tasks, first_s for a tiny one before them (compiling, or reading what was compiled), and losses."""
    protocol = dataclasses.replace(PROTOCOLS[job.protocol], epochs=job.epochs)
    features, labels = drawn(job)
    tiny = HeadTask(np.arange(8), np.arange(4), 0)
    started = time.perf_counter()
    contender.train(features[:8], np.arange(8) % 2, [tiny], 2, dataclasses.replace(protocol, epochs=1))
    first_s, started = time.perf_counter() - started, time.perf_counter()
    losses = contender.train(features, labels, tasks_of(job), job.classes, protocol)
    return {"seconds": time.perf_counter() - started, "first_s": first_s, "validation_losses": losses}


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    for name, least in (("rows", 80), ("features", 1), ("classes", 2), ("epochs", 1), ("rounds", 1), ("cores", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} is out of range: give at least {least}")
    cores = config.cores or available_cores()
    if cores > available_cores():
        raise ValueError(f"--cores {cores} is out of range: this process may use {available_cores()}")
    console = Console(highlight=False, soft_wrap=True)
    path = new_path(Path(config.out), "heads")
    record: Record = {
        **record_of(machine(cores), versions_of(["torch", "numba", "numpy", "scikit-learn"])),
        "timed": {name: getattr(config, name) for name in ("protocol", "rows", "features", "classes", "epochs", "rounds")},
        "runs": {scenario: {name: [] for name in names} for scenario in SCENARIOS},
        "failed": {},
    }
    for scenario in SCENARIOS:
        job = Job(scenario, config.protocol, config.rows, config.features, config.classes, config.epochs, cores)
        for number in range(1, config.rounds + 1):
            for name in names:
                title = f"{scenario}, round {number}: {name}"
                try:
                    run = one_run(name, job)
                    if wrong := other_loss(name, run, record["runs"][scenario]):
                        raise RunFailed(wrong)
                    record["runs"][scenario][name].append(run)
                    console.print(f"{title}: {run['seconds']:.2f} s", markup=False)
                except RunFailed as error:  # the others' figures are worth having; the exit code tells
                    record["failed"][f"{name}, {scenario}, round {number}"] = str(error)
                    console.print(f"{title}: FAILED: {error}", markup=False)
                write_json(path, record)
    record["summary"] = summarise(record["runs"])
    record["targets"] = judge(record["summary"], record["timed"])
    _, header, rows = table(record)
    conclude(record, path, console, markdown=markdown(record), tables=[(header, rows)], lines=target_lines(record))


def one_run(name: str, job: Job) -> Record:
    """What a fresh process reports. Raises RunFailed."""
    load = machine(job.cores)["load"][0]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        threads = [f"{variable}={job.cores}" for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
        command = [sys.executable, str(Path(__file__).resolve()), _WORKER, name, json.dumps(dataclasses.asdict(job)), str(result)]
        run_fresh(["env", *threads, *command], Path(folder) / "run.log")  # libraries read them when they are loaded
        return {**json.loads(result.read_text()), "load_before": load}


def other_loss(name: str, run: Record, runs: dict[str, list[Record]]) -> str | None:
    """What is wrong where ours and the plain loop do not come to the same loss, on the mean over the tasks."""
    for other in ("plain", "ours"):
        if name in ("plain", "ours") and other != name and runs.get(other):
            mine, theirs = (statistics.mean(each["validation_losses"]) for each in (run, runs[other][0]))
            if not abs(mine / theirs - 1) < _LOSS_ERROR:
                return f"its validation loss is {mine:.4g}, that of {CONTENDERS[other].title} {theirs:.4g}"
    return None


# ---- What is made of it ----


def summarise(runs: dict[str, dict[str, list[Record]]]) -> dict[str, dict[str, Record]]:
    """By scenario and contender: medians over the rounds, and medians of the ratios to ours within a round, so that a slow
    minute of the machine cancels out."""
    summary: dict[str, dict[str, Record]] = {}
    for scenario, contenders in runs.items():
        summary[scenario] = {}
        for name, found in contenders.items():
            if not found:
                continue
            # One that failed in a round has fewer of them.
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(found, contenders.get("ours", ()), strict=False)]
            summary[scenario][name] = {
                "seconds": statistics.median(run["seconds"] for run in found),
                "first_s": statistics.median(run["first_s"] for run in found),
                "time_to_ours": statistics.median(ratios) if ratios else None,
                "validation_loss": statistics.mean(found[0]["validation_losses"]),
            }
    return summary


def judge(summary: dict[str, dict[str, Record]], timed: Record) -> list[Record]:
    """The targets, which are for the default size, with what was reached (None: not measured)."""
    same_size = (timed["rows"], timed["features"], timed["epochs"]) == DEFAULT_SIZE
    targets = []
    for scenario, wanted in MOST_SECONDS.items():
        reached = summary[scenario].get("ours", {}).get("seconds") if same_size else None
        enough = None if reached is None else reached <= wanted
        targets.append({"text": f"ours, {SCENARIOS[scenario]}, s", "reached": reached, "wanted": wanted, "enough": enough})
    return targets


def table(record: Record) -> tuple[str, list[str], list[list[str]]]:
    """What it shows, its header, and its rows."""
    timed = record["timed"]
    text = (
        f"Seconds of training linear heads by the protocol {timed['protocol']!r} on {timed['rows']:,} x {timed['features']:,}"
        f" features of {timed['classes']} classes, {timed['epochs']} epochs at most, beside a validation part of a quarter as"
        f" many rows; medians over {timed['rounds']} rounds, each in a fresh process, behind a first call on a tiny task, which"
        " compiles or loads. Ratios are medians of the ratios within a round. The validation loss is the mean over the heads,"
        " nats."
    )
    rows = []
    for scenario, here in record["summary"].items():
        for name, found in here.items():
            ratio = found["time_to_ours"]
            cells = [f"{found['seconds']:.2f}", "-" if ratio is None else f"{ratio:.2f}"]
            cells += [f"{found['validation_loss']:.4f}", f"{found['first_s']:.2f}"]
            rows.append([f"{SCENARIOS[scenario]}: {CONTENDERS[name].title}", *cells])
    return text, ["heads", "s", "/ ours", "validation loss", "first call, s"], rows


def markdown(record: Record) -> str:
    text, header, rows = table(record)
    lines = [*heading("Heads on frozen features", record), text, "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, *(f"- {line}" for line in target_lines(record)), ""])


def work(name: str, given: str, result: str) -> None:
    import torch

    job = Job(**json.loads(given))
    torch.set_num_threads(job.cores)
    Path(result).write_text(json.dumps(measure(CONTENDERS[name], job)), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [_WORKER]:
        work(*sys.argv[2:])
    else:
        sys.exit(run_script(main, Config, prog="heads.py", description=(__doc__ or "").splitlines()[0]))
