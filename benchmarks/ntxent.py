"""How long does the contrastive loss take, forward and backward, and how much memory: ours, the plain formula, and others?

    python benchmarks/ntxent.py                           # ours and the plain formula, 2N = 512 to 65,536, on the CPU
    python benchmarks/ntxent.py --peers DISK/peers        # lightly's and Spijkervet's too, installed into that folder
    python benchmarks/ntxent.py --device cuda             # without --peers all in one process, which saves their starts

All contenders get the same embeddings and must compute the same loss. What cannot be installed, or does not fit in half of the
memory, is in the table with the reason.

Results: <out>/<date>-ntxent-<device>.json and .md.
"""

import functools
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness import Result, RunFailed, check_at_least, chosen, cores_of, run_contender, script
from peers import Environment, environment_of
from report import Record, Report, Target, judge, missing_lines, rounds_table, summarise, target_lines
from worker import Contender, own_memory, synchronize

from sharding.cli import option

Runs = dict[str, list[Record]]  # by "<anchors> <contender>", one for each round

TIME_TO_PLAIN = 1.1  # ours, at most
LARGEST, DIM, LARGEST_GIB = 65_536, 128, 1.0  # ours needs at most so much memory for so many anchors of that width
_LOSS_ERROR = 1e-4  # relative; sums of tens of thousands of float32 in another order
_MIB, _GIB = 2**20, 2**30
TEMPERATURE = 0.5
_LIMIT_S = 1200.0  # after which a process is given up
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
    peak_since = _peak_since(task.device)
    try:
        criterion = make(patches, task.temperature, task.device)
        seconds, loss = _run(criterion, z_VBD)
        peak = peak_since()
        times = [seconds] if seconds >= task.timed_s else []  # otherwise the first one, into fresh memory, is none of them
        while sum(times) < task.timed_s:
            times.append(_run(criterion, z_VBD)[0])
    except (RuntimeError, MemoryError) as error:  # torch's error on the GPU is a RuntimeError too
        said = (str(error).strip() or "out of memory").splitlines()[0]
        if not isinstance(error, MemoryError) and not any(words in said for words in ("allocate memory", "out of memory")):
            raise
        return {"no_memory": said, "budget_bytes": budget}
    found = {"seconds": statistics.median(times), "runs": len(times), "peak_bytes": peak}
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


