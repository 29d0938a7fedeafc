"""Are backbones pretrained here worth as much as lightly's, and are the losses those of a plain loop, at equal work?

    python benchmarks/equal_work.py --work DISK/bench --data shards/cervix --peers DISK/peers
    python benchmarks/equal_work.py --work DISK/bench --data shards/oral --judged-on shards/cervix --peers DISK/peers
    python benchmarks/equal_work.py --work DISK/bench --data shards/cervix --device cuda   # resnet50 at 224 px, bf16
    python benchmarks/equal_work.py --work DISK/bench --dry                                # tiny, drawn patches, in a minute

Ours is the stage of `train/pretrain.py`. lightly has its own views, order, head and loss, with equal parameters. The plain loop
is torchvision's views, a DataLoader, and all similarities in one matrix. All have the same backbone, initial weights, patches,
batch size, steps, optimiser and rates, and one command evaluates them: the linear protocol and kNN, on a labelled test split. A
round is a seed; with --at-once 2, the next contender runs beside.

Results: <out>/<date>-equal-work.json and .md. A difference beyond what seeds make is MISSED.
"""

import dataclasses
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
from contenders.equal_work import PRETRAINED, WEIGHTS, Task
from equal_work_report import epoch_means, report_of
from harness import (
    Result,
    RunFailed,
    check_at_least,
    chosen,
    cores_of,
    draw_labelled_set,
    run_contender,
    script,
    set_of,
    settings_of,
)
from peers import Environment, environment_of
from report import Record
from step import sizes_of

from sharding.cli import option, required
from sharding.manifest import read_dataset, read_manifest

_PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130", "scikit-learn")
SIZES: dict[str, Record] = {
    "cpu": {"backbone": "test_resnet", "image_size": 64, "batch_size": 64, "epochs": 20, "seeds": 4, "patches": 1800},
    "cuda": {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "epochs": 50, "seeds": 3, "patches": 8192},
    "dry": {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 2, "seeds": 2, "patches": 96},
}


@dataclass(frozen=True)
class Config:
    """Who learns what, how often, and where."""

    work: str = required("a folder to work in: drawn patches stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for lightly; made with pip where it is missing")
    contenders: list[str] = option([], f"only these of {', '.join(PRETRAINED)} (default: all)")
    data: str | None = option(None, "the shard set to learn from, its train split; default: patches are drawn")
    judged_on: str | None = option(None, "a labelled shard set with a train and a test split; default: --data")
    recipe: Literal["simclr", "simclr-mild"] = option("simclr", "the augmentation of all")
    device: Literal["cpu", "cuda"] = option("cpu", "where the model is; on a GPU in bf16")
    backbone: str | None = option(None, "any timm model; default: test_resnet, on a GPU resnet50")
    image_size: int | None = option(None, "side of the views, pixels; default: 64, on a GPU 224 (dry: 32)")
    batch_size: int | None = option(None, "patches per step; default: 64, on a GPU 256 (dry: 16)")
    epochs: int | None = option(None, "passes over the patches; default: 20, on a GPU 50 (dry: 2)")
    steps: int | None = option(None, "as many whole epochs as this number of steps has, instead of --epochs")
    seeds: int | None = option(None, "so many seeds, from --seed on; default: 4, on a GPU 3 (dry: 2)")
    seed: int = option(0, "the first of them")
    patches: int | None = option(None, "patches to draw; default: 1800, for a GPU 8192 (dry: 96)")
    limit: float = option(3600.0, "seconds after which a pretraining is given up")
    cores: int = option(0, "cores that every contender may use (0: all)")
    at_once: int = option(1, "so many contenders run at the same time; their seconds are then no measure of speed")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")
    dry: bool = option(False, "tiny sizes")


