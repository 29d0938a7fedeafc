"""Do trials that share a machine take as long as they should? A grid on Ray Tune against its trials one after another, alone.

    python benchmarks/trials.py --work DISK/bench                                       # on a CPU: one trial for each core
    python benchmarks/trials.py --work DISK/bench --fit 4 --trials 8 --backbone resnet18 --image-size 224 --patches 8192

Alone, a trial is `train/pretrain.py --workers 0` in a process of its own, with the cores that it has in the grid, and its time is
that of its run's record, without starting Python and reading the set. The grid's time is that of the whole command,
`tune/grid.py`, from start to exit. A grid should take at most 1.15 x the sum of the times alone / the number that fit at a time.
With short trials the start of Ray is most of the difference, so the time between the first trial's start and the last one's end
is reported too. The second scenario is 16 tiny cells, eight pretrainings and a linear classifier on each.

Results: <out>/<date>-trials.json and .md.
"""

import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from harness import Result, check_at_least, draw_labelled_set, machine, run_fresh, script
from patch_set import patch_set
from report import Record, Report, Table, Target, judge, medians, target_lines
from worker import ROOT

from sharding.cli import option, required
from sharding.process_pool import available_cores
from train.records.runs import Run

TINY = 16
TARGETS = (
    Target("grid", "ratio", 1.15, "the whole grid / (sum alone / number that fit)", at_least=False),
    Target("grid", "tiny_s", 180.0, f"{TINY} tiny cells, s", at_least=False),
)


@dataclass(frozen=True)
class Config:
    """Which trials, and how many at a time."""

    work: str = required("a folder to work in: drawn images, shard sets and runs stay there")
    out: str = option("benchmarks/results", "folder for the results")
    trials: int = option(4, "trials of the grid")
    fit: int = option(0, "how many at a time; 0: one for each core, or four on a GPU")
    backbone: str = option("test_resnet", "what is pretrained")
    image_size: int = option(64, "side of a view, pixels")
    batch_size: int = option(64, "patches per step")
    patches: int = option(2048, "patches of an epoch")
    epochs: int = option(8, "epochs of a trial")
    rounds: int = option(3, "how often the grid and its trials alone are run")
    tiny: bool = option(True, "also run the 16 tiny cells")


def study_text(fields: Record, shards: str, storage: Path, *, trials: int, cpus: int, gpus: float) -> str:
    """A study file with a pretraining for each seed. YAML takes JSON as it is."""
    stages = {"trial": {"pretrain": fields | {"data": shards, "seed": list(range(1, trials + 1))}}}
    resources = {"pretrain": {"cpus": cpus, "gpus": gpus}}
    return json.dumps({"name": "trials", "storage": str(storage), "stages": stages, "resources": resources})


