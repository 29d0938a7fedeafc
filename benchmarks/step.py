"""How many images a second does a training step take: the loader alone, the model alone, both together, and other packages?

    python benchmarks/step.py --work DISK/bench                                   # resnet50 at 224 px, on the CPU
    python benchmarks/step.py --work DISK/bench --peers DISK/peers                # and lightly's and Spijkervet's
    python benchmarks/step.py --work DISK/bench --device cuda                     # in bf16, batch 256
    python benchmarks/step.py --work DISK/bench --backbone resnet18 --image-size 64 --batch-size 64
    python benchmarks/step.py --work DISK/bench --device cuda --settings options  # precision, memory layout, compiling
    python benchmarks/step.py --work DISK/bench --dry                             # tiny, in a minute

"Both together" is the stage of `train/pretrain.py` as a user starts it, without Ray and with one Ray worker. The others train as
their own examples do: their loader, augmentation (without blur), loss and optimiser, with the same backbone.

With --settings it compares settings of the project's own step instead: `options` (precision, memory layout, compiling), `batches`
(a quarter of --batch-size to four times it) and `two-pass` (the largest of these at once, and in micro-batches). All run in this
one process: a process for each would spend most of the time on starting.

Results: <out>/<date>-step-<device>.json and .md, with --settings <date>-step-settings-<device>.
"""

import dataclasses
import gc
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from contenders.step import CONTENDERS, Task, fresh_memory, joint, model
from harness import Result, RunFailed, absent, check_at_least, chosen, cores_of, run_contender, script, settings_of
from patch_set import patch_set
from peers import Environment, environment_of
from report import (
    Block,
    Record,
    Report,
    Table,
    Target,
    cell,
    images_line,
    judge,
    missing_lines,
    rounds_table,
    summarise,
    target_lines,
)

from sharding.cli import option, required

_PILOT_S = 2.0  # of the run that tells how long a step takes, at least
_LIMIT_S = 1200.0  # after which a run is given up
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
SETTINGS = {
    "options": "Precision, memory layout and compiling.",
    "batches": "Batch sizes.",
    "two-pass": "A large batch at once, and in micro-batches by the two-pass method.",
}
# By device what is changed of the task, the fastest first. Few CPUs know bf16, and not every one's host has a C++ compiler.
_FAST = {"bf16": True, "channels_last": True, "compile": False}
OPTIONS: dict[str, list[Record]] = {
    "cuda": [_FAST, _FAST | {"compile": True}, _FAST | {"channels_last": False}, _FAST | {"bf16": False}],
    "cpu": [_FAST | {"bf16": False}, _FAST | {"bf16": False, "channels_last": False}],
}
_BATCHES = 0.25, 0.5, 1, 2, 4  # of --batch-size
_MICRO_OF = 4, 16  # micro-batches that the largest batch is cut into


