"""How long does the contrastive loss take, forward and backward, and how much memory: ours, the plain formula, and others?

    python benchmarks/ntxent.py                           # ours and the plain formula, 2N = 512 to 65,536, on the CPU
    python benchmarks/ntxent.py --peers DISK/peers        # lightly's and Spijkervet's too, installed into that folder
    python benchmarks/ntxent.py --device cuda
    python benchmarks/ntxent.py --device cuda --in-process --rounds 1       # in a minute

All contenders get the same embeddings and must compute the same loss. What cannot be installed, does not fit in half of the
memory or would take longer than `--seconds` is in the table with the reason.

Results: <out>/<date>-ntxent-<device>.json and .md.
"""

import functools
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness import Result, RunFailed, check_at_least, chosen, cores_of, machine, run_contender, script
from peers import Environment, environment_of
from report import Record, Report, Table, Target, cell, judge, missing_lines, number, summarise, target_lines
from worker import Contender, own_memory, synchronize

from sharding.cli import option

Runs = dict[str, dict[str, list[Record]]]  # by contender and anchors, one for each round

TIME_TO_PLAIN = 1.1  # ours, at most
LARGEST, LARGEST_WIDTH, LARGEST_GIB = 65_536, 128, 1.0  # so many anchors of that width need less
_LOSS_ERROR = 1e-4  # relative; sums of tens of thousands of float32 in another order
_MIB, _GIB = 2**20, 2**30
_UNITS = (("seconds", 1000.0), ("peak_bytes", 1 / _MIB))  # of the tables
_START_S = 120  # for a process to import what it needs, on a busy machine
_WARM_PATCHES = 4  # of a first run that loads whatever is loaded once


@dataclass(frozen=True)
class Task:
    """anchors: 2N, embeddings of both views; dim: D; timed_s: passes are timed for so long, or a single one that takes longer."""

    anchors: int
    dim: int
    temperature: float
    device: str
    cores: int
    timed_s: float
    seed: int = 42


# ---- The contenders ----

# (V, B, D) embeddings -> the loss. It is made for batches of B patches: (B, temperature, device) -> Loss
Loss = Callable[[Any], Any]


def ours(patches: int, temperature: float, device: str) -> Loss:
    from models.ntxent import nt_xent

    return lambda z_VBD: nt_xent(z_VBD, temperature)


def plain(patches: int, temperature: float, device: str) -> Loss:
    """The formula as it is usually written: all similarities at once, and a cross entropy that picks the other view."""
    import torch
    import torch.nn.functional as F

    def loss(z_VBD):
        u_MD = F.normalize(z_VBD.flatten(0, 1), dim=1)
        s_MM = (u_MD @ u_MD.T / temperature).fill_diagonal_(-torch.inf)
        positive_M = (torch.arange(2 * patches, device=device) + patches) % (2 * patches)
        return F.cross_entropy(s_MM, positive_M)

    return loss


def lightly(patches: int, temperature: float, device: str) -> Loss:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=temperature)
    return lambda z_VBD: criterion(z_VBD[0], z_VBD[1])


def simclr(patches: int, temperature: float, device: str) -> Loss:
    from simclr.modules import NT_Xent

    criterion = NT_Xent(patches, temperature, 1).to(device)
    return lambda z_VBD: criterion(z_VBD[0], z_VBD[1])


# ---- The measurement ----