def tiny_text(shards: str, storage: Path) -> str:
    fields = {"backbone": "test_resnet", "image_size": 32, "batch_size": 32, "epochs": 1, "probe_every": 0, "data": shards}
    stages = {
        "simclr": {"pretrain": fields | {"seed": list(range(1, TINY // 2 + 1))}},
        "linear": {"evaluate": {"data": shards, "backbone": "simclr"}},
    }
    return json.dumps({"name": "tiny", "storage": str(storage), "stages": stages})


def spans(storage: Path) -> tuple[float, float]:
    """Of the runs there: the sum of their own times, and the time from the first one's start to the last one's end; seconds."""
    results = sorted(storage.glob("*/result.json"))
    seconds = [Run(found.parent).record["wall_seconds"] for found in results]
    ends = [found.stat().st_mtime for found in results]
    return sum(seconds), max(ends) - min(end - each for end, each in zip(ends, seconds, strict=True))


def run_grid(text: str, storage: Path) -> Record:
    """seconds of the command; summed, between: of `spans`. Raises RunFailed."""
    path = storage.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    started = time.perf_counter()
    run_fresh([sys.executable, str(ROOT / "tune" / "grid.py"), str(path)], storage.with_suffix(".log"))
    seconds = time.perf_counter() - started
    summed, between = spans(storage)
    return {"seconds": seconds, "summed": summed, "between": between}


def run_alone(fields: Record, shards: str, storage: Path, *, trials: int, cpus: int) -> Record:
    """seconds of all commands; summed: the runs' own times. Raises RunFailed."""
    started = time.perf_counter()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    flags += ["--workers=0", f"--threads={cpus}", "--storage", str(storage)]
    for seed in range(1, trials + 1):
        command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--data", shards, "--name", f"trial-{seed}", *flags]
        run_fresh([*command, f"--seed={seed}"], storage.with_suffix(".log"), environment={"OMP_NUM_THREADS": str(cpus)})
    return {"seconds": time.perf_counter() - started, "summed": spans(storage)[0]}


def main(config: Config) -> None:
    check_at_least(config, trials=2, fit=0, image_size=16, batch_size=2, epochs=1, rounds=1)
    import torch

    gpu, cores = torch.cuda.is_available(), available_cores()
    fit = config.fit or (4 if gpu else cores)
    if fit > cores:
        raise ValueError(f"--fit {fit} is out of range: there are {cores} cores, and a trial needs one")
    result, work = Result(config.out, "trials", ["torch", "ray", "timm"]), Path(config.work).resolve()
    sizes = {"patches": config.patches, "size": config.image_size, "batch_size": config.batch_size}
    shards = patch_set(None, work, cores=cores, **sizes).shards
    fields = {name: getattr(config, name) for name in ("backbone", "image_size", "batch_size", "epochs")} | {"probe_every": 0}
    place = work / "trials" / f"{int(time.time())}-{os.getpid()}"
    place.mkdir(parents=True)
    shared = {"trials": config.trials, "cpus": cores // fit}
    result.record |= {
        "machine": machine(cores) | {"gpu": torch.cuda.get_device_name() if gpu else None},
        "timed": fields | shared | {"fit": fit, "patches": config.patches, "rounds": config.rounds},
        "rounds": [],
        "tiny": [],
    }

    def pair(number: int) -> Record:
        alone = run_alone(fields, shards, place / f"alone-{number}", **shared)
        storage = place / f"grid-{number}"
        text = study_text(fields, shards, storage, gpus=1 / fit if gpu else 0, **shared)
        return {"alone": alone, "grid": run_grid(text, storage)}

    def tiny(number: int) -> Record:
        storage = place / f"tiny-{number}"
        return run_grid(tiny_text(str(draw_labelled_set(work, 240, 48, slides=12, seed=1)), storage), storage)

    def shown(both: Record) -> str:
        return f"alone {both['alone']['summed']:.1f} s, grid {both['grid']['seconds']:.1f} s"

    for number in range(1, config.rounds + 1):
        result.note(result.record["rounds"], f"round {number}", functools.partial(pair, number), shown)
        if config.tiny:
            job = functools.partial(tiny, number)
            result.note(result.record["tiny"], f"tiny, round {number}", job, lambda run: f"{run['seconds']:.1f} s")
    result.finish(report_of(result.record))


def summary_of(record: Record) -> Record:
    """Medians over rounds; ratios within one."""
    rounds: list[Record] = []
    summary: Record = {}
    for each in record["rounds"]:
        found = {"alone_s": each["alone"]["summed"], "grid_s": each["grid"]["seconds"], "between_s": each["grid"]["between"]}
        share = found["alone_s"] / record["timed"]["fit"]
        rounds.append(found | {"ratio": found["grid_s"] / share, "ratio_between": found["between_s"] / share})
    if rounds:
        summary |= medians(rounds, *rounds[0])
    if record["tiny"]:
        tiny = medians(record["tiny"], "seconds", "summed")
        summary |= {"tiny_s": tiny["seconds"], "tiny_cells_s": tiny["summed"]}
    return summary


def report_of(record: Record) -> Report:
    timed, found = record["timed"], summary_of(record)
    record = record | {"summary": found, "targets": judge({"grid": found}, TARGETS)}
    rows = []
    if "ratio" in found:
        whole, ratios = f"the grid, {timed['fit']} at a time: the whole command", (found["ratio"], found["ratio_between"])
        rows += [
            [f"{timed['trials']} trials alone, one after another, summed", f"{found['alone_s']:.1f}", "-"],
            [whole, f"{found['grid_s']:.1f}", f"{ratios[0]:.2f}"],
            ["from its first trial's start to the last one's end", f"{found['between_s']:.1f}", f"{ratios[1]:.2f}"],
        ]
    if "tiny_s" in found:
        rows += [
            [f"{TINY} tiny cells: the whole command", f"{found['tiny_s']:.1f}", "-"],
            ["the cells themselves, summed", f"{found['tiny_cells_s']:.1f}", "-"],
        ]
    text = (
        f"Pretrainings of {timed['backbone']}, {timed['image_size']} px, batch {timed['batch_size']}, {timed['epochs']} epochs of"
        f" {timed['patches']:,} patches, {timed['cpus']} cores each; medians over {timed['rounds']} rounds, ratios within one."
        f" GPU: {record['machine']['gpu'] or 'none'}."
    )
    table = Table(["what", "s", "/ (alone / fit)"], rows)
    return Report(record, "Trials that share a machine", [text, table, *target_lines(record)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
