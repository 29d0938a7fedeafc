"""Are views on a GPU those of the CPU, and do they stay the same? In one command of at most 4 minutes.

    python benchmarks/gpu_check.py --out benchmarks/results           # on a host with a GPU
    python benchmarks/gpu_check.py --out /tmp/check --dry             # the same code on a CPU, tiny, in a minute

Step by step (gpu_pixels.py) it decodes on the device and compares the pixels with the CPU's, does the same for resizing, colour
and whole views, and asks whether a view stays the same, bit for bit, in another batch and after a restart.

Every step's result is written at once to <out>/<date>-gpu-check-<device>.json; a Markdown table follows at the end. A step that
fails is recorded with its error and the next one begins; the exit code is then 1.
"""

import faulthandler
import re
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# The processes that draw patches import this file again. torch is nothing to them: gpu_pixels is imported in `main`.
from harness import Result, chosen, script, set_of
from patch_set import patch_set
from report import Record, Report, Table

from sharding.cli import option, required
from sharding.process_pool import available_cores

STEPS = ("environment", "decode", "views", "purity")  # functions of gpu_pixels
FULL = {"image_size": 224, "patches": 256, "sample": 64}
DRY = {"image_size": 64, "patches": 48, "sample": 12}


@dataclass(frozen=True)
class Config:
    """What is checked, and how large."""

    out: str = required("folder for the results")
    dry: bool = option(False, "the same code on the CPU with tiny sizes")
    data: str | None = option(None, "a shard set to use; default: patches are drawn")
    steps: list[str] = option([], f"only these of {', '.join(STEPS)}; default: all")
    seconds: float = option(220.0, "after so many seconds a check that hangs prints where, and ends")
    image_size: int | None = option(None, "side of patches and views, pixels; default: 224 (dry: 64)")
    commit: str | None = option(None, "the code's commit, where the host has the files without their history")


def main(config: Config) -> None:
    names = chosen(config.steps, STEPS, "step")
    import torch

    if not config.dry and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: --dry runs the same code on the CPU")
    device = "cpu" if config.dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    if config.dry:
        torch.set_num_threads(1)  # on shared cores, threads that wait for each other are many times slower
    import gpu_pixels

    faulthandler.dump_traceback_later(config.seconds, exit=True)
    sizes = DRY if config.dry else FULL
    size = config.image_size or sizes["image_size"]
    result = Result(config.out, f"gpu-check-{device}", commit=config.commit)
    result.record |= {"device": device, "dry": config.dry, "image_size": size, "steps": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        data = config.data
        if data is None:
            drawn = {"patches": sizes["patches"], "size": size, "batch_size": 1, "cores": available_cores()}
            data = patch_set(None, Path(folder), **drawn).shards
        check = gpu_pixels.Check(Path(folder), data, "cpu" if config.dry else "cuda", size, sizes["sample"])
        result.record["set"] = set_of(Path(data))
        for name in names:
            run_step(name, check, result)
    faulthandler.cancel_dump_traceback_later()
    result.finish(report_of(result.record))


def run_step(name: str, check: object, result: Result) -> None:
    """Run a step, with its outcome written down before and after."""
    import gpu_pixels

    steps = result.record["steps"]
    steps[name] = {"status": "running"}  # what stands there if the process is killed
    result.save()
    started, status = time.monotonic(), "ok"
    found: Record = {}
    try:
        getattr(gpu_pixels, name)(check, found)
    # The one place that catches everything: a GPU is lent for minutes, and what the other steps find is worth having. The error
    # is kept, shown, and decides the exit code.
    except Exception as error:
        status, result.record["failed"][name] = "failed", f"{type(error).__name__}: {error}"
        found |= {"error": result.record["failed"][name], "traceback": traceback.format_exc().splitlines()}
        print(traceback.format_exc(), flush=True)
    steps[name] = {"status": status, "step_seconds": round(time.monotonic() - started, 1)} | found
    result.save()
    print(f"{name}: {status} after {steps[name]['step_seconds']} s", flush=True)


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
    return Report(record, title, [Table(["step", "measured", "value"], rows)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