def measure(make: Callable[[int, float, str], Loss], task: Task) -> dict[str, Any]:
    """seconds: of a forward and backward pass, median of `runs`; peak_bytes: beyond the embeddings and their gradient; loss;
    budget_bytes: half of the device's memory. Or `no_memory`, what was said where it could not be had."""
    import torch

    if task.device == "cuda":
        torch.cuda.empty_cache()  # of those that ran before in the same process
    patches = task.anchors // 2
    warm_VBD = torch.randn(2, _WARM_PATCHES, task.dim).to(task.device).requires_grad_()
    _run(make(_WARM_PATCHES, task.temperature, task.device), warm_VBD)
    # Drawn on the CPU, so that it is the same everywhere.
    z_VBD = torch.randn(2, patches, task.dim, generator=torch.Generator().manual_seed(task.seed)).to(task.device)
    z_VBD.requires_grad_()
    z_VBD.grad = torch.zeros_like(z_VBD)
    budget = _half_of_the_memory(task.device)
    if task.device == "cpu":
        _limit_memory(budget)
    before = _start_of_peak(task.device)
    try:
        criterion = make(patches, task.temperature, task.device)
        seconds, loss = _run(criterion, z_VBD)
        peak = _peak(task.device) - before
        times = [seconds] if seconds >= task.timed_s else []  # otherwise the first one, into fresh memory, is none of them
        while sum(times) < task.timed_s:
            times.append(_run(criterion, z_VBD)[0])
    except (RuntimeError, MemoryError) as error:  # torch's error on the GPU is a RuntimeError too
        said = str(error).strip().splitlines()[0] if str(error).strip() else "MemoryError"
        if not isinstance(error, MemoryError) and not any(words in said for words in ("allocate memory", "out of memory")):
            raise
        return {"no_memory": said, "budget_bytes": budget}
    found = {"seconds": statistics.median(times), "runs": len(times), "first_s": seconds, "peak_bytes": peak}
    return {**found, "loss": loss, "budget_bytes": budget}


def _run(criterion: Loss, z_VBD: Any) -> tuple[float, float]:
    """Seconds, and the loss."""
    synchronize(z_VBD.device.type)
    started = time.perf_counter()
    loss = criterion(z_VBD)
    loss.backward()
    synchronize(z_VBD.device.type)
    return time.perf_counter() - started, loss.item()


