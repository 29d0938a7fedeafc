"""Are backbones pretrained here worth as much as lightly's, and are the losses those of a plain loop, at equal work?

    python benchmarks/equal_work.py --work DISK/bench --data shards/cervix --peers DISK/peers
    python benchmarks/equal_work.py --work DISK/bench --data shards/oral --judged-on shards/cervix --peers DISK/peers
    python benchmarks/equal_work.py --work DISK/bench --data shards/cervix --device cuda   # resnet50 at 224 px, bf16
    python benchmarks/equal_work.py --work DISK/bench --dry                                # tiny, drawn patches, in a minute

Ours is the stage of `train/pretrain.py`. lightly has its own views, order, head and loss, with equal parameters. The plain loop
is torchvision's views, a DataLoader, and all similarities in one matrix. All have the same backbone, initial weights, patches,
batch size, steps, optimiser and rates, and one command judges them: the linear protocol and kNN, on a labelled set's test split.
Seed by seed all run in turn (A B C A B C), each in a fresh process; with --at-once 2, the next beside it.

Results go to <out>/<date>-equal-work.json, written after every run, and at the end to the same name's .md. A difference beyond
what seeds make is printed as MISSED; who could not run stands in the table with the reason, and then the exit code is 1.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import equal_work_contenders  # noqa: E402
from equal_work_contenders import CONTENDERS  # noqa: E402
from equal_work_loop import Task  # noqa: E402
from equal_work_report import epoch_means, finish  # noqa: E402
from measuring import RunFailed, chosen, machine, new_path, record_of, run_fresh, set_of, settings_of, take, versions_of  # noqa: E402
from step_peers import PEERS, Environment, environment_of  # noqa: E402

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.drawn_patches.dataset import LAYOUTS, DrawConfig, draw_set  # noqa: E402
from sharding.manifest import read_dataset, read_manifest  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402

_PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130", "scikit-learn")
_SLIDES = 24
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"backbone": "test_resnet", "image_size": 64, "batch_size": 64, "epochs": 20, "seeds": 4, "patches": 1800},
    "cuda": {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "epochs": 50, "seeds": 3, "patches": 8192},
    "dry": {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 2, "seeds": 2, "patches": 96},
}


@dataclass(frozen=True)
class Config:
    """Who learns what, how often, and where."""

    work: str = required("a folder to work in: drawn patches stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for lightly; made, with pip, where it is not there")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all)")
    data: str | None = option(None, "the shard set to learn from, its train split; default: patches are drawn")
    judged_on: str | None = option(None, "a labelled shard set with a train and a test split; default: --data")
    recipe: Literal["simclr", "simclr-mild"] = option("simclr", "the augmentation of all")
    device: Literal["cpu", "cuda"] = option("cpu", "where the model is; on a GPU in bf16")
    backbone: str | None = option(None, "any timm model; default: test_resnet, on a GPU resnet50")
    image_size: int | None = option(None, "side of the views, pixels; default: 64, on a GPU 224 (dry: 32)")
    batch_size: int | None = option(None, "patches per step; default: 64, on a GPU 256 (dry: 16)")
    epochs: int | None = option(None, "passes over the patches; default: 20, on a GPU 50 (dry: 2)")
    seeds: int | None = option(None, "so many seeds, from --seed on; default: 4, on a GPU 3 (dry: 2)")
    seed: int = option(0, "the first of them")
    patches: int | None = option(None, "patches to draw; default: 1800, for a GPU 8192 (dry: 96)")
    limit: float = option(3600.0, "seconds after which a pretraining is given up")
    cores: int = option(0, "cores that every contender may use (0: all)")
    at_once: int = option(1, "so many contenders run at the same time; their seconds are then no measure of speed")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")
    dry: bool = option(False, "tiny sizes")


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    given = {name: value for name in SIZES["cpu"] if (value := getattr(config, name)) is not None}
    sizes = SIZES["dry" if config.dry else config.device] | given
    for name, least in (("seeds", 2), ("epochs", 1), ("batch_size", 2), ("image_size", 1), ("patches", sizes["batch_size"])):
        if sizes[name] < least:
            raise ValueError(f"--{name.replace('_', '-')} {sizes[name]} is out of range: give at least {least}")
    cores = config.cores or available_cores()
    if not 0 < cores <= available_cores():
        raise ValueError(f"--cores {cores} is out of range: this process may use {available_cores()}")
    if config.at_once < 1:
        raise ValueError(f"--at-once {config.at_once} is out of range: give at least 1")
    console = Console(highlight=False, soft_wrap=True)
    work = Path(config.work).resolve()
    started = machine(cores)
    data = Path(config.data).resolve() if config.data is not None else drawn(work, sizes["patches"], sizes["image_size"], cores)
    judged = Path(config.judged_on).resolve() if config.judged_on is not None else data
    learnt_from, judged_on = learnt(data, sizes["batch_size"]), labelled(judged)
    peers = environment_of(config.peers, names)
    for name, why in peers.missing.items():
        console.print(f"{name}: {why}", markup=False)
    names = [name for name in names if name not in peers.missing]
    task = Task(
        shards=str(data),
        judged=str(judged),
        work="",
        recipe=config.recipe,
        backbone=sizes["backbone"],
        image_size=sizes["image_size"],
        batch_size=sizes["batch_size"],
        epochs=sizes["epochs"],
        device=config.device,
        cores=cores,
        seed=config.seed,
    )
    seeds = list(range(config.seed, config.seed + sizes["seeds"]))
    path = new_path(Path(config.out), "equal-work")
    record: dict[str, Any] = {
        **record_of(started, versions_of(_PACKAGES) | peers.versions, config.commit),
        "drawn": config.data is None,
        "learnt_from": learnt_from,
        "judged_on": judged_on,
        "settings": {name: value for name, value in settings_of(task).items() if name != "seed"}
        | {"bf16": task.bf16, "at_once": config.at_once, "seeds": seeds}
        | {"steps": task.epochs * (learnt_from["patches"] // task.batch_size)},
        "runs": {name: [] for name in names},
        "missing": peers.missing,
        "failed": {},
    }
    running: deque[tuple[int, str, Future]] = deque()

    def take_oldest() -> None:
        seed, name, future = running.popleft()
        take(record, name, f"seed {seed}: {name}", path, console, future.result, _shown)

    with ThreadPoolExecutor(config.at_once) as pool:  # of threads that each wait for a process
        for seed, name in itertools.product(seeds, names):
            if len(running) == config.at_once:
                take_oldest()
            if name not in record["failed"]:
                run = pool.submit(one_run, name, dataclasses.replace(task, seed=seed), peers, work, config.limit)
                running.append((seed, name, run))
        while running:
            take_oldest()
    finish(record, path, console)


def drawn(work: Path, patches: int, size: int, cores: int) -> Path:
    """A shard set of drawn patches in three classes, split by slide, made under `work` where it is not there."""
    work.mkdir(parents=True, exist_ok=True)
    images = work / f"breast-{patches}-{size}px"
    draw_set(DrawConfig(str(images), "breast", patches, size, slides=_SLIDES, workers=cores))
    shards = images.with_name(f"{images.name}-shards")
    build_shards([images], shards, layout=LAYOUTS["breast"], group_by="slide", split="train=0.7,test=0.3", workers=cores)
    return shards


def learnt(shards: Path, batch_size: int) -> dict[str, Any]:
    """What a result says of the set that is learnt from. Raises ValueError for one with fewer training patches than a batch."""
    patches = pc.sum(pc.equal(read_manifest(shards, columns=["split"])["split"], "train")).as_py() or 0
    if patches < batch_size:
        raise ValueError(
            f"{shards}: its train split has {patches:,} patches, fewer than --batch-size {batch_size}: make that smaller"
        )
    return {**set_of(shards), "patches": patches}


def labelled(shards: Path) -> dict[str, Any]:
    """What a result says of the set that is judged on. Raises ValueError for one without labels or without both splits."""
    dataset = read_dataset(shards)
    rows = read_manifest(shards, columns=["split", "group"])
    groups = {split: set(rows.filter(pc.equal(rows["split"], split))["group"].to_pylist()) for split in ("train", "test")}
    if not dataset["classes"] or not all(groups.values()):
        raise ValueError(f"{shards} cannot judge: give --judged-on a set with labels, and with a train and a test split")
    test = pc.sum(pc.equal(rows["split"], "test")).as_py()
    grouped = None not in groups["train"] | groups["test"] and not groups["train"] & groups["test"]
    return {**set_of(shards), "test": test, "test_groups": len(groups["test"]), "grouped": grouped}


def one_run(name: str, task: Task, peers: Environment, work: Path, limit: float) -> dict[str, Any]:
    """Pretrain and judge: seed, figures; of what was trained also curve, first_epoch (its losses), seconds. Raises RunFailed."""
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"seed": task.seed}
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
        task = dataclasses.replace(task, work=folder)
        if CONTENDERS[name].train:
            python = peers.python if name in PEERS else sys.executable
            trained = _process(python, "train", name, task, limit)
            if None in trained["losses"] or not np.isfinite(trained["losses"]).all():
                raise RunFailed("its loss is not a number")
            losses = [round(loss, 6) for loss in trained["losses"]]
            found["seconds"] = round(trained["seconds"], 1)
            found["curve"] = [round(loss, 6) for loss in epoch_means(losses, task.epochs)]
            found["first_epoch"] = losses[: len(losses) // task.epochs]
        found["figures"] = _process(sys.executable, "judge", name, task, limit)
    return found


def _shown(run: Mapping[str, Any]) -> str:
    found = " | ".join(f"{figure} {value:.3f}" for figure, value in run["figures"].items())
    return found + (f", loss {run['curve'][-1]:.4f}" if "curve" in run else "")


def _process(python: str, what: str, name: str, task: Task, limit: float) -> dict[str, Any]:
    until = time.monotonic() + limit

    def watch(_: int) -> None:
        if time.monotonic() > until:
            raise RunFailed(f"not done after {limit:g} s")

    result = Path(task.work) / f"{what}.json"
    line = [python, equal_work_contenders.__file__, what, name, json.dumps(dataclasses.asdict(task)), str(result)]
    run_fresh(line, result.with_suffix(".log"), watch)
    return json.loads(result.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="equal_work.py", description=(__doc__ or "").splitlines()[0]))