@dataclass(frozen=True)
class Config:
    """What is trained by whom, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for the other packages; made with pip where it is missing")
    contenders: list[str] = option([], f"only these of {', '.join(CONTENDERS)} (default: all)")
    settings: list[str] = option([], f"compare settings of the project's step instead: {', '.join(SETTINGS)}")
    device: Literal["cpu", "cuda"] = option("cpu", "where the model is; on a GPU in bf16")
    backbone: str | None = option(None, "any timm model; default: resnet50 (dry: test_resnet)")
    image_size: int | None = option(None, "side of the drawn patches and of the views, pixels; default: 224 (dry: 32)")
    batch_size: int | None = option(None, "patches per step; default: 8 on a CPU, 256 on a GPU (dry: 4)")
    patches: int | None = option(None, "patches to draw; default: 1024, for a GPU 8192 (dry: 64)")
    rounds: int | None = option(None, "how often each contender runs; default: 3 (dry: 1)")
    seconds: float | None = option(None, "how long each run is timed at least; default: 20 (dry: 0.5)")
    cores: int = option(0, "cores that every contender may use (0: all); Ray's own processes may use the others")
    dry: bool = option(False, "tiny sizes")


def main(config: Config) -> None:
    names, groups = chosen(config.contenders, CONTENDERS), chosen(config.settings, SETTINGS, "group of settings")
    sizes, cores, work = sizes_of(config, SIZES), cores_of(config.cores), Path(config.work).resolve()
    check_at_least(sizes, rounds=1, image_size=1, batch_size=2, patches=sizes["batch_size"])
    kind = f"step-settings-{config.device}" if config.settings else f"step-{config.device}"
    result = Result(config.out, kind, _PACKAGES, cores=cores)
    drawn = {name: sizes[name] for name in ("patches", "batch_size")}
    data = patch_set(None, work, size=sizes["image_size"], cores=cores, **drawn)
    result.record["images"] = data.described
    timed: Record = {name: sizes[name] for name in ("backbone", "image_size", "batch_size", "seconds")}
    timed |= {"device": config.device, "bf16": config.device == "cuda", "cores": cores, "steps": 0}
    task = Task(data.shards, data.images, "", **timed)
    if config.settings:
        compare_settings(groups, task, work, result)
    else:
        compare_contenders(names, task, sizes["rounds"], environment_of(config.peers, names), work, result)


def compare_contenders(names: list[str], task: Task, rounds: int, peers: Environment, work: Path, result: Result) -> None:
    names = result.leave_out(peers.missing | absent(CONTENDERS, names), names)
    # How many steps the project's loop has to take follows from how long one takes.
    try:
        pilot = one_run("model", dataclasses.replace(task, seconds=min(_PILOT_S, task.seconds), compile=False), peers, work)
    except RunFailed as error:
        size = f"{task.backbone} at {task.image_size} px"
        raise ValueError(f"{size} takes no step on the {task.device}: {error}") from None
    step_s = pilot["seconds"] / pilot["steps"]
    result.say(f"a step of the model alone takes about {1000 * step_s:,.0f} ms")
    task = dataclasses.replace(task, steps=max(3, math.ceil(task.seconds / step_s)))
    result.record["versions"] |= peers.versions
    result.record["timed"] = settings_of(task) | {"rounds": rounds}

    def measure(name: str) -> Record:
        return one_run(name, task, peers, work)

    result.rounds(names, rounds, measure, lambda run: f"{run['img_per_s']:,.1f} img/s")
    result.finish(report_of(result.record))


def sizes_of(config: Any, sizes: dict[str, Record]) -> Record:
    """Those of the device, or the dry ones, with what the config gives."""
    given = {name: value for name in sizes["cpu"] if (value := getattr(config, name)) is not None}
    return sizes["dry" if config.dry else config.device] | given


def one_run(name: str, task: Task, peers: Environment, work: Path) -> Record:
    """What it reports. Raises RunFailed."""
    with tempfile.TemporaryDirectory(dir=work, prefix="run-", ignore_cleanup_errors=True) as folder:
        task = dataclasses.replace(task, work=folder)
        return run_contender("contenders.step", name, task, python=peers.python_of(name), limit=_LIMIT_S)


# ---- Settings of the project's own step ----


def settings(group: str, task: Task) -> Iterator[tuple[str, Task]]:
    """Of a group, each with what it is called in the table."""
    fast, sizes = OPTIONS[task.device][0], [round(share * task.batch_size) for share in _BATCHES]
    if group == "options":
        changes: list[Record] = OPTIONS[task.device]
    elif group == "batches":
        changes = [fast | {"batch_size": size} for size in sizes if size > 1]
    else:
        changes = [fast | {"batch_size": sizes[-1], "micro_batch": part} for part in (None, *(sizes[-1] // n for n in _MICRO_OF))]
    for change in changes:
        setting = dataclasses.replace(task, **change)
        micro = f" in micro-batches of {setting.micro_batch}" if setting.micro_batch else ""
        layout = "channels last" if setting.channels_last else "channels first"
        compiled = ", compiled" if setting.compile else ""
        precision = "bf16" if setting.bf16 else "tf32" if task.device == "cuda" else "float32"
        yield f"batch {setting.batch_size}{micro}, {precision}, {layout}{compiled}", setting


def compare_settings(groups: list[str], task: Task, work: Path, result: Result) -> None:
    """Each with the model alone, those of `options` also with the loader, in the stage of `train/pretrain.py`."""
    result.record |= {"timed": settings_of(task), "runs": {group: [] for group in groups}}
    for group in groups:
        for text, setting in settings(group, task):
            run = {"text": text} | attempt(setting, work, with_loader=group == "options")
            result.record["runs"][group].append(run)
            if "failed" in run:
                result.record["failed"][f"{group}: {text}"] = run["failed"]
            result.say(f"{group}: {' | '.join(_cells(run))}")
            result.save()
    result.finish(settings_report(result.record))


def attempt(task: Task, work: Path, *, with_loader: bool) -> Record:
    """model, joint: img/s and peak memory; or what kept one from being measured, after which the next setting is tried."""
    import torch

    found: Record = {}
    try:
        fresh_memory(task.device)
        found["model"] = model(task)
        if with_loader:
            # For about as long as the model alone was timed, if it is as fast.
            steps = max(8, math.ceil(task.seconds * found["model"]["steps"] / found["model"]["seconds"]))
            with tempfile.TemporaryDirectory(dir=work, prefix="run-", ignore_cleanup_errors=True) as folder:
                found["joint"] = joint(dataclasses.replace(task, work=folder, steps=steps))
    except Exception as error:  # torch's and the compiler's are of many kinds; what follows is worth having
        said = " ".join(str(error).split())[:300]
        # torch.cuda.OutOfMemoryError, which a setting may well come to, is no failure.
        found["no_memory" if "out of memory" in said else "failed"] = f"{type(error).__name__}: {said}"
    finally:
        torch.compiler.reset()  # or it takes the next setting's shapes for variable ones, and compiles for all of them
        gc.collect()
    return found


def settings_report(record: Record) -> Report:
    """A row for each setting, with the reason where nothing was measured."""
    header = ["setting", "model alone, img/s", "its peak, GiB", "with the loader, img/s", "data wait", "peak, GiB"]
    timed, blocks = record["timed"], list[Block]()
    what = f"{timed['backbone']} at {timed['image_size']} px on the {timed['device']}, timed for {timed['seconds']:g} s or more."
    for group, runs in record["runs"].items():
        if runs:
            blocks += [f"{SETTINGS[group]} {what}", Table(header, [_cells(run) for run in runs])]
    return Report(record, "Settings of a training step", blocks)


def _cells(run: Record) -> list[str]:
    alone, both = run.get("model", {}), run.get("joint", {})
    why = f" (FAILED: {run['failed']})" if "failed" in run else f" (no memory: {run['no_memory']})" if "no_memory" in run else ""
    rates = [[cell(each.get("img_per_s"), ",.0f"), cell(each.get("peak_gib"))] for each in (alone, both)]
    return [run["text"] + why, *rates[0], rates[1][0], cell(both.get("data_wait"), ".2%"), rates[1][1]]


# ---- The report of the contenders ----


def summary_of(runs: dict[str, list[Record]]) -> Record:
    """With the ratios to all others, and the median wait of those that load data."""
    ratios = {f"to_{other}": (other, "img_per_s") for other in CONTENDERS}
    found = summarise(runs, "img_per_s", ratios=ratios)
    for name, row in found.items():
        waits = [run["data_wait"] for run in runs[name] if run["data_wait"] is not None]
        row["data_wait"] = statistics.median(waits) if waits else None
    return found


class Utilisation(NamedTuple):
    """Of the model alone. flops: floating-point operations per second, a multiply and an add being two; gpu: its name, None on a
    CPU."""

    flops: float
    gpu: str | None


def utilisation(record: Record) -> Utilisation | None:
    """The median over the rounds; None where the model alone was not measured."""
    runs = record["runs"].get("model")
    if not runs:
        return None
    return Utilisation(statistics.median(run["flops_per_step"] * run["steps"] / run["seconds"] for run in runs), runs[-1]["gpu"])


def model_lines(record: Record) -> list[str]:
    """How well the model alone uses the device, whether it was compiled, and the memory that it took."""
    used = utilisation(record)
    if used is None:
        return []
    run = record["runs"]["model"][-1]
    compiled = {True: "compiled", False: "not compiled"}.get(run["compiled"], f"not compiled ({run['compiled']})")
    memory = "" if run["peak_gib"] is None else f"; {run['peak_gib']:.1f} GiB at most"
    return [f"- measured: the model alone: {used.flops / 1e12:.3g} TFLOP/s on {used.gpu or 'the CPU'}; {compiled}{memory}"]


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing."""
    summary, timed = summary_of(record["runs"]), record["timed"]
    record = record | {"summary": summary, "targets": judge(summary, TARGETS)}
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    text = (
        f"{timed['backbone']} at {timed['image_size']} px, batch {timed['batch_size']}, on the {timed['device']} in"
        f" {'bf16' if timed['bf16'] else 'float32'}. Views/s (two of each patch) of forward, backward and the optimiser's step,"
        f" in the steady state: whole steps for at least {timed['seconds']:g} s after the first ones; a fresh process each time,"
        " rounds interleaved. Data wait: the share of that time in which the next batch was not there. The others' loaders are"
        " torch's, with a process per core; nobody blurs."
    )
    table = rounds_table(record, titles, "img_per_s", "img/s", {"data wait": ("data_wait", ".2%")})
    lines = [*target_lines(record, "{:.3f}".format), *missing_lines(record, CONTENDERS), *model_lines(record)]
    return Report(record, "A training step", [images_line(record["images"]), text, table, *lines])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
