"""Contenders of the training step benchmark: the loader alone, the model alone, both in the project's own loop, and others.

All have the same patches, backbone, batch size and cores. The steady state is timed: steps after the first ones.
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from worker import Contender, synchronize

SEED = 42
WARM = 3  # steps that are not timed, at least
_ROWS = 8  # of metrics.jsonl over the timed steps, about
_ENDLESS = 10**12
_PROJECTION, _TEMPERATURE = 128, 0.5


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and how it is timed.

    shards: folder of the shard set; images: of the files that it was built from; work: an empty one, for runs. image_size: side
    of the views, pixels. bf16: under autocast, else float32. seconds: steps are timed for at least so long; steps: of the
    project's own loop, which is told beforehand how many to take. compile: None is the stage's own choice.
    """

    shards: str
    images: str
    work: str
    backbone: str
    image_size: int
    batch_size: int
    device: str
    bf16: bool
    cores: int
    seconds: float
    steps: int
    compile: bool | None = None


def timed(batches: Iterator, step: Callable[[Any], None], task: Task) -> dict[str, Any]:
    """img_per_s: views, two of each patch; data_wait: the share of the time spent waiting for batches, 0 to 1."""
    for batch in itertools.islice(batches, WARM):
        step(batch)
    synchronize(task.device)
    steps, waited, started = 0, 0.0, time.perf_counter()
    while time.perf_counter() - started < task.seconds or not steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
        steps += 1
    synchronize(task.device)
    seconds = time.perf_counter() - started
    return {
        "img_per_s": 2 * task.batch_size * steps / seconds,
        "data_wait": waited / seconds,
        "steps": steps,
        "seconds": seconds,
    }


