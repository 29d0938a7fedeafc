"""What do precision, compiling, channels last, the batch size and micro-batches do to a training step, in images/s and memory?

    python benchmarks/step_options.py --work DISK/bench --device cuda
    python benchmarks/step_options.py --work DISK/bench --device cuda --groups two-pass
    python benchmarks/step_options.py --work DISK/bench --dry                     # tiny, on the CPU

Three groups of settings, each with the model alone, and the first one also with the loader, in the stage of `train/pretrain.py`:
`options` (precision, channels last, compiled or not), `batches` (batch sizes) and `two-pass` (a large batch at once, and in
micro-batches). All run in this one process, in that order: a process for each would spend most of the time on starting.

Results: <out>/<date>-step-options-<device>.json and .md. What does not fit into memory, or fails, has its reason in the table.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from contenders.step import Task, fresh_memory, peak_gib, pretrained, timed
from harness import Result, chosen, script, settings_of
from patch_set import patch_set
from report import Block, Record, Report, Table, cell
from step import sizes_of, task_of

from sharding.cli import option, required
from sharding.process_pool import available_cores

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130")
SIZES: dict[str, Record] = {
    "cpu": {"backbone": "resnet50", "image_size": 224, "batch_size": 8, "patches": 1024, "seconds": 10.0},
    "cuda": {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "patches": 8192, "seconds": 2.0},
    "dry": {"backbone": "test_resnet", "image_size": 32, "batch_size": 4, "patches": 64, "seconds": 0.1},
}
_BATCHES = {"cpu": [4, 8, 16], "cuda": [64, 128, 256, 512, 1024], "dry": [2, 4]}
_MICRO_OF = 4, 16  # micro-batches that the largest batch is cut into
GROUPS = {
    "options": "Precision, memory layout and compiling.",
    "batches": "Batch sizes.",
    "two-pass": "A large batch at once, and in micro-batches by the two-pass method.",
}


class Setting(NamedTuple):
    """How a step is computed. precision: fp32, tf32 (its products rounded, as the stage has them on a GPU) or bf16. micro_batch:
    patches, None: all at once. joint: measured with the loader too."""

    precision: str
    channels_last: bool
    compile: bool
    batch_size: int
    micro_batch: int | None = None
    joint: bool = False

    @property
    def text(self) -> str:
        micro = f" in micro-batches of {self.micro_batch}" if self.micro_batch else ""
        last = "channels last" if self.channels_last else "channels first"
        return f"batch {self.batch_size}{micro}, {self.precision}, {last}{', compiled' if self.compile else ''}"


def settings(group: str, device: str, batch_size: int, batches: list[int]) -> Iterator[Setting]:
    """Of a group, the most telling ones first."""
    best = "bf16" if device == "cuda" else "fp32"  # few CPUs know bf16, and none TF32
    if group == "options":
        yield Setting(best, True, False, batch_size, joint=True)
        yield Setting(best, True, True, batch_size, joint=True)
        yield Setting(best, False, False, batch_size, joint=True)
        if device == "cuda":
            yield Setting("tf32", True, False, batch_size, joint=True)
            yield Setting("fp32", True, False, batch_size)
            yield Setting("tf32", False, False, batch_size)
            yield Setting("fp32", False, False, batch_size)
            yield Setting(best, False, True, batch_size)
    elif group == "batches":
        yield from (Setting(best, True, False, size) for size in batches)
    else:
        yield Setting(best, True, False, max(batches))
        micro = dict.fromkeys(max(1, max(batches) // count) for count in _MICRO_OF)
        yield from (Setting(best, True, False, max(batches), size) for size in micro)


@dataclass(frozen=True)
class Config:
    """What is trained how, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    groups: list[str] = option([], f"only these of {', '.join(GROUPS)} (default: all)")
    device: Literal["cpu", "cuda"] = option("cpu", "where the model is")
    backbone: str | None = option(None, "any timm model; default: resnet50 (dry: test_resnet)")
    image_size: int | None = option(None, "side of the drawn patches and of the views, pixels; default: 224 (dry: 32)")
    batch_size: int | None = option(None, "patches per step of `options`; default: 8 on a CPU, 256 on a GPU (dry: 4)")
    batches: list[int] = option([], "the sizes of `batches`, the largest of which `two-pass` takes; default: 64 to 1024 on a GPU")
    patches: int | None = option(None, "patches to draw; default: 1024, for a GPU 8192 (dry: 64)")
    seconds: float | None = option(None, "how long each setting is timed at least; default: 10, on a GPU 2 (dry: 0.1)")
    compile: bool = option(True, "measure what is compiled too")
    dry: bool = option(False, "tiny sizes")


