"""How many images a second does a training step take: the loader alone, the model alone, both together, and other packages?

    python benchmarks/step.py --work DISK/bench                                   # resnet50 at 224 px, on the CPU
    python benchmarks/step.py --work DISK/bench --peers DISK/peers                # and lightly's and Spijkervet's
    python benchmarks/step.py --work DISK/bench --device cuda                     # in bf16, batch 256
    python benchmarks/step.py --work DISK/bench --backbone resnet18 --image-size 64 --batch-size 64
    python benchmarks/step.py --work DISK/bench --dry                             # tiny, in a minute

"Both together" is the stage of `train/pretrain.py` as a user starts it, without Ray and with one Ray worker. The others train as
their own examples do: their loader, augmentation (without blur), loss and optimiser, with the same backbone.

Results: <out>/<date>-step-<device>.json and .md.
"""

import dataclasses
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from contenders.step import CONTENDERS, Task
from harness import Result, RunFailed, absent, check_at_least, chosen, cores_of, run_contender, script, settings_of
from patch_set import PatchSet, patch_set
from peers import Environment, environment_of
from report import Record, Report, Target, images_line, judge, missing_lines, rounds_table, summarise, target_lines

from sharding.cli import option, required

_PILOT_S = 2.0  # of the run that tells how long a step takes, at least
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130", "ray")
SIZES: dict[str, Record] = {
    "cpu": {"backbone": "resnet50", "image_size": 224, "batch_size": 8, "patches": 1024, "rounds": 3, "seconds": 20.0},
    "cuda": {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "patches": 8192, "rounds": 3, "seconds": 20.0},
    "dry": {"backbone": "test_resnet", "image_size": 32, "batch_size": 4, "patches": 64, "rounds": 1, "seconds": 0.5},
}
TARGETS = (
    Target("loader", "to_model", None, "the loader alone, its img/s as a multiple of the model's alone"),
    Target("joint", "to_model", 0.95, "both together, as a share of the model alone"),
    Target("ray", "to_joint", 0.98, "one Ray worker, as a share of the same loop without Ray"),
    Target("joint", "to_lightly", 3.0, "both together, as a multiple of lightly's"),
    Target("joint", "to_simclr", 3.0, "both together, as a multiple of Spijkervet's"),
    Target("joint", "data_wait", 0.02, "both together, share of the time spent waiting for data", at_least=False),
)
# By torch's name of it: floating-point operations per second in bf16, dense, by NVIDIA's data sheets
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


