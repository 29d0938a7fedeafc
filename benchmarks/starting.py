"""How long until a pretraining takes its first step, and until one that was killed goes on?

    python benchmarks/starting.py --work DISK/bench                   # on the CPU, without Ray and with one Ray worker

Each round starts `train/pretrain.py` as a user does, waits for the first row of its metrics.jsonl, kills all of its processes by
SIGKILL a few checkpoints later, starts the same command again, and waits for the first step that the killed one had not taken.
The backbone is small, so that what is seen is the start: Python, its packages, Ray, the workers, DALI's graph.

Results: <out>/<date>-starting.json and .md.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Result, RunFailed, check_at_least, last_line, script
from patch_set import patch_set
from report import Record, Report, Table, with_failure
from worker import ROOT

from sharding.cli import option, required
from sharding.process_pool import available_cores
from train.trainer.progress import Tail

CONTENDERS = {"plain": ("without Ray", 0), "ray": ("one Ray worker", 1)}
PARTS = {"first": "until the first step", "again": "until a killed one goes on"}
BACKBONE = "test_resnet"
SIZES = {"patches": 1024, "size": 64, "batch_size": 32}
LIMIT_S = 300.0  # after which a run is given up
_POLL_S = 0.01
_QUIET_S = 5.0  # without a row: nothing that was killed takes steps any more
_CHECKPOINTS = 3  # that a run has written when it is killed


@dataclass(frozen=True)
class Config:
    """Where, and how often."""

    work: str = required("a folder to work in: drawn images and the shard set stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    rounds: int = option(5, "how often each contender runs")


def command(workers: int, name: str, shards: str, storage: Path) -> list[str]:
    """As a user types it; checkpoints and rows at every fourth step."""
    script = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--data", shards, "--storage", str(storage), "--name", name]
    sizes = ["--backbone", BACKBONE, "--image-size", str(SIZES["size"]), "--batch-size", str(SIZES["batch_size"])]
    steps = ["--epochs", "10000", "--log-every", "4", "--checkpoint-every", "4", "--probe-every", "0"]
    return [*script, *sizes, *steps, "--workers", str(workers)]


def seconds_until(folder: Path, step: int, run: subprocess.Popen, log: Path, limit: float = LIMIT_S) -> float:
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


def last_step(folder: Path) -> int:
    """Of a run that was killed, once no more rows come: Ray's worker outlives its driver for a moment and takes more steps."""
    size, path = -1, folder / "metrics.jsonl"
    while size != path.stat().st_size:
        size = path.stat().st_size
        time.sleep(_QUIET_S)
    return max(row["step"] for row in Tail(path).read())


def one_round(workers: int, shards: str, storage: Path) -> Record:
    """Seconds by PARTS."""
    name = f"{workers}-workers-{time.monotonic_ns()}"
    given, folder, log = command(workers, name, shards, storage), storage / name, storage / f"{name}.log"
    with running(given, log) as run:
        first = seconds_until(folder, 0, run, log)
        seconds_until(folder, 4 * _CHECKPOINTS, run, log)
    taken = last_step(folder)
    with running(given, log) as run:
        again = seconds_until(folder, taken, run, log)
    return {"first": first, "again": again}


def main(config: Config) -> None:
    check_at_least(config, rounds=1)
    result, work = Result(config.out, "starting", ["torch", "timm", "ray", "nvidia-dali-cuda130"]), Path(config.work).resolve()
    shards = patch_set(None, work, cores=available_cores(), **SIZES).shards
    result.record["timed"] = {"backbone": BACKBONE, **SIZES}
    with tempfile.TemporaryDirectory(dir=work, prefix="starting-", ignore_cleanup_errors=True) as storage:

        def measure(name: str) -> Record:
            return one_round(CONTENDERS[name][1], shards, Path(storage))

        result.rounds(list(CONTENDERS), config.rounds, measure, str)
    result.finish(report_of(result.record))


def report_of(record: Record) -> Report:
    """Medians in seconds, with the least and the most."""
    t, rows = record["timed"], []
    for name, (title, _) in CONTENDERS.items():
        cells = []
        for part in PARTS:
            seconds = [found[part] for found in record["runs"][name]]
            cells.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else "-")
        rows.append([with_failure(title, record, name), *cells])
    text = (
        f"`train/pretrain.py` with {t['backbone']} on {t['patches']:,} drawn patches of {t['size']} px, batch {t['batch_size']}:"
        " seconds from typing the command to the first row of metrics.jsonl (four steps), and after a SIGKILL of all processes,"
        " by the same command, to the first row of a step that had not been taken; medians, least and most. With Ray its start"
        " is included."
    )
    return Report(record, "Starting and going on", [text, Table(["seconds", *PARTS.values()], rows)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