def main(config: Config) -> None:
    groups, sizes = chosen(config.groups, GROUPS), sizes_of(config, SIZES)
    batches = config.batches or _BATCHES["dry" if config.dry else config.device]
    if min(sizes["batch_size"], *batches) < 2:
        raise ValueError("--batch-size and --batches: give at least 2, or there is nothing to contrast a patch with")
    cores, work = available_cores(), Path(config.work).resolve()
    result = Result(config.out, f"step-options-{config.device}", _PACKAGES)
    data = patch_set(None, work, patches=sizes["patches"], size=sizes["image_size"], batch_size=sizes["batch_size"], cores=cores)
    task = task_of(data, sizes, config.device, cores, seconds=sizes["seconds"], bf16=False)
    result.record |= {"timed": settings_of(task), "runs": {group: [] for group in groups}}
    for group in groups:
        for setting in settings(group, config.device, sizes["batch_size"], batches):
            if setting.compile and not config.compile:
                continue
            run = {"setting": setting._asdict(), "text": setting.text} | attempt(setting, task, work)
            result.record["runs"][group].append(run)
            if "failed" in run:
                result.record["failed"][f"{group}: {setting.text}"] = run["failed"]
            result.say(f"{group}: {' | '.join(_cells(run))}")
            result.save()
    result.finish(report_of(result.record))


def attempt(setting: Setting, task: Task, work: Path) -> Record:
    """model, joint: img/s and peak memory; or what kept one from being measured, after which the next setting is tried."""
    import torch

    found: Record = {}
    ways = {"model": model_alone, "joint": with_loader} if setting.joint else {"model": model_alone}
    for name, measure in ways.items():
        try:
            found[name] = measure(setting, dataclasses.replace(task, batch_size=setting.batch_size), work, found)
        except Exception as error:  # torch's and the compiler's are of many kinds; what follows is worth having
            said = " ".join(str(error).split())[:300]
            # torch.cuda.OutOfMemoryError, which a setting may well come to, is no failure.
            found["no_memory" if "out of memory" in said else "failed"] = f"{name}: {type(error).__name__}: {said}"
            return found
        finally:
            torch.compiler.reset()  # or it takes the next setting's shapes for variable ones, and compiles for all of them
            gc.collect()
    return found


def model_alone(setting: Setting, task: Task, work: Path, found: Record) -> Record:
    """Steps on views that lie on the device."""
    import torch
    from step_model import model_step

    from train.trainer.precision import backend_settings

    fresh_memory(task.device)
    with backend_settings(torch.device(task.device), deterministic=False), float32(setting.precision):
        training = model_step(
            backbone=task.backbone,
            image_size=task.image_size,
            batch_size=task.batch_size,
            device=task.device,
            precision="bf16" if setting.precision == "bf16" else "fp32",
            channels_last=setting.channels_last,
            micro_batch=setting.micro_batch,
        )
        if setting.compile:
            training.net.compile()
        began = time.perf_counter()
        run = timed(itertools.repeat(None), lambda batch: training.step(), task)
        before = time.perf_counter() - began - run["seconds"]  # the first steps, which compile and choose kernels
    return run | {"first_steps_s": before, "peak_gib": peak_gib(task.device)}


@contextlib.contextmanager
def float32(precision: str) -> Iterator[None]:
    """A block without TF32 where precision is `fp32`: in convolutions too, which have a switch of their own."""
    import torch

    if precision != "fp32":
        yield
        return
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), convolutions.fp32_precision
    torch.set_float32_matmul_precision("highest")
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        convolutions.fp32_precision = before[1]


def with_loader(setting: Setting, task: Task, work: Path, found: Record) -> Record:
    """The stage, for about as long as the model alone was timed, if it is as fast."""
    fresh_memory(task.device)
    steps = max(8, math.ceil(task.seconds * found["model"]["steps"] / found["model"]["seconds"]))
    with tempfile.TemporaryDirectory(dir=work, prefix="run-", ignore_cleanup_errors=True) as folder:
        given = {"work": folder, "bf16": setting.precision == "bf16", "compile": setting.compile, "steps": steps}
        return pretrained(dataclasses.replace(task, **given), workers=0, channels_last=setting.channels_last)


# ---- The report ----


def report_of(record: Record) -> Report:
    """A row for each setting, with the reason where nothing was measured."""
    header = ["setting", "model alone, img/s", "its peak, GiB", "with the loader, img/s", "data wait", "peak, GiB"]
    timed, blocks = record["timed"], list[Block]()
    what = f"{timed['backbone']} at {timed['image_size']} px on the {timed['device']}, timed for {timed['seconds']:g} s or more."
    for group, runs in record["runs"].items():
        if runs:
            blocks += [f"{GROUPS[group]} {what}", Table(header, [_cells(run) for run in runs])]
    return Report(record, "Options of a training step", blocks)


def _cells(run: Record) -> list[str]:
    model, joint = run.get("model", {}), run.get("joint", {})
    why = f" (FAILED: {run['failed']})" if "failed" in run else f" (no memory: {run['no_memory']})" if "no_memory" in run else ""
    rates = [[cell(each.get("img_per_s"), ",.0f"), cell(each.get("peak_gib"))] for each in (model, joint)]
    return [run["text"] + why, *rates[0], rates[1][0], cell(joint.get("data_wait"), ".2%"), rates[1][1]]


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
