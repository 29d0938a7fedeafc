"""What the smoke benchmark compares: ours, and baselines that our code does not change, side by side in one process.

All times are CPU seconds of all threads and of all processes that were started and have ended, on one core: other work on the
machine takes none of them. What waits and does not compute is not seen; that is for the other benchmarks.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from worker import ROOT, Contender

SEED = 42
LEAST_ROUNDS = 5
PATCHES, DISTINCT, SIZE, QUALITY = 512, 128, 224, 90  # of the drawn patches
_LAP_S = 0.15  # CPU seconds that a side works at a time, at least
_DRAWN = 128  # patches of a lap of ours; torchvision takes so long that it has fewer
_BATCH = 32
_FEW = {"simclr": 24, "simclr-blur": 12}
_TEMPERATURE = 0.5


@dataclasses.dataclass(frozen=True)
class Task:
    """images: folder of the drawn patches; shards: of the set built from them; work: an empty one. seconds: of CPU time, for
    which rounds are begun."""

    images: str
    shards: str
    work: str
    seconds: float
    cores: int = 1


# Works for a while -> CPU seconds of one unit of its work
Side = Callable[[], float]


class Ratio(NamedTuple):
    """Of times, so that more is better: a baseline's / ours, two sides of a group. means: of what."""

    group: str
    baseline: str
    ours: str
    means: str


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def per_unit(once: Callable[[], Any], units: int, again: Callable[[], Any] = lambda: None) -> float:
    """CPU seconds of one of the units of work that `once` does, over as many calls as take a lap. again: called after each,
    outside the time."""
    spent, calls = 0.0, 0
    while spent < _LAP_S:
        started = cpu_seconds()
        once()
        spent += cpu_seconds() - started
        calls += 1
        again()
    return spent / (calls * units)


# ---- Each group's sides: as many functions as there are sides, ready to be timed ----


@contextlib.contextmanager
def views(task: Task) -> Iterator[dict[str, Side]]:
    """Every lap has the same patches and the same draws."""
    import torch
    from torch.utils.data import default_collate

    from contenders.loader import Files, TwoViews, our_loader, source_files, torchvision_transform

    def torchvision(recipe: str) -> None:
        torch.manual_seed(SEED)
        data = Files(files, transforms[recipe])
        default_collate([data[i] for i in range(_FEW[recipe])])

    def ours(loader: Any) -> None:  # a whole epoch: before it and after it nothing is under way
        loader.load_state_dict({"epoch": 0, "step": 0})
        for _ in loader:
            pass

    files = source_files(task.shards)
    transforms = {recipe: TwoViews(torchvision_transform(recipe, SIZE)) for recipe in _FEW}
    sides: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        for recipe, few in _FEW.items():
            sides[f"torchvision, {recipe}"] = functools.partial(per_unit, functools.partial(torchvision, recipe), few)
        for recipe in (*_FEW, "pathology"):
            sizes: dict[str, Any] = {"patches": _DRAWN, "batch_size": _BATCH, "image_size": SIZE}
            loader = stack.enter_context(our_loader(task.shards, recipe=recipe, threads=1, **sizes))
            sides[recipe] = functools.partial(per_unit, functools.partial(ours, loader), _DRAWN)
        yield sides


@contextlib.contextmanager
def packing(task: Task) -> Iterator[dict[str, Side]]:
    import tarfile

    from drawn_images import image_files

    from contenders.packing import Task as Packing
    from contenders.packing import decode_dali, ours

    out = Path(task.work) / "packed"
    files = Packing(task.images, str(out), 1)

    def tar() -> None:
        with tarfile.open(out / "images.tar", "w") as packed:
            for path, _ in image_files(task.images):
                packed.add(path)

    def emptied() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    emptied()
    work: dict[str, Callable[[], Any]] = {
        "decoding": lambda: decode_dali(files),
        "checked": lambda: ours(files, check="decode"),
        "tarfile": tar,
        "kept": lambda: ours(files, check="header"),
    }
    yield {side: functools.partial(per_unit, once, PATCHES, emptied) for side, once in work.items()}