@dataclass(frozen=True)
class Config:
    """What is trained by whom, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for the other packages; made with pip where it is missing")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all)")
    images: str | None = option(None, "a folder of real patches, a folder for each class, to use instead of drawn ones")
    device: Literal["cpu", "cuda"] = option("cpu", "where the model is; on a GPU in bf16")
    backbone: str | None = option(None, "any timm model; default: resnet50 (dry: test_resnet)")
    image_size: int | None = option(None, "side of the drawn patches and of the views, pixels; default: 224 (dry: 32)")
    batch_size: int | None = option(None, "patches per step; default: 8 on a CPU, 256 on a GPU (dry: 4)")
    patches: int | None = option(None, "patches to draw; default: 1024, for a GPU 8192 (dry: 64)")
    rounds: int | None = option(None, "how often each contender runs; default: 3 (dry: 1)")
    seconds: float | None = option(None, "how long each run is timed at least; default: 20 (dry: 0.5)")
    limit: float = option(1200.0, "seconds after which a run is given up")
    cores: int = option(0, "cores that every contender may use (0: all); Ray's own processes may use the others")
    dry: bool = option(False, "tiny sizes")


def main(config: Config) -> None:
    names = chosen(config.contenders, CONTENDERS)
    sizes = sizes_of(config, SIZES)
    check_at_least(sizes, rounds=1, image_size=1, batch_size=2, patches=sizes["batch_size"])
    cores, work = cores_of(config.cores), Path(config.work).resolve()
    result = Result(config.out, f"step-{config.device}", _PACKAGES, cores=cores)
    peers = environment_of(config.peers, names)
    names = result.leave_out(peers.missing | absent(CONTENDERS, names), names)
    data = patch_set(
        config.images, work, patches=sizes["patches"], size=sizes["image_size"], batch_size=sizes["batch_size"], cores=cores
    )
    # How many steps the project's loop has to take follows from how long one takes.
    task = task_of(data, sizes, config.device, cores, seconds=min(_PILOT_S, sizes["seconds"]))
    try:
        pilot = one_run("model", dataclasses.replace(task, compile=False), peers, work, config.limit)
    except RunFailed as error:
        size = f"{sizes['backbone']} at {sizes['image_size']} px"
        raise ValueError(f"{size} takes no step on the {config.device}: {error}") from None
    step_s = pilot["seconds"] / pilot["steps"]
    result.say(f"a step of the model alone takes about {1000 * step_s:,.0f} ms")
    task = dataclasses.replace(task, seconds=sizes["seconds"], steps=max(3, math.ceil(sizes["seconds"] / step_s)))
    result.record["versions"] |= peers.versions
    result.record |= {"images": data.described, "timed": settings_of(task) | {"rounds": sizes["rounds"]}}

    def measure(name: str) -> Record:
        return one_run(name, task, peers, work, config.limit)

    result.rounds(names, sizes["rounds"], measure, lambda run: f"{run['img_per_s']:,.1f} img/s")
    result.finish(report_of(result.record))


def sizes_of(config: Any, sizes: dict[str, Record]) -> Record:
    """Those of the device, or the dry ones, with what the config gives."""
    given = {name: value for name in sizes["cpu"] if (value := getattr(config, name)) is not None}
    return sizes["dry" if config.dry else config.device] | given


def task_of(data: PatchSet, sizes: Record, device: str, cores: int, *, seconds: float) -> Task:
    """Without a folder for runs, and without steps; in bf16 on a GPU."""
    timed: Record = {name: sizes[name] for name in ("backbone", "image_size", "batch_size")}
    timed |= {"device": device, "bf16": device == "cuda", "cores": cores, "seconds": seconds, "steps": 0}
    return Task(data.shards, data.images, "", **timed)


def one_run(name: str, task: Task, peers: Environment, work: Path, limit: float) -> Record:
    """What it reports. Raises RunFailed."""
    with tempfile.TemporaryDirectory(dir=work, prefix="run-", ignore_cleanup_errors=True) as folder:
        task = dataclasses.replace(task, work=folder)
        return run_contender("contenders.step", name, task, python=peers.python_of(name), limit=limit)


# ---- The report ----


def summary_of(runs: dict[str, list[Record]]) -> Record:
    """With the ratios to all others, and the median wait of those that load data."""
    ratios = {f"to_{other}": (other, "img_per_s") for other in CONTENDERS}
    found = summarise(runs, "img_per_s", ratios=ratios)
    for name, row in found.items():
        waits = [run["data_wait"] for run in runs[name] if run["data_wait"] is not None]
        row["data_wait"] = statistics.median(waits) if waits else None
    return found


class Utilisation(NamedTuple):
    """Of the model alone. flops: floating-point operations per second, a multiply and an add being two; share: of the device's
    peak (MFU, model FLOPs utilisation), None where that is not known; gpu: its name, None on a CPU."""

    flops: float
    share: float | None
    gpu: str | None


def utilisation(record: Record) -> Utilisation | None:
    """The median over the rounds; None where the model alone was not measured."""
    runs = record["runs"].get("model")
    if not runs:
        return None
    flops = statistics.median(run["flops_per_step"] * run["steps"] / run["seconds"] for run in runs)
    gpu = runs[-1]["gpu"]
    peak = PEAKS.get(gpu) if record["timed"]["bf16"] else None
    return Utilisation(flops, flops / peak if peak else None, gpu)


def model_lines(record: Record) -> list[str]:
    """How well the model alone uses the device, whether it was compiled, and the memory that it took."""
    used = utilisation(record)
    if used is None:
        return []
    run = record["runs"]["model"][-1]
    speed = f"the model alone: {used.flops / 1e12:.3g} TFLOP/s"
    if used.share is not None and used.gpu is not None:
        speed += f", {used.share:.1%} of the {PEAKS[used.gpu] / 1e12:g} of the {used.gpu} in dense bf16 (MFU)"
    elif used.gpu is not None:
        speed += f"; no share of the peak (MFU): for the {used.gpu} in {_precision(record)} none is known here"
    compiled = {True: "compiled", False: "not compiled"}.get(run["compiled"], f"not compiled ({run['compiled']})")
    memory = "" if run["peak_gib"] is None else f"; {run['peak_gib']:.1f} GiB at most"
    return [f"- measured: {speed}; {compiled}{memory}"]


def _precision(record: Record) -> str:
    return "bf16" if record["timed"]["bf16"] else "float32"


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing."""
    summary, timed = summary_of(record["runs"]), record["timed"]
    record = record | {"summary": summary, "targets": judge(summary, TARGETS)}
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    text = (
        f"{timed['backbone']} at {timed['image_size']} px, batch {timed['batch_size']}, on the {timed['device']} in"
        f" {_precision(record)}. Views/s (two of each patch) of forward, backward and the optimiser's step, in the steady state:"
        f" whole steps for at least {timed['seconds']:g} s after the first ones; a fresh process each time, rounds interleaved."
        " Data wait: the share of that time in which the next batch was not there. The others' loaders are torch's, with a"
        " process per core; nobody blurs."
    )
    table = rounds_table(record, titles, "img_per_s", "img/s", {"data wait": ("data_wait", ".2%")})
    lines = [*target_lines(record, "{:.3f}".format), *missing_lines(record, CONTENDERS), *model_lines(record)]
    return Report(record, "A training step", [images_line(record["images"]), text, table, *lines])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