def _half_of_the_memory(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1] // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _limit_memory(more_bytes: int) -> None:
    """What asks for more fails to allocate, instead of taking the machine's last."""
    limit = own_memory("VmData") + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _start_of_peak(device: str) -> int:
    """Bytes in use now. From here on the peak is kept."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (Linux, proc_pid_clear_refs(5))
    return own_memory("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return own_memory("VmHWM")


# In the order of the rounds
CONTENDERS = {
    "plain": Contender("plain formula", functools.partial(measure, plain)),
    "ours": Contender("ours", functools.partial(measure, ours)),
    "lightly": Contender("lightly NTXentLoss", functools.partial(measure, lightly)),
    "simclr": Contender("Spijkervet's NT_Xent", functools.partial(measure, simclr)),
}
MEMORY_POWER = {"ours": 1, "plain": 2, "lightly": 2, "simclr": 2}  # of the anchors, by which memory grows


# ---- The command ----


@dataclass(frozen=True)
class Config:
    """Whose loss, and at which sizes."""

    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for the other packages; made with pip where it is missing")
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
    check_at_least(config, rounds=1, dim=1)
    sizes = sorted(set(config.anchors))
    if not sizes or sizes[0] < 2 or any(size % 2 for size in sizes):
        raise ValueError(f"--anchors {' '.join(map(str, config.anchors))}: give even numbers, two embeddings of each patch")
    cores = cores_of(config.cores)
    if config.in_process and config.device == "cpu":
        raise ValueError("--in-process is for --device cuda: what the others left would be part of a CPU's peak memory")
    if config.in_process and config.peers:
        raise ValueError("--in-process and --peers: packages of another environment need a process of their own; leave one out")
    result = Result(config.out, f"ntxent-{config.device}", ["torch"], cores=cores)
    peers = environment_of(config.peers, names)
    names = result.leave_out(peers.missing, names)
    timed = {name: getattr(config, name) for name in ("device", "dim", "temperature", "rounds", "seconds", "in_process")}
    result.record |= {
        "timed": timed | {"anchors": sizes, "timed_s": config.timed},
        "runs": {name: {} for name in names},
        "not_run": {name: {} for name in names},
    }
    result.record["versions"] |= peers.versions
    for size in sizes:
        one_size(Task(size, config.dim, config.temperature, config.device, cores, config.timed), config, result, peers)
    result.finish(report_of(result.record))


def one_size(task: Task, config: Config, result: Result, peers: Environment) -> None:
    """All contenders in turn, round by round, unless it is known that one cannot."""
    runs, not_run, key = result.record["runs"], result.record["not_run"], str(task.anchors)
    for name in runs:
        if why := refusal(name, task.anchors, runs, seconds=config.seconds):
            not_run[name][key] = why
            result.say(f"2N = {task.anchors:,}: {name}: not started: {why}")

    def measure(name: str) -> Record:
        run = one_run(name, task, peers, config.seconds, in_process=config.in_process)
        if wrong := other_loss(run, runs, task.anchors):
            raise RunFailed(wrong)
        return run

    for number_, name in itertools.product(range(1, config.rounds + 1), runs):
        if key not in not_run[name]:
            title, failure = f"2N = {task.anchors:,}, round {number_}: {name}", f"{name} at {task.anchors}"
            run = result.attempt(failure, title, lambda name=name: measure(name), _shown)  # type: ignore[misc]
            if run is None:
                not_run[name][key] = f"FAILED: {result.record['failed'][failure]}"
            else:
                runs[name].setdefault(key, []).append(run)
                if "no_memory" in run:
                    not_run[name][key] = f"no memory: {run['no_memory']}"
            result.save()


def one_run(name: str, task: Task, peers: Environment, seconds: float, *, in_process: bool) -> Record:
    """What it reports. Raises RunFailed."""
    if in_process:
        load, run = machine(task.cores)["load"][0], CONTENDERS[name].run
        assert run is not None
        try:
            return {**run(task), "load_before": load}
        except Exception as error:  # as where a process ends with one
            raise RunFailed(f"{type(error).__name__}: {error}") from error
    limit = _START_S + 3 * (seconds + task.timed_s)
    return run_contender("ntxent", name, task, python=peers.python_of(name), limit=limit)


def _shown(run: Record) -> str:
    if "no_memory" in run:
        return f"no memory: {run['no_memory']}"
    return f"{1000 * run['seconds']:,.1f} ms, {run['peak_bytes'] / _MIB:,.1f} MiB"


def refusal(name: str, anchors: int, runs: Runs, *, seconds: float) -> str | None:
    """Why a contender is not started at this size, from what the largest size before it took; None: it is.

    Time grows with the square of the anchors, memory with the contender's own power of them.
    """
    before = {int(size): found for size, found in runs.get(name, {}).items() if found and int(size) < anchors}
    if not before:
        return None
    size = max(before)
    found, factor = before[size], anchors / size
    if any("no_memory" in run for run in found):
        return f"no memory at {size:,}"
    need = statistics.median(run["peak_bytes"] for run in found) * factor ** MEMORY_POWER[name]
    if need > found[-1]["budget_bytes"]:
        return f"needs about {need / _GIB:.1f} GiB"
    expected = statistics.median(run["seconds"] for run in found) * factor**2
    return f"takes about {expected:,.0f} s" if expected > seconds else None


def other_loss(run: Record, runs: Runs, anchors: int) -> str | None:
    """What is wrong with a run whose loss is not that of the contender before it at this size; None: nothing."""
    for name, sizes in runs.items():
        for other in sizes.get(str(anchors), []):
            if "loss" in run and "loss" in other and not abs(run["loss"] / other["loss"] - 1) < _LOSS_ERROR:
                return f"its loss is {run['loss']:.6g}, that of {CONTENDERS[name].title} {other['loss']:.6g}"
    return None


# ---- The report ----


def summary_of(runs: Runs) -> dict[str, Record]:
    """By anchors and contender: medians over the rounds, and ratios within a round."""
    summary = {}
    for size in sorted({size for sizes in runs.values() for size in sizes}, key=int):
        here = {name: found for name, sizes in runs.items() if (found := sizes.get(size)) and "no_memory" not in found[-1]}
        ratios = {f"time_to_{other}": (other, "seconds") for other in ("plain", "ours")}
        if here:
            summary[size] = summarise(here, "seconds", "peak_bytes", ratios=ratios)
    return summary


def targets_of(summary: dict[str, Record], dim: int) -> list[Record]:
    """Each target with what was reached (None: not measured) and whether that is enough."""
    texts = {size: f"2N = {int(size):,}: ours, its time as a multiple of the plain formula's" for size in summary}
    targets = [Target(f"{size} ours", "time_to_plain", TIME_TO_PLAIN, text, False) for size, text in texts.items()]
    rows: dict[str, Record] = {f"{size} {name}": row for size, here in summary.items() for name, row in here.items()}
    targets = [target for target in targets if f"{target.row.split()[0]} plain" in rows]
    largest = rows.get(f"{LARGEST} ours", {}).get("peak_bytes") if dim == LARGEST_WIDTH else None
    mine = [int(size) for size, here in summary.items() if "ours" in here]
    both = [size for size in mine if "plain" in summary[str(size)]]
    grown = None
    if both and max(mine) > max(both):
        first, last = max(both), max(mine)
        grown = rows[f"{last} ours"]["peak_bytes"] / rows[f"{first} ours"]["peak_bytes"] * first / last
    rows["memory"] = {"largest": largest and largest / _GIB, "grown": grown}
    at_largest = f"2N = {LARGEST:,}, D = {LARGEST_WIDTH}: ours, GiB beyond the embeddings"
    beyond = "beyond the largest 2N of the plain formula: growth of ours in memory, as a multiple of the embeddings'"
    targets += [Target("memory", "largest", LARGEST_GIB, at_largest, False), Target("memory", "grown", 1.0, beyond, False)]
    return judge(rows, targets)


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing: times and memory, with the reason where a contender was not run."""
    timed, names, summary = record["timed"], list(record["runs"]), summary_of(record["runs"])
    record = record | {"summary": summary, "targets": targets_of(summary, timed["dim"])}
    others = [name for name in names if name not in ("ours", "plain")]
    where = "the one process" if timed["in_process"] else "a fresh process"
    kind = "resident memory of the process" if timed["device"] == "cpu" else "what torch has allocated"
    speed = (
        f"Milliseconds of a forward and backward pass in float32 on the {timed['device']}, D = {timed['dim']}; medians over"
        f" {timed['rounds']} rounds, in each of which {where} runs for {timed['timed_s']:g} s, or once where that takes longer."
        " Ratios are medians of the ratios within a round."
    )
    memory = (
        f"Peak memory of a first pass in MiB, beyond the embeddings and their gradient ({kind}). What needs more than half of"
        f" the memory, by the last size's measurement, is not started; nor is what would take longer than {timed['seconds']:g} s."
    )
    times, peaks = [], []
    for anchors in timed["anchors"]:
        here: dict[str, Any] = summary.get(str(anchors), {})
        why = {name: record["not_run"].get(name, {}).get(str(anchors), "-") for name in names}
        cells = [[number(here[name][key] * scale) if name in here else why[name] for name in names] for key, scale in _UNITS]
        found = [here.get("ours", {}).get("time_to_plain"), *(here.get(name, {}).get("time_to_ours") for name in others)]
        times.append([f"{anchors:,}", *cells[0], *map(cell, found)])
        peaks.append([f"{anchors:,}", f"{2 * anchors * timed['dim'] * 4 / _MIB:.1f}", *cells[1]])
    titles = [CONTENDERS[name].title for name in names]
    ratios = ["ours / plain", *(f"{CONTENDERS[name].title} / ours" for name in others)]
    tables = Table(["2N", *titles, *ratios], times), Table(["2N", "embeddings and gradient", *titles], peaks)
    lines = [*target_lines(record), *missing_lines(record, CONTENDERS)]
    return Report(record, "NT-Xent", [speed, tables[0], memory, tables[1], *lines])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