def _peak_since(device: str) -> Callable[[], int]:
    """Tells how many bytes more than now were in use at most since now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (Linux, proc_pid_clear_refs(5))
    before = own_memory("VmRSS")
    return lambda: own_memory("VmHWM") - before


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
    device: Literal["cpu", "cuda"] = option("cpu", "where it is computed")
    rounds: int = option(3, "how often each contender runs at each size")
    timed: float = option(3.0, "seconds that passes are timed for, after a first one; one that takes longer is the only one")
    cores: int = option(0, "cores that every contender may use (0: all)")


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    check_at_least(config, rounds=1)
    sizes = sorted(set(config.anchors))
    if not sizes or sizes[0] < 2 or any(size % 2 for size in sizes):
        raise ValueError(f"--anchors {' '.join(map(str, config.anchors))}: give even numbers, two embeddings of each patch")
    cores = cores_of(config.cores)
    result = Result(config.out, f"ntxent-{config.device}", ["torch"], cores=cores)
    peers = environment_of(config.peers, names)
    names = result.leave_out(peers.missing, names)
    # On a GPU torch keeps count of the memory. On a CPU what the others left would be part of the peak.
    in_process = config.device == "cuda" and config.peers is None
    timed = {"device": config.device, "rounds": config.rounds, "timed_s": config.timed, "anchors": sizes, "dim": DIM}
    result.record |= {"timed": timed | {"in_process": in_process}, "runs": {}, "not_run": {}}
    result.record["versions"] |= peers.versions
    for size in sizes:
        task = Task(size, DIM, TEMPERATURE, config.device, cores, config.timed)
        one_size(task, names, config.rounds, result, None if in_process else peers)
    result.finish(report_of(result.record))


def one_size(task: Task, names: list[str], rounds: int, result: Result, peers: Environment | None) -> None:
    """All contenders in turn, round by round, unless it is known that one cannot."""
    runs, not_run, keys = result.record["runs"], result.record["not_run"], {f"{task.anchors} {name}": name for name in names}
    for key, name in keys.items():
        if why := refusal(name, task.anchors, runs, not_run):
            not_run[key] = why
            result.say(f"{key}: not started: {why}")

    def measure(key: str) -> Record:
        run = one_run(keys[key], task, peers)
        for other in keys:
            if wrong := other_loss(run, runs.get(other, [])):
                raise RunFailed(f"{wrong} of {other}")
        return run

    result.rounds([key for key in keys if key not in not_run], rounds, measure, _shown)
    for key in keys:
        if said := [run["no_memory"] for run in runs.get(key, []) if "no_memory" in run]:
            runs[key], not_run[key] = [], f"no memory: {said[0]}"


def one_run(name: str, task: Task, peers: Environment | None) -> Record:
    """What it reports, from a fresh process; without peers from this one. Raises RunFailed."""
    if peers is not None:
        return run_contender("ntxent", name, task, python=peers.python_of(name), limit=_LIMIT_S)
    run = CONTENDERS[name].run
    assert run is not None
    try:
        return run(task)
    except Exception as error:  # as where a process ends with one
        raise RunFailed(f"{type(error).__name__}: {error}") from error


def _shown(run: Record) -> str:
    if "no_memory" in run:
        return f"no memory: {run['no_memory']}"
    return f"{1000 * run['seconds']:,.1f} ms, {run['peak_bytes'] / _MIB:,.1f} MiB"


def refusal(name: str, anchors: int, runs: Runs, not_run: dict[str, str]) -> str | None:
    """Why a contender is not started at this size, from what it needed at smaller ones; None: it is."""
    smaller = {int(size): key for key in (*runs, *not_run) for size, who in [key.split()] if who == name and int(size) < anchors}
    if measured := [size for size, key in smaller.items() if runs.get(key)]:
        found, factor = runs[smaller[max(measured)]], anchors / max(measured)
        need = statistics.median(run["peak_bytes"] for run in found) * factor ** MEMORY_POWER[name]
        if need > found[-1]["budget_bytes"]:
            return f"needs about {need / _GIB:.1f} GiB"
    if any(not_run.get(key, "").startswith("no memory") for key in smaller.values()):
        return "no memory for a smaller size"
    return None


def other_loss(run: Record, others: list[Record]) -> str | None:
    """What is wrong with a run whose loss is not that of the others; None: nothing."""
    for other in others:
        if "loss" in run and "loss" in other and not abs(run["loss"] / other["loss"] - 1) < _LOSS_ERROR:
            return f"its loss is {run['loss']:.6g} and not the {other['loss']:.6g}"
    return None


# ---- The report ----


def summary_of(runs: Runs) -> dict[str, Record]:
    """By anchors and contender: medians over the rounds, and ratios within a round."""
    by_size: dict[str, Runs] = {}
    for key, found in runs.items():
        size, name = key.split()
        by_size.setdefault(size, {})[name] = found
    ratios = {f"time_to_{other}": (other, "seconds") for other in ("plain", "ours")}
    return {size: summarise(here, "seconds", "peak_bytes", ratios=ratios) for size, here in by_size.items()}


def targets_of(summary: dict[str, Record]) -> list[Record]:
    """Each target with what was reached (None: not measured) and whether that is enough."""
    rows = {size: here["ours"] for size, here in summary.items() if "ours" in here}
    text = "2N = {:,}: ours, its time as a multiple of the plain formula's"
    targets = [
        Target(size, "time_to_plain", TIME_TO_PLAIN, text.format(int(size)), at_least=False)
        for size, row in rows.items()
        if row["time_to_plain"] is not None
    ]
    if largest := rows.get(str(LARGEST)):
        largest["peak_gib"] = largest["peak_bytes"] / _GIB
    text = f"2N = {LARGEST:,}, D = {DIM}: ours, GiB beyond the embeddings"
    return judge(rows, [*targets, Target(str(LARGEST), "peak_gib", LARGEST_GIB, text, at_least=False)])


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing: times and memory, with the reason where a contender was not run."""
    timed, summary = record["timed"], summary_of(record["runs"])
    record = record | {"summary": summary, "targets": targets_of(summary)}
    where = "the one process" if timed["in_process"] else "a fresh process"
    kind = "resident memory of the process" if timed["device"] == "cpu" else "what torch has allocated"
    text = (
        f"Seconds of a forward and backward pass in float32 on the {timed['device']}, D = {timed['dim']}; medians over"
        f" {timed['rounds']} rounds, in each of which {where} runs for {timed['timed_s']:g} s, or once where that takes longer."
        f" Ratios are medians of the ratios within a round. MiB: peak memory of a first pass, beyond the embeddings and their"
        f" gradient ({kind}). What needs more than half of the memory, by the last size's measurement, is not started."
    )
    rows = {
        f"{size} {name}": row | {"mib": row["peak_bytes"] / _MIB} for size, here in summary.items() for name, row in here.items()
    }
    titles = {
        key: f"2N = {int(key.split()[0]):,}: {CONTENDERS[key.split()[1]].title}"
        for key in (*rows, *record["not_run"], *record["failed"])
    }
    columns = {"MiB": ("mib", ",.4g"), "time / plain": ("time_to_plain", ".2f"), "time / ours": ("time_to_ours", ".2f")}
    table = rounds_table(record | {"summary": rows}, titles, "seconds", "s", columns)
    not_run = [f"- {titles[key]}: {why}" for key, why in record["not_run"].items()]
    return Report(record, "NT-Xent", [text, table, *not_run, *target_lines(record), *missing_lines(record, CONTENDERS)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
