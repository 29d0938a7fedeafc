"""Do trials that share a machine take as long as they should? A grid on Ray Tune against its trials one after another, alone.

    python benchmarks/trials.py --work DISK/bench                                       # on a CPU: one trial for each core
    python benchmarks/trials.py --work DISK/bench --fit 4 --trials 8 --backbone resnet18 --image-size 224 --patches 8192

Alone, a trial is `train/pretrain.py --workers 0` in a process of its own, with the cores that it has in the grid, and its time is
that of its run's record: starting Python and reading the set are not in it. The grid's time is that of the whole command,
`tune/grid.py`, from start to exit, with Ray and the tables. Both run in turn, round by round. What a grid should take at most is
1.15 x the sum of the times alone / the number that fit at a time; with short trials the start of Ray is most of the difference,
so the time between the first trial's beginning and the last one's end stands beside it.

The second scenario is 16 tiny cells, eight pretrainings and a linear classifier on each, through the same command.

Results go to <out>/<date>-trials.json, written after every run, and at the end as a table to the same name's .md. A target that
was not reached is printed as MISSED; where a process failed, the exit code is 1.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from measuring import (  # noqa: E402
    RunFailed,
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
from patch_set import patch_set  # noqa: E402

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.drawn_patches.dataset import DrawConfig, draw_set  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import Run, write_json  # noqa: E402

Record = dict[str, Any]
MOST_PACKED = 1.15  # of the times alone, shared out
MOST_TINY_S, TINY = 180.0, 16


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


def study_text(fields: dict[str, Any], shards: str, storage: Path, *, trials: int, cpus: int, gpus: float) -> str:
    """A study file with a pretraining for each seed. YAML takes JSON as it is."""
    return json.dumps(
        {
            "name": "trials",
            "storage": str(storage),
            "stages": {"trial": {"pretrain": fields | {"data": shards, "seed": list(range(1, trials + 1))}}},
            "resources": {"pretrain": {"cpus": cpus, "gpus": gpus}},
        }
    )


def tiny_text(shards: str, storage: Path) -> str:
    fields = {"backbone": "test_resnet", "image_size": 32, "batch_size": 32, "epochs": 1, "probe_every": 0, "data": shards}
    return json.dumps(
        {
            "name": "tiny",
            "storage": str(storage),
            "stages": {
                "simclr": {"pretrain": fields | {"seed": list(range(1, TINY // 2 + 1))}},
                "linear": {"evaluate": {"data": shards, "backbone": "simclr"}},
            },
        }
    )


def spans(runs: list[Run]) -> tuple[float, float]:
    """Sum of the runs' own times, and time from the first one's beginning to the last one's end; seconds."""
    seconds = [run.record["wall_seconds"] for run in runs]
    ends = [(run.folder / "result.json").stat().st_mtime for run in runs]
    begins = [end - each for end, each in zip(ends, seconds, strict=True)]
    return sum(seconds), max(ends) - min(begins)


def run_grid(text: str, storage: Path, log: Path) -> Record:
    """seconds of the command; summed, between: of `spans`; cells. Raises RunFailed."""
    path = storage.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    started = time.perf_counter()
    run_fresh([sys.executable, str(ROOT / "tune" / "grid.py"), str(path)], log)
    seconds = time.perf_counter() - started
    runs = [Run(found.parent) for found in sorted(storage.glob("*/result.json"))]
    summed, between = spans(runs)
    return {"seconds": seconds, "summed": summed, "between": between, "cells": len(runs)}


def run_alone(fields: dict[str, Any], shards: str, storage: Path, log: Path, *, trials: int, cpus: int) -> Record:
    """seconds of all commands; summed: the runs' own times. Raises RunFailed."""
    started = time.perf_counter()
    for seed in range(1, trials + 1):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
        threads = ["env", f"OMP_NUM_THREADS={cpus}"]
        command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--data", shards, "--name", f"trial-{seed}", *flags]
        run_fresh(
            [*threads, *command, f"--seed={seed}", "--workers=0", f"--threads={cpus}", "--storage", str(storage)],
            log,
        )
    runs = [Run(found.parent) for found in sorted(storage.glob("*/result.json"))]
    return {"seconds": time.perf_counter() - started, "summed": spans(runs)[0], "cells": len(runs)}


