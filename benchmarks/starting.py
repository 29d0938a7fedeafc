"""How long until a pretraining takes its first step, and until one that was killed goes on?

    python benchmarks/starting.py --work DISK/bench                   # on the CPU, without Ray and with one Ray worker
    python benchmarks/starting.py --work DISK/bench --rounds 5

Each round starts `train/pretrain.py` as a user does, waits for the first row of its metrics.jsonl, kills all of its processes by
SIGKILL a few checkpoints later, starts the same command again, and waits for the first step that the killed one had not taken.
The backbone is small, so that what is seen is the start: Python, its packages, Ray, the workers, DALI's graph.

Results: <out>/<date>-starting.json and .md.
"""

import contextlib
import functools
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Result, RunFailed, check_at_least, last_line, script
from patch_set import patch_set
from report import Record, Report, Table
from worker import ROOT

from sharding.cli import option, required
from sharding.process_pool import available_cores
from train.trainer.progress import Tail

CONTENDERS = {"plain": ("without Ray", 0), "ray": ("one Ray worker", 1)}
PARTS = {"imports": "import torch, timm, DALI", "first": "until the first step", "again": "until a killed one goes on"}
_IMPORTS = "import torch, timm, nvidia.dali"
_POLL_S = 0.01
_CHECKPOINTS = 3  # that a run has written when it is killed


@dataclass(frozen=True)
class Config:
    """What is started, and how often."""

    work: str = required("a folder to work in: drawn images and the shard set stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    backbone: str = option("test_resnet", "any timm model")
    image_size: int = option(64, "side of the drawn patches and of the views, pixels")
    batch_size: int = option(32, "patches per step")
    patches: int = option(1024, "patches to draw")
    rounds: int = option(5, "how often each contender runs")
    limit: float = option(300.0, "seconds after which a run is given up")


def command(workers: int, name: str, shards: str, storage: Path, config: Config) -> list[str]:
    """As a user types it; checkpoints and rows at every fourth step."""
    script = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--data", shards, "--storage", str(storage), "--name", name]
    sizes = ["--backbone", config.backbone, "--image-size", str(config.image_size), "--batch-size", str(config.batch_size)]
    steps = ["--epochs", "10000", "--log-every", "4", "--checkpoint-every", "4", "--probe-every", "0"]
    return [*script, *sizes, *steps, "--workers", str(workers)]


def seconds_until(folder: Path, step: int, run: subprocess.Popen, limit: float, log: Path) -> float:
    """Until metrics.jsonl has a row of a later step. Raises RunFailed when the run ends or takes longer than the limit."""
    started, tail = time.perf_counter(), Tail(folder / "metrics.jsonl")
    rows: list[Record] = []
    while not any(row["step"] > step for row in rows):
        rows = tail.read()
        if run.poll() is not None or time.perf_counter() - started > limit:
            raise RunFailed(f"no step after {step}: {last_line(log)}")
        time.sleep(_POLL_S)
    return time.perf_counter() - started


@contextlib.contextmanager
def running(given: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """The command, which is killed at the end with all that it has started. Ray's own processes end when their driver has."""
    with log.open("ab") as file:
        settings: dict[str, Any] = {"stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}
        run = subprocess.Popen(given, stdout=file, **settings)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and so have all that it started
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def one_round(workers: int, name: str, shards: str, storage: Path, config: Config) -> Record:
    """Seconds by PARTS."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    imports = time.perf_counter() - began
    given, folder, log = command(workers, name, shards, storage, config), storage / name, storage / f"{name}.log"
    with running(given, log) as run:
        first = seconds_until(folder, 0, run, config.limit, log)
        seconds_until(folder, 4 * _CHECKPOINTS, run, config.limit, log)
    taken = max(row["step"] for row in Tail(folder / "metrics.jsonl").read())
    with running(given, log) as run:
        again = seconds_until(folder, taken, run, config.limit, log)
    return {"imports": imports, "first": first, "again": again}


def main(config: Config) -> None:
    check_at_least(config, rounds=1)
    result, work = Result(config.out, "starting", ["torch", "timm", "ray", "nvidia-dali-cuda130"]), Path(config.work).resolve()
    sizes = {"patches": config.patches, "size": config.image_size, "batch_size": config.batch_size}
    images = patch_set(None, work, cores=available_cores(), **sizes)
    storage = work / "starting" / f"{int(time.time())}-{os.getpid()}"
    storage.mkdir(parents=True)
    rounds: dict[str, list[Record]] = {name: [] for name in CONTENDERS}
    result.record |= {"timed": {"backbone": config.backbone, **sizes}, "rounds": rounds}
    for number, (name, (title, workers)) in itertools.product(range(1, config.rounds + 1), CONTENDERS.items()):
        job = functools.partial(one_round, workers, f"{name}-{number}", images.shards, storage, config)
        result.note(
            rounds[name], f"round {number}: {title}", job, lambda found: ", ".join(f"{k} {v:.1f} s" for k, v in found.items())
        )
    result.finish(report_of(result.record))


def report_of(record: Record) -> Report:
    """Medians in seconds, with the least and the most."""
    t, rows = record["timed"], []
    for name, (title, _) in CONTENDERS.items():
        cells = []
        for part in PARTS:
            seconds = [found[part] for found in record["rounds"][name]]
            cells.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else "failed")
        rows.append([title, *cells])
    text = (
        f"`train/pretrain.py` with {t['backbone']} on {t['patches']:,} drawn patches of {t['size']} px, batch {t['batch_size']}:"
        " seconds from typing the command to the first row of metrics.jsonl (four steps), and after a SIGKILL of all processes,"
        " by the same command, to the first row of a step that had not been taken; medians, least and most. With Ray its start"
        " is included."
    )
    return Report(record, "Starting and going on", [text, Table(["seconds", *PARTS.values()], rows)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
