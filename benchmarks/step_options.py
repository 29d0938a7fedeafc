"""What do precision, compiling, channels last, the batch size and micro-batches do to a training step, in images/s and memory?

    python benchmarks/step_options.py --work DISK/bench --device cuda
    python benchmarks/step_options.py --work DISK/bench --device cuda --groups two-pass
    python benchmarks/step_options.py --work DISK/bench --dry                     # tiny, on the CPU

Three groups of settings, each with the model alone, and some of the first one also with the loader, in the stage of
`train/pretrain.py`: `options` (precision, channels last, compiled or not), `batches` (batch sizes) and `two-pass` (a large batch
at once, and in micro-batches). All run in this one process: a process for each would spend most of the time on starting.

Results: <out>/<date>-step-options-<device>.json and .md. What does not fit into memory, or fails, has its reason in the table.
"""

import dataclasses
import gc
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contenders.step import Task, fresh_memory, joint, model
from harness import Result, chosen, script, settings_of
from patch_set import patch_set
from report import Block, Record, Report, Table, cell
from step import sizes_of, task_of

from sharding.cli import option, required
from sharding.process_pool import available_cores

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
_FAST = {"bf16": True, "channels_last": True, "compile": False}
# By device what is changed of the task, the most telling first, and whether it is measured with the loader too. Few CPUs know
# bf16, and none TF32.
OPTIONS: dict[str, list[tuple[Record, bool]]] = {
    "cuda": [
        (_FAST, True),
        (_FAST | {"compile": True}, True),
        (_FAST | {"channels_last": False}, True),
        (_FAST | {"bf16": False}, True),
        (_FAST | {"bf16": False, "tf32": False}, False),
        (_FAST | {"bf16": False, "channels_last": False}, False),
        (_FAST | {"bf16": False, "tf32": False, "channels_last": False}, False),
        (_FAST | {"channels_last": False, "compile": True}, False),
    ],
    "cpu": [
        (_FAST | {"bf16": False}, True),
        (_FAST | {"bf16": False, "compile": True}, True),
        (_FAST | {"bf16": False, "channels_last": False}, True),
    ],
}


def settings(group: str, task: Task, batches: list[int]) -> Iterator[tuple[Task, bool]]:
    """Of a group, each with whether it is measured with the loader too."""
    fastest = dataclasses.replace(task, **OPTIONS[task.device][0][0])
    if group == "options":
        yield from ((dataclasses.replace(task, **changes), joint) for changes, joint in OPTIONS[task.device])
        return
    largest = max(batches)
    micro = [None, *dict.fromkeys(max(1, largest // count) for count in _MICRO_OF)]
    for size, part in [(size, None) for size in batches] if group == "batches" else [(largest, part) for part in micro]:
        yield dataclasses.replace(fastest, batch_size=size, micro_batch=part), False


def text_of(task: Task) -> str:
    micro = f" in micro-batches of {task.micro_batch}" if task.micro_batch else ""
    precision = "bf16" if task.bf16 else "tf32" if task.tf32 and task.device == "cuda" else "fp32"
    last = "channels last" if task.channels_last else "channels first"
    return f"batch {task.batch_size}{micro}, {precision}, {last}{', compiled' if task.compile else ''}"


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
    groups, sizes = chosen(config.groups, GROUPS, "group"), sizes_of(config, SIZES)
    batches = config.batches or _BATCHES["dry" if config.dry else config.device]
    if min(sizes["batch_size"], *batches) < 2:
        raise ValueError("--batch-size and --batches: give at least 2, or there is nothing to contrast a patch with")
    cores, work = available_cores(), Path(config.work).resolve()
    result = Result(config.out, f"step-options-{config.device}", ["torch", "torchvision", "timm", "nvidia-dali-cuda130"])
    data = patch_set(None, work, patches=sizes["patches"], size=sizes["image_size"], batch_size=sizes["batch_size"], cores=cores)
    task = task_of(data, sizes, config.device, cores, seconds=sizes["seconds"])
    result.record |= {"timed": settings_of(task), "runs": {group: [] for group in groups}}
    for group in groups:
        for setting, with_loader in settings(group, task, batches):
            if setting.compile and not config.compile:
                continue
            run = {"text": text_of(setting)} | attempt(setting, work, with_loader=with_loader)
            result.record["runs"][group].append(run)
            if "failed" in run:
                result.record["failed"][f"{group}: {run['text']}"] = run["failed"]
            result.say(f"{group}: {' | '.join(_cells(run))}")
            result.save()
    result.finish(report_of(result.record))


def attempt(task: Task, work: Path, *, with_loader: bool) -> Record:
    """model, joint: img/s and peak memory; or what kept one from being measured, after which the next setting is tried."""
    import torch

    found: Record = {}
    for name in ("model", "joint") if with_loader else ("model",):
        try:
            fresh_memory(task.device)
            if name == "model":
                found[name] = model(task)
                continue
            # For about as long as the model alone was timed, if it is as fast.
            steps = max(8, math.ceil(task.seconds * found["model"]["steps"] / found["model"]["seconds"]))
            with tempfile.TemporaryDirectory(dir=work, prefix="run-", ignore_cleanup_errors=True) as folder:
                found[name] = joint(dataclasses.replace(task, work=folder, steps=steps))
        except Exception as error:  # torch's and the compiler's are of many kinds; what follows is worth having
            said = " ".join(str(error).split())[:300]
            # torch.cuda.OutOfMemoryError, which a setting may well come to, is no failure.
            found["no_memory" if "out of memory" in said else "failed"] = f"{name}: {type(error).__name__}: {said}"
            return found
        finally:
            torch.compiler.reset()  # or it takes the next setting's shapes for variable ones, and compiles for all of them
            gc.collect()
    return found


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