def main(config: Config) -> None:
    for name, least in (("trials", 2), ("fit", 0), ("image_size", 16), ("batch_size", 2), ("epochs", 1), ("rounds", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is out of range: give at least {least}")
    import torch

    gpu = torch.cuda.is_available()
    fit, cores = config.fit or (4 if gpu else available_cores()), available_cores()
    if fit > cores:
        raise ValueError(f"--fit {fit} is out of range: there are {cores} cores, and a trial needs one")
    cpus = cores // fit
    console, path = Console(highlight=False, soft_wrap=True), new_path(Path(config.out), "trials")
    work = Path(config.work).resolve()
    images = patch_set(
        None, work, patches=config.patches, size=config.image_size, batch_size=config.batch_size, cores=available_cores()
    )
    fields = {
        "backbone": config.backbone,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "probe_every": 0,
    }
    place = work / "trials" / f"{int(time.time())}-{os.getpid()}"
    place.mkdir(parents=True)
    at = machine(cores) | {"gpu": torch.cuda.get_device_name() if gpu else None}
    record: Record = {
        **record_of(at, versions_of(["torch", "ray", "timm"])),
        "timed": fields | {"trials": config.trials, "fit": fit, "cpus": cpus, "patches": config.patches, "rounds": config.rounds},
        "rounds": [],
        "tiny": [],
        "failed": {},
    }
    sizes = {"trials": config.trials, "cpus": cpus}
    for number in range(1, config.rounds + 1):
        try:
            alone = run_alone(fields, images.shards, place / f"alone-{number}", place / f"alone-{number}.log", **sizes)
            storage = place / f"grid-{number}"
            text = study_text(fields, images.shards, storage, gpus=1 / fit if gpu else 0, **sizes)
            grid = run_grid(text, storage, place / f"grid-{number}.log")
            record["rounds"].append({"alone": alone, "grid": grid})
            console.print(f"round {number}: alone {alone['summed']:.1f} s, grid {grid['seconds']:.1f} s", markup=False)
        except RunFailed as error:  # the others' figures are worth having; the exit code tells
            record["failed"][f"round {number}"] = str(error)
        if config.tiny:
            try:
                storage = place / f"tiny-{number}"
                record["tiny"].append(run_grid(tiny_text(_tiny_set(work), storage), storage, place / f"tiny-{number}.log"))
                console.print(f"round {number}: {TINY} tiny cells {record['tiny'][-1]['seconds']:.1f} s", markup=False)
            except RunFailed as error:
                record["failed"][f"tiny, round {number}"] = str(error)
        write_json(path, record)
    record["summary"] = summarise(record)
    record["targets"] = judge(record["summary"])
    header, rows = table(record)
    conclude(record, path, console, markdown=markdown(record), tables=[(header, rows)], lines=target_lines(record))


def _tiny_set(work: Path) -> str:
    images = draw_set(DrawConfig(out=str(work / "tiny-images"), organ="breast", patches=240, size=48, slides=12, seed=1))
    layout = "{class}/{slide}/{name}"
    return str(build_shards([images], work / "tiny-shards", layout=layout, group_by="slide", split="train=0.7,test=0.3").out)


def summarise(record: Record) -> Record:
    """Medians over rounds; ratios within one."""
    fit, rounds, tiny = record["timed"]["fit"], record["rounds"], record["tiny"]
    summary: Record = {}
    if rounds:
        middle = statistics.median
        summary |= {
            "alone_s": middle(each["alone"]["summed"] for each in rounds),
            "grid_s": middle(each["grid"]["seconds"] for each in rounds),
            "between_s": middle(each["grid"]["between"] for each in rounds),
            "ratio": middle(each["grid"]["seconds"] / (each["alone"]["summed"] / fit) for each in rounds),
            "ratio_between": middle(each["grid"]["between"] / (each["alone"]["summed"] / fit) for each in rounds),
        }
    if tiny:
        summary["tiny_s"] = statistics.median(each["seconds"] for each in tiny)
        summary["tiny_cells_s"] = statistics.median(each["summed"] for each in tiny)
    return summary


def judge(summary: Record) -> list[Record]:
    """The targets with what was reached (None: not measured)."""
    wanted = [
        ("the whole grid / (sum alone / number that fit)", "ratio", MOST_PACKED),
        (f"{TINY} tiny cells, s", "tiny_s", MOST_TINY_S),
    ]
    return [
        {
            "text": text,
            "reached": summary.get(key),
            "wanted": most,
            "enough": None if key not in summary else summary[key] <= most,
        }
        for text, key, most in wanted
    ]


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    found, timed = record["summary"], record["timed"]
    rows = []
    if "ratio" in found:
        rows += [
            [f"{timed['trials']} trials alone, one after another, summed", f"{found['alone_s']:.1f}", "-"],
            [f"the grid, {timed['fit']} at a time: the whole command", f"{found['grid_s']:.1f}", f"{found['ratio']:.2f}"],
            [
                "from its first trial's beginning to the last one's end",
                f"{found['between_s']:.1f}",
                f"{found['ratio_between']:.2f}",
            ],
        ]
    if "tiny_s" in found:
        rows += [
            [f"{TINY} tiny cells: the whole command", f"{found['tiny_s']:.1f}", "-"],
            ["the cells themselves, summed", f"{found['tiny_cells_s']:.1f}", "-"],
        ]
    return ["what", "s", "/ (alone / fit)"], rows


def markdown(record: Record) -> str:
    timed = record["timed"]
    text = (
        f"Pretrainings of {timed['backbone']}, {timed['image_size']} px, batch {timed['batch_size']}, {timed['epochs']} epochs of"
        f" {timed['patches']:,} patches, {timed['cpus']} cores each; medians over {timed['rounds']} rounds, ratios within one."
        f" GPU: {record['machine']['gpu'] or 'none'}."
    )
    header, rows = table(record)
    lines = [*heading("Trials that share a machine", record), text, "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, *(f"- {line}" for line in target_lines(record)), ""])


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="trials.py", description=(__doc__ or "").splitlines()[0]))
