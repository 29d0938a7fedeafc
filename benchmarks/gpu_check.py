"""Everything that only a GPU can tell, in one command of at most 4 minutes.

    python benchmarks/gpu_check.py --out benchmarks/results           # on a host with a GPU
    python benchmarks/gpu_check.py --out /tmp/check --dry             # the same code on a CPU, tiny, in a minute

It draws its own patches, packs them, and then, step by step: decodes on the device and holds the pixels against the CPU's;
does the same for resize, colour and whole views; asks whether a view stays the same, bit for bit, in another batch and after
a restart; measures the model alone, the loader alone, and both together in the project's own training loop.

Every result is written at once to <out>/<date>-gpu-check-<device>.json, so that a run that is cut off keeps what it has; a
Markdown table follows at the end. A step that fails is written down with its error and the next one begins; the exit code
is then 1. `--steps` runs only some of them.
"""

import faulthandler
import re
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The processes that draw patches import this file again. torch is nothing to them: it and the steps are imported in `main`.
from harness import Result, script
from report import Record, Report, Table

from sharding.cli import option, required

# In this order: functions of gpu_steps, and the seconds that must be left to begin with them
STEPS = {
    "environment": 0,
    "data": 0,
    "decode": 15,
    "views": 15,
    "purity": 15,
    "model": 20,
    "loader": 25,
    "joint": 45,
}
NEED_NO_DATA = {"environment", "model"}
FULL = {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "patches": 4096, "sample": 64}
DRY = {"backbone": "test_resnet", "image_size": 64, "batch_size": 8, "patches": 48, "sample": 12}


@dataclass(frozen=True)
class Config:
    """What is checked, and how large."""

    out: str = required("folder for the results")
    dry: bool = option(False, "the same code on the CPU with tiny sizes")
    data: str | None = option(None, "a shard set to use; default: patches are drawn")
    steps: list[str] = option([], "only these steps; default: all (their names are the rows of the table)")
    seconds: float = option(220.0, "time for everything; steps that no longer fit are skipped")
    backbone: str | None = option(None, "any timm model; default: resnet50 (dry: test_resnet)")
    image_size: int | None = option(None, "side of patches and views, pixels; default: 224 (dry: 64)")
    batch_size: int | None = option(None, "patches per step; default: 256 (dry: 8)")
    patches: int | None = option(None, "patches to draw; default: 4096 (dry: 48)")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")


def main(config: Config) -> None:
    # A step that hangs, in DALI or in a driver, says where before it is ended.
    faulthandler.dump_traceback_later(config.seconds + (180 if config.dry else 20), exit=True)
    deadline = time.monotonic() + config.seconds
    names = chosen_steps(config)
    device = device_name(config)
    given = {name: value for name in FULL if (value := getattr(config, name, None)) is not None}
    sizes: dict[str, Any] = (DRY if config.dry else FULL) | given
    result = Result(config.out, f"gpu-check-{device}", commit=config.commit)
    shown = {name: sizes[name] for name in ("backbone", "image_size", "batch_size")}
    result.record |= {"device": device, "dry": config.dry, **shown, "steps": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        from gpu_steps import Setting

        kind: dict[str, Any] = {"device": "cpu" if config.dry else "cuda", "dry": config.dry}
        s = Setting(folder=Path(folder), **kind, data=config.data, deadline=deadline, **sizes)
        for name in names:
            run_step(name, s, result)
    faulthandler.cancel_dump_traceback_later()
    result.record["failed"] = {name: step["error"] for name, step in result.record["steps"].items() if step["status"] == "failed"}
    result.finish(report_of(result.record))


def chosen_steps(config: Config) -> list[str]:
    """In their order, with those that they need. Raises ValueError for a name that is none."""
    unknown = [name for name in config.steps if name not in STEPS]
    if unknown:
        raise ValueError(f"there is no step {unknown[0]!r}: choose of {', '.join(STEPS)}")
    chosen = {"environment", *(config.steps or STEPS)}
    if chosen - NEED_NO_DATA:
        chosen.add("data")
    return [name for name in STEPS if name in chosen]


def device_name(config: Config) -> str:
    """For the file's name. Raises ValueError without a GPU."""
    import torch

    if config.dry:
        torch.set_num_threads(1)  # on cores that others use too, threads that wait for each other are many times slower
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: --dry runs the same code on the CPU")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def run_step(name: str, s: Any, result: Result) -> None:
    """Run a step, with its outcome written down before and after."""
    import gpu_steps

    steps = result.record["steps"]
    if s.left < STEPS[name] and not s.dry:
        why = f"{s.left:.0f} s were left, and it may take {STEPS[name]} s"
        steps[name] = {"status": "skipped", "why": why}
        print(f"SKIPPED {name}: {why}", flush=True)
        result.save()
        return
    step = getattr(gpu_steps, name)
    print(f"{name}: {step.__doc__.splitlines()[0]}", flush=True)
    steps[name] = {"status": "running"}  # what stands there if the process is killed
    result.save()
    started, status = time.monotonic(), "ok"
    found: Record = {}
    try:
        step(s, found)
    # The one place that catches everything: a GPU is lent for minutes, and what the other steps find out is worth
    # having when one of them fails, in whatever way. The error is kept, shown, and decides the exit code.
    except Exception as error:
        status = "failed"
        found |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc().splitlines()}
        print(f"FAILED {name}: {found['error']}\n{traceback.format_exc()}", flush=True)
    seconds = round(time.monotonic() - started, 1)
    steps[name] = {"status": status, "step_seconds": seconds} | found
    result.save()
    print(f"    {name}: {status} after {seconds} s", flush=True)


def report_of(record: Record) -> Report:
    """A row for each measurement of each step."""
    rows = []
    for step, found in record["steps"].items():
        rows.append([step, "", f"{found['status']} ({found.get('step_seconds', 0)} s)"])
        for name, value in found.items():
            if name not in ("status", "step_seconds", "traceback"):
                text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
                rows.append([step, name, text])
    title = f"GPU check{' (a dry run: no figure means anything)' if record['dry'] else ''}, {record['device']}"
    return Report(record, title, [Table(["step", "figure", "value"], rows)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
