"""How long until a pretraining takes its first step, and until one that was killed goes on?

    python benchmarks/starting.py --work DISK/bench                   # on the CPU, without Ray and with one Ray worker
    python benchmarks/starting.py --work DISK/bench --rounds 5

Each round starts `train/pretrain.py` as a user does, waits for the first row of its metrics.jsonl, kills all of its processes by
SIGKILL a few checkpoints later, starts the same command again, and waits for the first step that the killed one had not taken.
Both contenders run in turn, round by round. A small backbone is trained, so that what is seen is the start: Python, its packages,
Ray, the workers, DALI's graph. Importing the packages alone is timed beside it.

Results go to <out>/<date>-starting.json, written after every round, and at the end as a table to the same name's .md. Where a
process failed, the exit code is 1.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from measuring import RunFailed, conclude, heading, machine, markdown_table, new_path, record_of, versions_of  # noqa: E402
from patch_set import patch_set  # noqa: E402

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import write_json  # noqa: E402
from train.trainer.progress import Tail  # noqa: E402

Record = dict[str, Any]
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
            said = log.read_text(errors="replace").strip().splitlines()
            raise RunFailed(f"no step after {step}: {said[-1] if said else 'it said nothing'}")
        time.sleep(_POLL_S)
    return time.perf_counter() - started


def start(given: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(given, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)


def end(run: subprocess.Popen) -> None:
    """Kill the command with all that it has started. Ray's own processes end by themselves when their driver has."""
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def one_round(workers: int, name: str, shards: str, storage: Path, config: Config) -> Record:
    """first, again: seconds, as in PARTS."""
    given, folder, log = command(workers, name, shards, storage, config), storage / name, storage / f"{name}.log"
    run = start(given, log)
    try:
        first = seconds_until(folder, 0, run, config.limit, log)
        seconds_until(folder, 4 * _CHECKPOINTS, run, config.limit, log)
    finally:
        end(run)
    taken = max(row["step"] for row in Tail(folder / "metrics.jsonl").read())
    run = start(given, log)
    try:
        again = seconds_until(folder, taken, run, config.limit, log)
    finally:
        end(run)
    return {"first": first, "again": again}


def import_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    return time.perf_counter() - started


def main(config: Config) -> None:
    if config.rounds < 1:
        raise ValueError(f"--rounds {config.rounds} is out of range: give at least 1")
    console, path = Console(highlight=False, soft_wrap=True), new_path(Path(config.out), "starting")
    work = Path(config.work).resolve()
    sizes = {"patches": config.patches, "size": config.image_size, "batch_size": config.batch_size}
    images = patch_set(None, work, cores=available_cores(), **sizes)
    storage = work / "starting" / f"{int(time.time())}-{os.getpid()}"
    storage.mkdir(parents=True)
    record: Record = {
        **record_of(machine(available_cores()), versions_of(["torch", "timm", "ray", "nvidia-dali-cuda130"])),
        "timed": {"backbone": config.backbone, **sizes},
        "rounds": {name: [] for name in CONTENDERS},
        "failed": {},
    }
    for number in range(1, config.rounds + 1):
        for name, (title, workers) in CONTENDERS.items():
            try:
                found = {"imports": import_seconds()}
                found |= one_round(workers, f"{name}-{number}", images.shards, storage, config)
            except RunFailed as error:  # the others' figures are worth having; the exit code tells
                record["failed"][f"{name}, round {number}"] = str(error)
                continue
            record["rounds"][name].append(found)
            console.print(f"round {number}: {title}: " + ", ".join(f"{part} {s:.1f} s" for part, s in found.items()))
        write_json(path, record)
    header, rows = table(record)
    conclude(record, path, console, markdown=markdown(record, header, rows), tables=[(header, rows)], lines=[])


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Medians in seconds, with the least and the most."""
    rows = []
    for name, (title, _) in CONTENDERS.items():
        cells = []
        for part in PARTS:
            seconds = [found[part] for found in record["rounds"][name]]
            cells.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else "failed")
        rows.append([title, *cells])
    return ["seconds", *PARTS.values()], rows


def markdown(record: Record, header: list[str], rows: list[list[str]]) -> str:
    t = record["timed"]
    told = (
        f"`train/pretrain.py` with {t['backbone']} on {t['patches']:,} drawn patches of {t['size']} px, batch {t['batch_size']}:"
        " seconds from typing the command to the first row of metrics.jsonl (four steps), and after a SIGKILL of all processes,"
        " by the same command, to the first row of a step that had not been taken; medians, least and most. With Ray its"
        " start is in it."
    )
    return "\n".join([*heading("Starting and going on", record), told, "", *markdown_table(header, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="starting.py", description=(__doc__ or "").splitlines()[0]))
