"""How long does the contrastive loss take, forward and backward, and how much memory: ours, the plain formula, and others?

    python benchmarks/ntxent.py                           # ours and the plain formula, 2N = 512 to 65,536, on the CPU
    python benchmarks/ntxent.py --peers DISK/peers        # lightly's and Spijkervet's too, installed into that folder
    python benchmarks/ntxent.py --device cuda
    python benchmarks/ntxent.py --device cuda --in-process --rounds 1       # in a minute

All contenders get the same embeddings and must compute the same loss. What cannot be installed, does not fit in half of the
memory or would take longer than `--seconds` is in the table with the reason.

Results: <out>/<date>-ntxent-<device>.json and .md.
"""

import itertools
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from contenders.ntxent import CONTENDERS, MEMORY_POWER, Task
from harness import Result, RunFailed, check_at_least, chosen, cores_of, machine, run_contender, script
from peers import Environment, environment_of
from report import Record, Report, Table, cell, medians, missing_lines, number, ratio, target_lines

from sharding.cli import option

Runs = dict[str, dict[str, list[Record]]]  # by contender and anchors, one for each round

TIME_TO_PLAIN = 1.1  # ours, at most
LARGEST, LARGEST_WIDTH, LARGEST_GIB = 65_536, 128, 1.0  # so many anchors of that width need less
_AS_THE_EMBEDDINGS = 1.0  # growth of ours beyond where the plain formula fits, as a multiple of the embeddings' growth
_LOSS_ERROR = 1e-4  # relative; sums of tens of thousands of float32 in another order
_MIB, _GIB = 2**20, 2**30
_START_S = 120  # for a process to import what it needs, on a busy machine


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
    return run_contender("contenders.ntxent", name, task, python=peers.python_of(name), limit=limit)


def _shown(run: Record) -> str:
    return (
        f"no memory: {run['no_memory']}"
        if "no_memory" in run
        else (f"{1000 * run['seconds']:,.1f} ms, {run['peak_bytes'] / _MIB:,.1f} MiB")
    )


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


def summarise(runs: Runs) -> dict[str, dict[str, Record]]:
    """By anchors and contender: medians over the rounds, and ratios within a round."""
    measured = {
        name: {size: found for size, found in sizes.items() if found and not any("no_memory" in run for run in found)}
        for name, sizes in runs.items()
    }
    summary = {}
    for size in map(str, sorted({int(size) for found in measured.values() for size in found})):
        here = {name: found[size] for name, found in measured.items() if size in found}
        summary[size] = {
            name: {
                **medians(found, "seconds", "peak_bytes"),
                "time_to_plain": ratio(found, here.get("plain"), "seconds"),
                "time_to_ours": ratio(found, here.get("ours"), "seconds"),
            }
            for name, found in here.items()
        }
    return summary


def judged(summary: dict[str, dict[str, Record]], dim: int) -> list[Record]:
    """Each target with what was reached (None: not measured) and whether that is enough."""
    found: list[Record] = []

    def target(text: str, reached: float | None, wanted: float) -> None:
        enough = None if reached is None else reached <= wanted
        found.append({"text": text, "reached": reached, "wanted": wanted, "at_least": False, "enough": enough})

    for size, here in summary.items():
        if "plain" in here:
            reached = here.get("ours", {}).get("time_to_plain")
            target(f"2N = {int(size):,}: ours, its time as a multiple of the plain formula's", reached, TIME_TO_PLAIN)
    largest = summary.get(str(LARGEST), {}).get("ours", {}).get("peak_bytes") if dim == LARGEST_WIDTH else None
    text = f"2N = {LARGEST:,}, D = {LARGEST_WIDTH}: ours, GiB beyond the embeddings"
    target(text, None if largest is None else largest / _GIB, LARGEST_GIB)
    both = [int(size) for size, here in summary.items() if "ours" in here and "plain" in here]
    mine = [int(size) for size, here in summary.items() if "ours" in here]
    grown = None
    if both and max(mine) > max(both):
        first, last = max(both), max(mine)
        grown = summary[str(last)]["ours"]["peak_bytes"] / summary[str(first)]["ours"]["peak_bytes"] * first / last
    text = "beyond the largest 2N of the plain formula: growth of ours in memory, as a multiple of the embeddings'"
    target(text, grown, _AS_THE_EMBEDDINGS)
    return found


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing: times and memory, with the reason where a contender was not run."""
    timed, names, summary = record["timed"], list(record["runs"]), summarise(record["runs"])
    record = record | {"summary": summary, "targets": judged(summary, timed["dim"])}
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
        cells = [number(1000 * here[name]["seconds"]) if name in here else why[name] for name in names]
        found = [here.get("ours", {}).get("time_to_plain"), *(here.get(name, {}).get("time_to_ours") for name in others)]
        times.append([f"{anchors:,}", *cells, *map(cell, found)])
        cells = [number(here[name]["peak_bytes"] / _MIB) if name in here else why[name] for name in names]
        peaks.append([f"{anchors:,}", f"{2 * anchors * timed['dim'] * 4 / _MIB:.1f}", *cells])
    titles = [CONTENDERS[name].title for name in names]
    ratios = ["ours / plain", *(f"{CONTENDERS[name].title} / ours" for name in others)]
    tables = Table(["2N", *titles, *ratios], times), Table(["2N", "embeddings and gradient", *titles], peaks)
    return Report(
        record, "NT-Xent", [speed, tables[0], memory, tables[1], *target_lines(record), *missing_lines(record, CONTENDERS)]
    )


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