def main(config: Config) -> None:
    names, sizes = chosen(config.contenders, PRETRAINED), sizes_of(config, SIZES)
    check_at_least(sizes, seeds=1, epochs=1, batch_size=2, image_size=1, patches=sizes["batch_size"])
    check_at_least(config, at_once=1, steps=1)
    cores, work = cores_of(config.cores), Path(config.work).resolve()
    result = Result(config.out, "equal-work", _PACKAGES, cores=cores, commit=config.commit)
    data = Path(config.data).resolve() if config.data else draw_labelled_set(work, sizes["patches"], sizes["image_size"])
    judged = Path(config.judged_on).resolve() if config.judged_on else data
    learnt_from, judged_on = training_set(data, sizes["batch_size"]), labelled_set(judged)
    steps_per_epoch = learnt_from["patches"] // sizes["batch_size"]
    epochs = max(1, config.steps // steps_per_epoch) if config.steps else sizes["epochs"]
    peers = environment_of(config.peers, names)
    names = result.leave_out(peers.missing, names)
    sized = {name: sizes[name] for name in ("backbone", "image_size", "batch_size")} | {"epochs": epochs}
    device: Record = {"device": config.device, "cores": cores, "seed": config.seed}
    task = Task(shards=str(data), judged=str(judged), work="", recipe=config.recipe, **sized, **device)
    seeds = list(range(config.seed, config.seed + sizes["seeds"]))
    settings = {name: value for name, value in settings_of(task).items() if name not in ("seed", "weights")}
    steps = epochs * steps_per_epoch
    result.record["versions"] |= peers.versions
    result.record |= {
        "drawn": config.data is None,
        "learnt_from": learnt_from,
        "judged_on": judged_on,
        "settings": settings | {"bf16": task.bf16, "at_once": config.at_once, "seeds": seeds, "steps": steps},
        "runs": {name: [] for name in names},
    }
    failed: set[str] = set()

    def run(seed: int, name: str) -> Record:
        if name in failed:
            raise RunFailed("it failed before")
        try:
            return one_run(name, dataclasses.replace(task, seed=seed), peers, work, config.limit)
        except RunFailed:
            failed.add(name)
            raise

    pool = ThreadPoolExecutor(config.at_once)  # of threads that each wait for a process
    try:
        jobs = [(seed, name, pool.submit(run, seed, name)) for seed, name in itertools.product(seeds, names)]
        for seed, name, job in jobs:
            result.take(name, f"seed {seed}: {name}", job.result, _shown)
    finally:
        pool.shutdown(cancel_futures=True)
    result.finish(report_of(result.record))


def training_set(shards: Path, batch_size: int) -> Record:
    """What a result says of the set that is learnt from. Raises ValueError for one with fewer training patches than a batch."""
    patches = pc.sum(pc.equal(read_manifest(shards, columns=["split"])["split"], "train")).as_py() or 0
    if patches < batch_size:
        raise ValueError(
            f"{shards}: its train split has {patches:,} patches, fewer than --batch-size {batch_size}: make that smaller"
        )
    return {**set_of(shards), "patches": patches}


def labelled_set(shards: Path) -> Record:
    """What a result says of the set that is judged on. Raises ValueError for one without labels or without both splits."""
    dataset = read_dataset(shards)
    rows = read_manifest(shards, columns=["split", "group"])
    groups = {split: set(rows.filter(pc.equal(rows["split"], split))["group"].to_pylist()) for split in ("train", "test")}
    if not dataset["classes"] or not all(groups.values()):
        raise ValueError(f"{shards} cannot judge: give --judged-on a set with labels, and with a train and a test split")
    test = pc.sum(pc.equal(rows["split"], "test")).as_py()
    grouped = None not in groups["train"] | groups["test"] and not groups["train"] & groups["test"]
    return {**set_of(shards), "test": test, "test_groups": len(groups["test"]), "grouped": grouped}


def one_run(name: str, task: Task, peers: Environment, work: Path, limit: float) -> Record:
    """Pretrain and judge: seed, figures; of what was trained also curve, first_epoch (its losses), seconds. Raises RunFailed."""
    work.mkdir(parents=True, exist_ok=True)
    found: Record = {"seed": task.seed}
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
        task = dataclasses.replace(task, work=folder)
        if PRETRAINED[name].run:
            trained = run_contender("contenders.equal_work", name, task, python=peers.python_of(name), limit=limit)
            if None in trained["losses"] or not np.isfinite(trained["losses"]).all():
                raise RunFailed("its loss is not a number")
            losses = [round(loss, 6) for loss in trained["losses"]]
            found["seconds"] = round(trained["seconds"], 1)
            found["curve"] = [round(loss, 6) for loss in epoch_means(losses, task.epochs)]
            found["first_epoch"] = losses[: len(losses) // task.epochs]
            task = dataclasses.replace(task, weights=str(Path(folder) / WEIGHTS))
        judged = run_contender("contenders.equal_work", "evaluate", task, limit=limit)
        found["figures"] = {metric: value for metric, value in judged.items() if metric != "load_before"}
    return found


def _shown(run: Record) -> str:
    found = " | ".join(f"{metric} {value:.3f}" for metric, value in run["figures"].items())
    return found + (f", loss {run['curve'][-1]:.4f}" if "curve" in run else "")


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
