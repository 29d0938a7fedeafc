"""How many images a second does a training step take: the loader alone, the model alone, both together, and other packages?

    python benchmarks/step.py --work DISK/bench                                   # resnet50 at 224 px, on the CPU
    python benchmarks/step.py --work DISK/bench --peers DISK/peers                # and lightly's and Spijkervet's
    python benchmarks/step.py --work DISK/bench --device cuda                     # in bf16, batch 256
    python benchmarks/step.py --work DISK/bench --backbone resnet18 --image-size 64 --batch-size 64
    python benchmarks/step.py --work DISK/bench --dry                             # tiny, in a minute

"Both together" is the stage of `train/pretrain.py` as a user starts it, without Ray and with one Ray worker. The others train
as their own examples do: their loader, augmentation (without blur), loss and optimiser, with the same backbone. All contenders
run in turn, round by round (A B C A B C), each in a fresh process, on the same patches, with the files in the page cache.

Results go to <out>/<date>-step-<device>.json, written after every run, and at the end as a table to the same name's .md. A target
that was not reached is printed as MISSED; who could not run stands in the table with the reason, and then the exit code is 1.
"""

import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import step_contenders  # noqa: E402
from measuring import RunFailed, absent, chosen, conclude, machine, new_path, record_of, run_fresh, settings_of, take, versions_of  # noqa: E402
from patch_set import patch_set  # noqa: E402
from step_contenders import CONTENDERS, Task  # noqa: E402
from step_peers import PEERS, Environment, environment_of  # noqa: E402
from step_report import completed, markdown, model_lines, table, target_lines  # noqa: E402

from sharding.cli import option, required, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402

_PILOT_S = 2.0  # of the run that tells how long a step takes, at least
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130", "ray")
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"backbone": "resnet50", "image_size": 224, "batch_size": 8, "patches": 1024, "rounds": 3, "seconds": 20.0},
    "cuda": {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "patches": 8192, "rounds": 3, "seconds": 20.0},
    "dry": {"backbone": "test_resnet", "image_size": 32, "batch_size": 4, "patches": 64, "rounds": 1, "seconds": 0.5},
}


@dataclass(frozen=True)
class Config:
    """What is trained by whom, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there, runs come and go")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of an environment for the other packages; made, with pip, where it is not there")
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
    given = {name: value for name in SIZES["cpu"] if (value := getattr(config, name)) is not None}
    sizes = SIZES["dry" if config.dry else config.device] | given
    for name, least in (("rounds", 1), ("image_size", 1), ("batch_size", 2), ("patches", sizes["batch_size"])):
        if sizes[name] < least:
            raise ValueError(f"--{name.replace('_', '-')} {sizes[name]} is out of range: give at least {least}")
    cores = config.cores or available_cores()
    if not 0 < cores <= available_cores():
        raise ValueError(f"--cores {cores} is out of range: this process may use {available_cores()}")
    console = Console(highlight=False, soft_wrap=True)
    work = Path(config.work).resolve()
    started = machine(cores)
    peers = environment_of(config.peers, names)
    missing = peers.missing | absent({"ray": ["ray"]}, names)
    for name, why in missing.items():
        console.print(f"{name}: {why}", markup=False)
    names = [name for name in names if name not in missing]
    data = patch_set(
        config.images,
        work,
        patches=sizes["patches"],
        size=sizes["image_size"],
        batch_size=sizes["batch_size"],
        cores=cores,
    )
    task = Task(
        shards=data.shards,
        images=data.images,
        work="",
        backbone=sizes["backbone"],
        image_size=sizes["image_size"],
        batch_size=sizes["batch_size"],
        device=config.device,
        bf16=config.device == "cuda",
        cores=cores,
        seconds=0.0,
        steps=0,
    )
    path = new_path(Path(config.out), f"step-{config.device}")
    # How many steps the project's loop has to take follows from how long one takes.
    short = dataclasses.replace(task, seconds=min(_PILOT_S, sizes["seconds"]), compile=False)
    try:
        pilot = one_run("model", short, peers, work, config.limit)
    except RunFailed as error:
        raise ValueError(
            f"{sizes['backbone']} at {sizes['image_size']} px takes no step on the {config.device}: {error}"
        ) from None
    step_s = pilot["seconds"] / pilot["steps"]
    console.print(f"a step of the model alone takes about {1000 * step_s:,.0f} ms", markup=False)
    task = dataclasses.replace(task, seconds=sizes["seconds"], steps=max(3, math.ceil(sizes["seconds"] / step_s)))
    record: dict[str, Any] = {
        **record_of(started, versions_of(_PACKAGES) | peers.versions),
        "images": data.described,
        "timed": settings_of(task) | {"rounds": sizes["rounds"]},
        "runs": {name: [] for name in names},
        "missing": missing,
        "failed": {},
    }
    for number in range(1, sizes["rounds"] + 1):
        for name in names:
            measure = functools.partial(one_run, name, task, peers, work, config.limit)
            take(record, name, f"round {number}: {name}", path, console, measure, lambda run: f"{run['img_per_s']:,.1f} img/s")
    record = completed(record)
    conclude(
        record,
        path,
        console,
        markdown=markdown(record),
        tables=[table(record)],
        lines=[*target_lines(record), *model_lines(record)],
    )


def one_run(name: str, task: Task, peers: Environment, work: Path, limit: float) -> dict[str, Any]:
    """What it reports. Raises RunFailed."""
    until = time.monotonic() + limit

    def watch(_: int) -> None:
        if time.monotonic() > until:
            raise RunFailed(f"not done after {limit:g} s")

    load = machine(task.cores)["load"][0]
    with tempfile.TemporaryDirectory(dir=work, prefix="run-", ignore_cleanup_errors=True) as folder:
        result = Path(folder) / "result.json"
        python = peers.python if name in PEERS else sys.executable
        given = json.dumps(dataclasses.asdict(dataclasses.replace(task, work=folder)))
        run_fresh([python, str(step_contenders.__file__), name, given, str(result)], work / "run.log", watch)
        return {**json.loads(result.read_text()), "load_before": load}


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="step.py", description=(__doc__ or "").splitlines()[0]))
