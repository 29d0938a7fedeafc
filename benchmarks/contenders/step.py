"""Contenders of the training step benchmark: the loader alone, the model alone, both in the project's own loop, and others.

All have the same patches, backbone, batch size and cores. The steady state is timed: steps after the first ones.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from worker import Contender, steady_state

SEED = 42
WARM = 3  # steps that are not timed, at least
PROJECTION, TEMPERATURE = 128, 0.5
_ROWS = 8  # of metrics.jsonl over the timed steps, about
_ENDLESS = 10**12
_RATE, _WEIGHT_DECAY = 0.01, 1e-6


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and how it is timed.

    shards: folder of the shard set; images: of the files that it was built from; work: an empty one, for runs. image_size: side
    of the views, pixels. bf16: under autocast, else float32. seconds: steps are timed for at least so long; steps: of the
    project's own loop, which is told beforehand how many to take. compile, channels_last: None is the stage's own choice.
    micro_batch: in two passes, so many patches at a time.
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
    channels_last: bool | None = None
    micro_batch: int | None = None


def timed(batches: Iterator, step: Callable[[Any], None], task: Task) -> dict[str, Any]:
    """img_per_s: views, two of each patch; data_wait: the share of the time spent waiting for batches, 0 to 1."""
    steps, seconds, waited = steady_state(batches, step, warm=WARM, lap=1, seconds=task.seconds, device=task.device)
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


# ---- Ours ----


def loader(task: Task) -> dict[str, Any]:
    """The views as the loop asks for them, and nothing done with them."""
    import torch

    from contenders.loader import our_loader

    with our_loader(
        task.shards,
        batch_size=task.batch_size,
        image_size=task.image_size,
        device=task.device,
        dtype=torch.bfloat16 if task.bf16 and task.device == "cuda" else torch.float32,
        channels_last=task.device == "cuda",
    ) as views:
        epochs = itertools.chain.from_iterable(itertools.repeat(views))
        return timed(epochs, lambda batch: None, task) | {"data_wait": None}


class Training(NamedTuple):
    """step: takes one; net: what it trains, to be compiled in place."""

    net: Any
    step: Callable[[], None]


def model_step(task: Task) -> Training:
    """Steps of SimCLR with LARS as the loop takes them, always on the same random views, which lie on the device.

    What the loop sets for the whole process is the caller's: `train.trainer.precision.backend_settings`.
    """
    import torch

    from models.backbones import build_backbone
    from train.trainer.grad_cache import grad_cache_backward
    from train.trainer.loop import ViewModel
    from train.trainer.methods import SimCLR
    from train.trainer.optim import build_optimizer
    from train.trainer.precision import default_on_cuda

    torch.manual_seed(SEED)
    method, device, size = SimCLR(PROJECTION, TEMPERATURE), task.device, task.image_size
    features: Any = build_backbone(task.backbone, size)
    net: Any = ViewModel(features, method.build_head(int(features.num_features))).to(device)
    views_VBCSS = torch.randn(2, task.batch_size, 3, size, size, device=device)
    if task.bf16 and device == "cuda":
        views_VBCSS = views_VBCSS.bfloat16()
    if default_on_cuda(task.channels_last, torch.device(device)):
        net = net.to(memory_format=torch.channels_last)
        views_VBCSS = views_VBCSS.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    optimizer = build_optimizer("lars", net, weight_decay=_WEIGHT_DECAY, fused=device == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = _RATE
    net.train()
    label_B = torch.full((task.batch_size,), -1, device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=task.bf16)

    def loss_of(z_VBD: torch.Tensor) -> torch.Tensor:
        return method.loss(z_VBD, label_B, None)

    def reseed(number: int) -> None:
        torch.manual_seed(number)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if task.micro_batch is None:
            with autocast():
                loss = loss_of(net(views_VBCSS))
            loss.backward()
        else:
            grad_cache_backward(net, views_VBCSS, loss_of, micro_batch=task.micro_batch, reseed=reseed, autocast=autocast)
        optimizer.step()

    return Training(net, step)


def step_flops(training: Training) -> int:
    """Floating-point operations of a step (a multiply and an add are two), by taking one. Before the net is compiled: the
    compiler's own kernels are not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        training.step()
    return counter.get_total_flops()


def model(task: Task) -> dict[str, Any]:
    """Steps on one batch that lies on the device, computed as the stage computes them. peak_gib: the most that tensors took."""
    import torch

    from train.trainer.precision import backend_settings, compile_model

    device, on_gpu = torch.device(task.device), task.device == "cuda"
    with backend_settings(device, deterministic=False):
        training = model_step(task)
        flops = step_flops(training)
        compiled = compile_model(training.net, task.compile, device)
        fresh_memory(task.device)
        found = timed(itertools.repeat(None), lambda batch: training.step(), task)
    return found | {
        "data_wait": None,
        "flops_per_step": flops,
        "compiled": compiled,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
    }


def pretrained(task: Any, **settings: Any) -> Any:
    """The finished run of the stage as a user starts it: with what the task says, and further settings of its config."""
    from train.config import PretrainConfig
    from train.stages.pretraining import pretrain

    sizes = {name: getattr(task, name) for name in ("backbone", "image_size", "batch_size")}
    settings |= {"projection_dim": PROJECTION, "temperature": TEMPERATURE, "precision": "bf16" if task.bf16 else "fp32"}
    settings |= {"threads": task.cores, "storage": task.work, "checkpoint_every": 10**9}  # writing is not what is measured
    return pretrain(PretrainConfig(data=task.shards, **sizes, **settings))


def joint(task: Task, *, workers: int = 0) -> dict[str, Any]:
    """The stage. Its metrics' first row, which holds all that is done once, is left out."""
    from sharding.manifest import read_manifest

    fresh_memory(task.device)
    patches = len(read_manifest(task.shards, columns=["id"]))
    row = max(WARM, -(-task.steps // _ROWS))
    wanted = task.batch_size * (row + task.steps)
    run = pretrained(
        task,
        name=f"workers-{workers}",
        # As few epochs as give so many steps: between two of them there is a pause.
        fraction=min(1.0, wanted / patches),
        epochs=math.ceil(wanted / (patches - patches % task.batch_size)),
        compile=task.compile,
        channels_last=task.channels_last,
        workers=workers,
        log_every=row,
        seed=SEED,
    )
    rows = run.metrics()
    return summarise_rows(rows, task.batch_size) | {"peak_gib": rows[-1].get("gpu_memory_gib")}


def ray(task: Task) -> dict[str, Any]:
    os.environ["RAY_ADDRESS"] = "local"  # whatever cluster this machine is part of
    return joint(task, workers=1)


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
    backbone = seeded_backbone(task.backbone, task.image_size, SEED)
    head = SimCLRProjectionHead(backbone.num_features, backbone.num_features, PROJECTION)
    net = torch.nn.Sequential(backbone, head).to(task.device)
    criterion = NTXentLoss(temperature=TEMPERATURE)
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
    backbone = seeded_backbone(task.backbone, task.image_size, SEED)
    net = SimCLR(backbone, PROJECTION, backbone.num_features).to(task.device)
    criterion = NT_Xent(task.batch_size, TEMPERATURE, 1).to(task.device)
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


def seeded_backbone(name: str, image_size: int, seed: int) -> Any:
    """The seed decides its weights."""
    import torch

    from models.backbones import build_backbone

    torch.manual_seed(seed)
    return build_backbone(name, image_size)


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
