"""How long does the contrastive loss take, forward and backward, and how much memory: ours, the plain formula, and others?

    python benchmarks/ntxent.py                           # ours and the plain formula, 2N = 512 to 65,536, on the CPU
    python benchmarks/ntxent.py --peers DISK/peers        # lightly's and Spijkervet's too, installed into that folder
    python benchmarks/ntxent.py --device cuda
    python benchmarks/ntxent.py --device cuda --in-process --rounds 1       # in a minute

For each number of anchors all contenders run in turn, round by round (A B C A B C), each in a fresh process unless told
otherwise, on the same embeddings. They must come to the same loss. What cannot be installed, does not fit in half of the memory
or would take longer than `--seconds` stands in the table with the reason.

Results go to <out>/<date>-ntxent-<device>.json, written after every run, and at the end as tables to the same name's .md. A
target that was not reached is printed as MISSED; where a process failed, the exit code is 1.
"""

import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import ntxent_contenders  # noqa: E402
from measuring import RunFailed, chosen, conclude, machine, new_path, record_of, run_fresh, versions_of  # noqa: E402
from ntxent_contenders import CONTENDERS, Task  # noqa: E402
from ntxent_report import completed, markdown, other_loss, refusal, tables, target_lines  # noqa: E402
from step_peers import PEERS, Environment, environment_of  # noqa: E402

from sharding.cli import option, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import write_json  # noqa: E402

_START_S = 120  # for a process to import what it needs, on a busy machine


@dataclass(frozen=True)
class Config:
    """Whose loss, and at which sizes."""

    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for the other packages; made, with pip, where it is not there")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all)")
    anchors: list[int] = option([512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536], "2N, embeddings of both views")
    dim: int = option(128, "D, their width")
    temperature: float = option(0.5, "temperature")
    device: Literal["cpu", "cuda"] = option("cpu", "where it is computed")
    rounds: int = option(3, "how often each contender runs at each size")
    timed: float = option(3.0, "seconds that passes are timed for, after a first one; one that takes longer is the only one")
    seconds: float = option(300.0, "a single pass that would take longer is not started")
    cores: int = option(0, "cores that every contender may use (0: all)")
    in_process: bool = option(
        False, "all in this process, which saves the starts of the others: for a GPU, of whose memory torch keeps count"
    )


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    for name, least in (("rounds", 1), ("dim", 1), ("cores", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} is out of range: give at least {least}")
    sizes = sorted(set(config.anchors))
    if not sizes or sizes[0] < 2 or any(size % 2 for size in sizes):
        raise ValueError(f"--anchors {' '.join(map(str, config.anchors))}: give even numbers, two embeddings of each patch")
    cores = config.cores or available_cores()
    if config.in_process and config.device == "cpu":
        raise ValueError("--in-process is for --device cuda: what the others left would be part of a CPU's peak memory")
    if config.in_process and config.peers:
        raise ValueError("--in-process and --peers: packages of another environment need a process of their own; leave one out")
    if cores > available_cores():
        raise ValueError(f"--cores {cores} is out of range: this process may use {available_cores()}")
    console = Console(highlight=False, soft_wrap=True)
    started = machine(cores)
    peers = environment_of(config.peers, names)
    for name, why in peers.missing.items():
        console.print(f"{name}: {why}", markup=False)
    names = [name for name in names if name not in peers.missing]
    path = new_path(Path(config.out), f"ntxent-{config.device}")
    record: dict[str, Any] = {
        **record_of(started, versions_of(["torch"]) | peers.versions),
        "timed": {
            "device": config.device,
            "dim": config.dim,
            "temperature": config.temperature,
            "anchors": sizes,
            "rounds": config.rounds,
            "timed_s": config.timed,
            "seconds": config.seconds,
            "in_process": config.in_process,
        },
        "runs": {name: {} for name in names},
        "not_run": {name: {} for name in names},
        "missing": peers.missing,
        "failed": {},
    }
    for size in sizes:
        task = Task(size, config.dim, config.temperature, config.device, cores, config.timed)
        one_size(task, config, record, path, peers, console)
    record = completed(record)
    conclude(
        record,
        path,
        console,
        markdown=markdown(record),
        tables=((header, rows) for _, header, rows in tables(record)),
        lines=target_lines(record),
    )


def one_size(task: Task, config: Config, record: dict[str, Any], path: Path, peers: Environment, console: Console) -> None:
    """All contenders in turn, round by round, unless it is known that one cannot."""
    runs, not_run, key = record["runs"], record["not_run"], str(task.anchors)
    for name in runs:
        if why := refusal(name, task.anchors, runs, seconds=config.seconds):
            not_run[name][key] = why
            console.print(f"2N = {task.anchors:,}: {name}: not started: {why}", markup=False)
    for number in range(1, config.rounds + 1):
        for name in runs:
            if key in not_run[name]:
                continue
            title = f"2N = {task.anchors:,}, round {number}: {name}"
            try:
                run = one_run(name, task, peers, config.seconds, in_process=config.in_process)
                if wrong := other_loss(run, runs, task.anchors):
                    raise RunFailed(wrong)
                runs[name].setdefault(key, []).append(run)
                if "no_memory" in run:
                    not_run[name][key] = f"no memory: {run['no_memory']}"
                console.print(f"{title}: {not_run[name].get(key) or _shown(run)}", markup=False)
            except RunFailed as error:  # the others' figures are worth having; the exit code tells
                record["failed"][f"{name} at {task.anchors}"] = str(error)
                not_run[name][key] = f"FAILED: {error}"
                console.print(f"{title}: FAILED: {error}", markup=False)
            write_json(path, record)


def one_run(name: str, task: Task, peers: Environment, seconds: float, *, in_process: bool) -> dict[str, Any]:
    """What it reports. Raises RunFailed."""
    limit = time.monotonic() + _START_S + 3 * (seconds + task.timed_s)
    load = machine(task.cores)["load"][0]
    if in_process:
        try:
            return {**ntxent_contenders.measure(CONTENDERS[name], task), "load_before": load}
        except Exception as error:  # as where a process ends with one
            raise RunFailed(f"{type(error).__name__}: {error}") from error

    def watch(_: int) -> None:
        if time.monotonic() > limit:
            raise RunFailed(f"it takes far longer than expected, and than {seconds:g} s")

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        python = peers.python if name in PEERS else sys.executable
        command = [python, str(ntxent_contenders.__file__), name, json.dumps(dataclasses.asdict(task)), str(result)]
        run_fresh(command, Path(folder) / "run.log", watch)
        return {**json.loads(result.read_text()), "load_before": load}


def _shown(run: dict[str, Any]) -> str:
    """A line for who waits; the tables say more."""
    return f"{1000 * run['seconds']:,.1f} ms, {run['peak_bytes'] / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="ntxent.py", description=(__doc__ or "").splitlines()[0]))
