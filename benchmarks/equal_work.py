"""Are backbones pretrained here worth as much as lightly's, and are the losses those of a plain loop, at equal work?

    python benchmarks/equal_work.py --work DISK/bench --data shards/cervix --peers DISK/peers
    python benchmarks/equal_work.py --work DISK/bench --data shards/oral --judged-on shards/cervix --peers DISK/peers
    python benchmarks/equal_work.py --work DISK/bench --data shards/cervix --device cuda   # resnet50 at 224 px, bf16
    python benchmarks/equal_work.py --work DISK/bench --dry                                # tiny, drawn patches, in a minute

Ours is the stage of `train/pretrain.py`. lightly has its own views, order, head and loss, with equal parameters. The plain loop
is torchvision's views, a DataLoader, and all similarities in one matrix. All have the same backbone, initial weights, patches,
batch size, steps, optimiser and rates, and one command evaluates them: the linear protocol and kNN, on a labelled test split. A
round is a seed.

Results: <out>/<date>-equal-work.json and .md, with differences over the seeds and their 95 % intervals.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from contenders.equal_work import METRICS, PRETRAINED, WEIGHTS, Task
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
from report import Block, Record, Report, Table, missing_lines, packed_line, with_failure
from scipy.stats import t as student
from step import sizes_of

from sharding.cli import option, required
from sharding.manifest import read_dataset, read_manifest

_PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130", "scikit-learn")
SIZES: dict[str, Record] = {
    "cpu": {"backbone": "test_resnet", "image_size": 64, "batch_size": 64, "steps": 380, "seeds": 4, "patches": 1800},
    "cuda": {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "steps": 1100, "seeds": 3, "patches": 8192},
    "dry": {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "steps": 8, "seeds": 2, "patches": 96},
}
PAIRS = [("ours", name) for name in PRETRAINED if name != "ours"] + [("plain-joint", "plain")]  # the last: batch norm alone
LIMIT_S = 100_000.0  # for a run that hangs
_ROWS = 12  # of the table of epochs, about


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
    steps: int | None = option(None, "as many whole epochs as these are; default: 380, on a GPU 1100 (dry: 8)")
    seeds: int | None = option(None, "so many seeds, from --seed on; default: 4, on a GPU 3 (dry: 2)")
    seed: int = option(0, "the first of them")
    patches: int | None = option(None, "patches to draw; default: 1800, for a GPU 8192 (dry: 96)")
    cores: int = option(0, "cores that every contender may use (0: all)")
    dry: bool = option(False, "tiny sizes")


def main(config: Config) -> None:
    names, sizes = chosen(config.contenders, PRETRAINED), sizes_of(config, SIZES)
    check_at_least(sizes, seeds=1, steps=1, batch_size=2, image_size=1, patches=sizes["batch_size"])
    cores, work = cores_of(config.cores), Path(config.work).resolve()
    result = Result(config.out, "equal-work", _PACKAGES, cores=cores)
    data = Path(config.data).resolve() if config.data else draw_labelled_set(work, sizes["patches"], sizes["image_size"])
    judged = Path(config.judged_on).resolve() if config.judged_on else data
    learnt_from, judged_on = set_described(data), set_described(judged)
    if learnt_from["patches"] < sizes["batch_size"]:
        raise ValueError(f"{data}: its train split has fewer patches than --batch-size {sizes['batch_size']}: make that smaller")
    if not (read_dataset(judged)["classes"] and judged_on["patches"] and judged_on["test"]):
        raise ValueError(f"{judged} cannot judge: give --judged-on a set with labels, and with a train and a test split")
    steps_per_epoch = learnt_from["patches"] // sizes["batch_size"]
    epochs = max(1, sizes["steps"] // steps_per_epoch)
    peers = environment_of(config.peers, names)
    names = result.leave_out(peers.missing, names)
    sized = {name: sizes[name] for name in ("backbone", "image_size", "batch_size")} | {"epochs": epochs}
    device: Record = {"device": config.device, "cores": cores, "seed": config.seed}
    task = Task(shards=str(data), judged=str(judged), work="", recipe=config.recipe, **sized, **device)
    seeds = list(range(config.seed, config.seed + sizes["seeds"]))
    settings = {name: value for name, value in settings_of(task).items() if name not in ("seed", "weights")}
    result.record["versions"] |= peers.versions
    result.record |= {
        "drawn": config.data is None,
        "learnt_from": learnt_from,
        "judged_on": judged_on,
        "settings": settings | {"bf16": task.bf16, "seeds": seeds, "steps": epochs * steps_per_epoch},
        "runs": {name: [] for name in names},
    }
    for seed, name in itertools.product(seeds, names):
        job = functools.partial(one_run, name, dataclasses.replace(task, seed=seed), peers, work)
        result.take(name, f"seed {seed}: {name}", job, _shown)
    result.finish(report_of(result.record))


def set_described(shards: Path) -> Record:
    """What a result says of a set. patches: of its train split, test: of its test split."""
    splits = read_manifest(shards, columns=["split"])["split"].to_pylist()
    return {**set_of(shards), "patches": splits.count("train"), "test": splits.count("test")}


def one_run(name: str, task: Task, peers: Environment, work: Path) -> Record:
    """Pretrain and judge: seed, figures; of what was trained also curve (the mean loss of each epoch), first_epoch (the loss of
    each of its steps), seconds. Raises RunFailed."""
    work.mkdir(parents=True, exist_ok=True)
    found: Record = {"seed": task.seed}
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
        task = dataclasses.replace(task, work=folder)
        if PRETRAINED[name].run:
            trained = run_contender("contenders.equal_work", name, task, python=peers.python_of(name), limit=LIMIT_S)
            losses = np.array(trained["losses"], float).reshape(task.epochs, -1)
            if not np.isfinite(losses).all():
                raise RunFailed("its loss is not a number")
            found |= {"seconds": trained["seconds"], "curve": losses.mean(1).tolist(), "first_epoch": losses[0].tolist()}
            task = dataclasses.replace(task, weights=str(Path(folder) / WEIGHTS))
        judged = run_contender("contenders.equal_work", "evaluate", task, limit=LIMIT_S)
        found["figures"] = {metric: judged[metric] for metric in METRICS}
    return found


def _shown(run: Record) -> str:
    found = " | ".join(f"{metric} {value:.3f}" for metric, value in run["figures"].items())
    return found + (f", loss {run['curve'][-1]:.4f}" if "curve" in run else "")


# ---- Over seeds ----


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Record | None:
    """Ours less another's, of the same seeds. None for fewer than two seeds in common.

    mean; low, high: 95 % interval of the mean difference, paired by seed (Student's t); seeds: how many.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    half = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(differences) / math.sqrt(len(seeds))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(seeds)}


def metric_of(record: Record, name: str, metric: str) -> dict[int, float]:
    """By seed."""
    return {run["seed"]: run["figures"][metric] for run in record["runs"].get(name, ())}


def losses_of(record: Record, name: str) -> list[dict[int, float]]:
    """Of each epoch its mean loss by seed; none for who does not train."""
    trained = [run for run in record["runs"].get(name, ()) if "curve" in run]
    return [{run["seed"]: run["curve"][epoch] for run in trained} for epoch in range(record["settings"]["epochs"])]


# ---- The report ----


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing."""
    s, learnt, judged = record["settings"], record["learnt_from"], record["judged_on"]
    first, again = (
        {run["seed"]: run["first_epoch"][0] for run in record["runs"].get(name, ()) if "first_epoch" in run}
        for name in ("ours", "replayed")
    )
    largest = max((abs(first[seed] - again[seed]) for seed in first.keys() & again.keys()), default=None)
    blocks: list[Block] = [
        f"{s['backbone']} at {s['image_size']} px, recipe {s['recipe']}, {s['epochs']} epochs of {learnt['patches']:,}"
        f" {'drawn' if record['drawn'] else 'real'} training patches of {learnt['name']!r} in batches of {s['batch_size']} (an"
        f" incomplete one is left out), {s['steps']:,} steps; Adam at 3e-4, warm-up for a tenth of them, then half a cosine;"
        f" {'bf16' if s['bf16'] else 'float32'} on the {s['device']}; seeds {', '.join(map(str, s['seeds']))}.",
        " ".join(dict.fromkeys(packed_line(each) for each in (learnt, judged) if "packed_by" in each)),
        "All start from the same backbone (and, but for lightly, head) of each seed and read the same patches of the same shards."
        " lightly draws its own order and views. Plain torch has our order of the patches and draws its own views; it and lightly"
        " put one view after the other through the network, so that batch norm sees them apart. Ours puts them through together,"
        " and so does plain torch with both views as one batch. On our draws, torchvision makes the views that ours made, both as"
        " one batch: two curves of the same numbers, computed twice, that rounding drives apart. Nobody blurs.",
        f"Evaluated by train/evaluate.py, with the seed of the pretraining, on the {judged['test']:,} test patches of"
        f" {judged['name']!r}: mean ± standard deviation over the seeds.",
        metrics_table(record),
        *missing_lines(record, PRETRAINED),
        *([] if largest is None else [f"- measured: the first step's loss on the same draws differs by {largest:.2g}"]),
        "Differences: means over seeds, with 95 % intervals paired by seed. Where one contains 0, the seeds show no difference.",
        differences_table(record),
        f"Differences of the mean loss of an epoch (nothing learnt: {math.log(2 * s['batch_size'] - 1):.3f}):",
        curve_differences_table(record),
    ]
    return Report(record | {"first_loss_difference": largest}, "Quality at equal work", [each for each in blocks if each])


def metrics_table(record: Record) -> Table:
    rows = []
    for name, runs in record["runs"].items():
        values = [metric_of(record, name, metric) for metric in METRICS] + losses_of(record, name)[-1:]
        rows.append([with_failure(_title(name), record, name), str(len(runs)), *(_over_seeds(each, 3) for each in values)])
    return Table(["", "seeds", *METRICS, "loss of the last epoch"], rows)


def differences_table(record: Record) -> Table:
    """Of the metrics, ours less each other's."""
    rows = [
        [_title(name), *(_interval(*(metric_of(record, each, metric) for each in ("ours", name))) for metric in METRICS)]
        for name in record["runs"]
        if name != "ours"
    ]
    return Table(["ours less", *METRICS], rows)


def curve_differences_table(record: Record) -> Table:
    """Of the mean loss of an epoch; the last row has the mean distance over all epochs."""
    curves = {name: losses_of(record, name) for name in record["runs"] if PRETRAINED[name].run}
    pairs = [(curves[one], curves[other]) for one, other in PAIRS if one in curves and other in curves]
    titles = [f"{_title(one)} less {_title(other)}" for one, other in PAIRS if one in curves and other in curves]
    epochs = sorted({round(epoch) for epoch in np.linspace(1, record["settings"]["epochs"], _ROWS)})
    rows = [[str(epoch), *(_interval(one[epoch - 1], other[epoch - 1]) for one, other in pairs)] for epoch in epochs]
    return Table(["epoch", *titles], [*rows, ["mean distance", *(_mean_distance(*pair) for pair in pairs)]])


def _mean_distance(ours: Sequence[Mapping[int, float]], theirs: Sequence[Mapping[int, float]]) -> str:
    found = [abs(each["mean"]) for sides in zip(ours, theirs, strict=True) if (each := difference(*sides))]
    return f"{statistics.fmean(found):.4f}" if found else "-"


def _interval(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    found = difference(ours, theirs)
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]" if found else "-"


def _over_seeds(by_seed: Mapping[int, float], digits: int) -> str:
    values = list(by_seed.values())
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _title(name: str) -> str:
    return PRETRAINED[name].title


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