@contextlib.contextmanager
def loss(task: Task) -> Iterator[dict[str, Side]]:
    import torch
    from ntxent import ours, plain

    def passes(make: Callable, anchors: int) -> Side:
        criterion = make(anchors // 2, _TEMPERATURE, "cpu")
        z_VBD = torch.randn(2, anchors // 2, 128, generator=torch.Generator().manual_seed(SEED)).requires_grad_()
        return functools.partial(per_unit, lambda: criterion(z_VBD).backward(), 1)

    makers = {"plain": plain, "ours": ours}
    yield {f"{name} {anchors}": passes(make, anchors) for anchors in (512, 4096) for name, make in makers.items()}


@contextlib.contextmanager
def heads(task: Task) -> Iterator[dict[str, Side]]:
    import heads as benchmark

    job = benchmark.Task(rows=640, features=512, epochs=10, cores=1)
    protocol = dataclasses.replace(benchmark.PROTOCOL, epochs=job.epochs)
    given = (*benchmark.drawn(job), benchmark.tasks_of(job, grid=False), protocol)
    sides = {"plain": benchmark.plain, "ours": benchmark.ours}
    yield {who: functools.partial(per_unit, functools.partial(train, *given), job.epochs) for who, train in sides.items()}


_BACKBONE, _STEP_SIZE, _STEP_BATCH, _STEPS = "test_resnet", 32, 32, 8


@contextlib.contextmanager
def step(task: Task) -> Iterator[dict[str, Side]]:
    import torch

    torch.manual_seed(SEED)
    yield {"plain": functools.partial(per_unit, _plain_step(), 1), "loop": functools.partial(_loop, task, itertools.count())}


def _plain_step() -> Callable[[], None]:
    """The model in torch alone, on views that are there."""
    import timm
    import torch
    from ntxent import plain
    from torch import nn

    backbone: Any = timm.create_model(_BACKBONE, pretrained=False, num_classes=0)
    width = backbone.num_features
    net = nn.Sequential(backbone, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    views_MCSS = torch.randn(2 * _STEP_BATCH, 3, _STEP_SIZE, _STEP_SIZE)
    criterion = plain(_STEP_BATCH, _TEMPERATURE, "cpu")

    def once() -> None:
        optimizer.zero_grad()
        criterion(net(views_MCSS).unflatten(0, (2, _STEP_BATCH))).backward()
        optimizer.step()

    return once


def _loop(task: Task, numbers: Iterator[int]) -> float:
    """The project's own loop with all that belongs to it, between its metrics' first row and its last."""
    import numpy as np
    import torch

    from sharding.manifest import fingerprint
    from train.records.data import Input, SetInput
    from train.trainer.loop import Job, fit
    from train.trainer.methods import SimCLR
    from train.trainer.worker import single_worker

    folder = Path(task.work) / f"run-{next(numbers)}"
    folder.mkdir()
    ids = np.arange(_STEP_BATCH * _STEPS)
    job = Job(
        folder=folder,
        input=Input((SetInput(task.shards, fingerprint(task.shards), ids),)),
        method=SimCLR(128, _TEMPERATURE),
        backbone=_BACKBONE,
        init="scratch",
        image_size=_STEP_SIZE,
        batch_size=_STEP_BATCH,
        epochs=2,
        optimizer="lars",
        peak_learning_rate=0.01,
        weight_decay=1e-6,
        warmup_epochs=0.0,
        precision="fp32",
        seed=SEED,
        threads=1,
        compile=False,
        log_every=_STEPS,  # the first epoch is not timed
        checkpoint_every=10**9,
        max_failures=0,
        card={"method": "simclr", "chain": [], "key": ""},
    )
    times: list[float] = []
    fit(job, single_worker(folder, torch.device("cpu")), lambda row: times.append(cpu_seconds()))
    shutil.rmtree(folder)
    first, last = times
    return (last - first) / _STEPS


@contextlib.contextmanager
def start(task: Task) -> Iterator[dict[str, Side]]:
    """Processes from their start to their end; files and bytecode are in memory after the first time."""

    def process(*arguments: str) -> Side:
        settings: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 120, "cwd": ROOT}
        return functools.partial(per_unit, lambda: subprocess.run([sys.executable, *arguments], **settings), 1)

    yield {
        "pyarrow": process("-c", "import pyarrow.parquet"),
        "build": process("sharding/build.py", "--help"),
        "pretrain": process("train/pretrain.py", "--help"),
    }


_VIEWS = "two views of 224 px, recipe {}: torchvision on Pillow, recipe {} / ours"
_PATCH = "a patch of 224 px: {} / packing with --check {}"
_LOSS = "NT-Xent of 2N = {:,}, D = 128, both passes: the plain formula / ours"
_STEP = f"a step of {_BACKBONE}, {_STEP_BATCH} patches of {_STEP_SIZE} px: the model in torch alone / the whole training loop"
_START = "a process: import pyarrow.parquet / {} --help"
RATIOS = {
    "views": Ratio("views", "torchvision, simclr", "simclr", _VIEWS.format("simclr", "simclr")),
    "views-blur": Ratio("views", "torchvision, simclr-blur", "simclr-blur", _VIEWS.format("simclr-blur", "simclr-blur")),
    "views-pathology": Ratio("views", "torchvision, simclr", "pathology", _VIEWS.format("pathology", "simclr")),
    "packing": Ratio("packing", "decoding", "checked", _PATCH.format("decoding by DALI", "decode")),
    "packing-header": Ratio("packing", "tarfile", "kept", _PATCH.format("Python's tarfile", "header")),
    "loss-512": Ratio("loss", "plain 512", "ours 512", _LOSS.format(512)),
    "loss-4096": Ratio("loss", "plain 4096", "ours 4096", _LOSS.format(4096)),
    "heads": Ratio("heads", "plain", "ours", "a linear head on 640 x 512 features, Adam: a plain torch loop / ours"),
    "step": Ratio("step", "plain", "loop", _STEP),
    "start-build": Ratio("start", "pyarrow", "build", _START.format("sharding/build.py")),
    "start-pretrain": Ratio("start", "pyarrow", "pretrain", _START.format("train/pretrain.py")),
}


# ---- The measurement ----

GROUPS: dict[str, Callable[[Task], contextlib.AbstractContextManager[dict[str, Side]]]] = {
    each.__name__: each for each in (views, packing, loss, heads, step, start)
}


def measure(group: str, task: Task) -> dict[str, list[float]]:
    """CPU seconds of a unit of every side's work, round by round."""
    with GROUPS[group](task) as sides:
        for side in sides.values():  # compiles, maps and allocates
            side()
        found: dict[str, list[float]] = {name: [] for name in sides}
        until, rounds = cpu_seconds() + task.seconds, 0
        while rounds < LEAST_ROUNDS or cpu_seconds() < until:
            for name, side in sides.items():
                found[name].append(side())
            rounds += 1
        return found


def _on_one_core(group: str, task: Task) -> dict[str, list[float]]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # of which most others take the first
    import torch

    torch.set_num_threads(1)
    return measure(group, task)


CONTENDERS = {group: Contender(group, functools.partial(_on_one_core, group), pinned=False) for group in GROUPS}