def fresh_memory(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """The most that tensors took since `fresh_memory`; None on a CPU."""
    if device == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return None


# ---- Ours ----


def loader(task: Task) -> dict[str, Any]:
    """The views as the loop asks for them, and nothing done with them."""
    import numpy as np
    import torch

    from pipelines.loader import ViewLoader
    from pipelines.recipes import get_recipe
    from pipelines.shard_reader import ShardReader

    reader = ShardReader(task.shards)
    with ViewLoader(
        reader,
        np.arange(len(reader)),
        batch_size=task.batch_size,
        image_size=task.image_size,
        recipe=get_recipe("simclr"),
        seed=SEED,
        device=task.device,
        dtype=torch.bfloat16 if task.bf16 and task.device == "cuda" else torch.float32,
        channels_last=task.device == "cuda",
    ) as views:
        epochs = itertools.chain.from_iterable(itertools.repeat(views))
        return timed(epochs, lambda batch: None, task) | {"data_wait": None}


def model(task: Task) -> dict[str, Any]:
    """Steps on one batch that lies on the device, computed as the stage computes them."""
    import torch
    from step_model import model_step, step_flops

    from train.trainer.precision import backend_settings, compile_model

    device = torch.device(task.device)
    with backend_settings(device, deterministic=False):
        training = model_step(
            backbone=task.backbone,
            image_size=task.image_size,
            batch_size=task.batch_size,
            device=task.device,
            precision="bf16" if task.bf16 else "fp32",
        )
        flops = step_flops(training)
        compiled = compile_model(training.net, task.compile, device)
        fresh_memory(task.device)
        found = timed(itertools.repeat(None), lambda batch: training.step(), task)
    return found | {
        "data_wait": None,
        "flops_per_step": flops,
        "compiled": compiled,
        "gpu": torch.cuda.get_device_name() if task.device == "cuda" else None,
        "peak_gib": peak_gib(task.device),
    }


def joint(task: Task) -> dict[str, Any]:
    return pretrained(task, workers=0)


def ray(task: Task) -> dict[str, Any]:
    os.environ["RAY_ADDRESS"] = "local"  # whatever cluster this machine is part of
    return pretrained(task, workers=1)


def pretrained(task: Task, *, workers: int, **settings: Any) -> dict[str, Any]:
    """The stage as a user starts it, with further settings of its config. Its metrics' first row, which holds all that is done
    once, is left out."""
    from sharding.manifest import read_manifest
    from train.config import PretrainConfig
    from train.stages.pretraining import pretrain

    patches = len(read_manifest(task.shards))
    row = max(WARM, -(-task.steps // _ROWS))
    wanted = task.batch_size * (row + task.steps)
    config = PretrainConfig(
        data=task.shards,
        name=f"workers-{workers}",
        backbone=task.backbone,
        # As few epochs as give so many steps: between two of them there is a pause.
        fraction=min(1.0, wanted / patches),
        epochs=math.ceil(wanted / (patches - patches % task.batch_size)),
        image_size=task.image_size,
        batch_size=task.batch_size,
        projection_dim=_PROJECTION,
        temperature=_TEMPERATURE,
        precision="bf16" if task.bf16 else "fp32",
        compile=task.compile,
        workers=workers,
        threads=task.cores,
        log_every=row,
        checkpoint_every=10**9,  # writing is not what is measured
        seed=SEED,
        storage=task.work,
    )
    rows = pretrain(dataclasses.replace(config, **settings)).metrics()
    losses = {"loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"]}
    return summarise_rows(rows, task.batch_size) | losses | {"peak_gib": rows[-1].get("gpu_memory_gib")}


def summarise_rows(rows: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """As `timed`, from rows of metrics.jsonl, of which the first is left out."""
    steps = seconds = waited = 0.0
    for before, row in itertools.pairwise(rows):
        took = batch_size * (row["step"] - before["step"]) / row["patches_per_s"]
        seconds += took
        waited += took * row["data_wait"]
        steps += row["step"] - before["step"]
    assert seconds > 0, rows
    return {
        "img_per_s": 2 * batch_size * steps / seconds,
        "data_wait": waited / seconds,
        "steps": steps,
        "seconds": seconds,
    }


# ---- The others, with loaders, augmentation, loss and optimiser of their own examples ----


def lightly(task: Task) -> dict[str, Any]:
    """As examples/pytorch/simclr.py, but without blur, which none of the contenders has."""
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    dataset = LightlyDataset(task.images, transform=SimCLRTransform(input_size=task.image_size, gaussian_blur=0.0))
    backbone = _backbone(task)
    head = SimCLRProjectionHead(backbone.num_features, backbone.num_features, _PROJECTION)
    net = torch.nn.Sequential(backbone, head).to(task.device)
    criterion = NTXentLoss(temperature=_TEMPERATURE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.06)

    def step(batch):
        x0, x1 = (view.to(task.device) for view in batch[0])
        with torch.autocast(task.device, torch.bfloat16, enabled=task.bf16):
            loss = criterion(net(x0), net(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(_loaded(dataset, task), step, task)


def simclr(task: Task) -> dict[str, Any]:
    """As main.py of github.com/Spijkervet/SimCLR, with Adam."""
    import torch
    from simclr import SimCLR
    from simclr.modules import NT_Xent
    from simclr.modules.transformations import TransformsSimCLR
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(task.images, transform=TransformsSimCLR(size=task.image_size))
    backbone = _backbone(task)
    net = SimCLR(backbone, _PROJECTION, backbone.num_features).to(task.device)
    criterion = NT_Xent(task.batch_size, _TEMPERATURE, 1).to(task.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)

    def step(batch):
        (x_i, x_j), _ = batch
        optimizer.zero_grad()
        x_i, x_j = x_i.to(task.device, non_blocking=True), x_j.to(task.device, non_blocking=True)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.bf16):
            _, _, z_i, z_j = net(x_i, x_j)
            loss = criterion(z_i, z_j)
        loss.backward()
        optimizer.step()
        loss.item()  # for its sum of the epoch, which it keeps at every step

    return timed(_loaded(dataset, task), step, task)


def _backbone(task: Task) -> Any:
    import torch

    from models.backbones import build_backbone

    torch.manual_seed(SEED)
    return build_backbone(task.backbone, task.image_size)


def _loaded(dataset: Any, task: Task) -> Iterator:
    """torch's DataLoader with a process per core. One epoch without end: their pauses between two are not measured."""
    from torch.utils.data import DataLoader, RandomSampler

    order = RandomSampler(dataset, num_samples=_ENDLESS)  # every patch once before any comes again
    return iter(DataLoader(dataset, task.batch_size, sampler=order, num_workers=task.cores, drop_last=True))


# In the order of the rounds: what is compared stands side by side. The worker of Ray keeps to its cores by its threads, so that
# Ray's own processes have those that are free.
CONTENDERS = {
    "loader": Contender("ours, the loader alone", loader),
    "model": Contender("ours, the model alone", model),
    "joint": Contender("ours, both", joint),
    "ray": Contender("ours, both, one Ray worker", ray, needs=("ray",), pinned=False),
    "lightly": Contender("lightly", lightly),
    "simclr": Contender("Spijkervet's simclr", simclr),
}
