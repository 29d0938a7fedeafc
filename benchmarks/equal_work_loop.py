"""A loop of torch alone on the patches of a shard set, as one would write it without the project: dataset, order, loss, steps.

Who lets it run with which views is in `equal_work_contenders`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

WEIGHTS = "backbone.safetensors"
PROJECTION, TEMPERATURE = 128, 0.5
PEAK, DECAY, WARMUP = 3e-4, 1e-6, 0.1  # of Adam: the rate at its peak, the decay of weights; the share of the epochs before it


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt from what, and who judges it.

    shards: folder of the set to learn from, of which the train split is used; judged: of the labelled one; work: an empty folder
    of this run; image_size: side of the views, pixels; cores: threads of whatever has threads.
    """

    shards: str
    judged: str
    work: str
    recipe: str
    backbone: str
    image_size: int
    batch_size: int
    epochs: int
    device: str
    cores: int
    seed: int

    @property
    def bf16(self) -> bool:
        return self.device == "cuda"


class Images:
    """The train split's patches of the shard set as a dataset of Pillow images without labels. ids: (n,) int64."""

    def __init__(self, task: Task):
        from pipelines.shard_reader import ShardReader
        from sharding.selection import select

        self.reader = ShardReader(task.shards)
        self.ids = select(self.reader.manifest, split="train")
        self.transform: Callable | None = None  # lightly sets it

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        assert self.transform is not None
        return self.transform(self.image(int(self.ids[place]))), -1

    def image(self, i: int) -> Any:
        import io

        import numpy as np
        from PIL import Image

        (encoded,) = self.reader.read(np.array([i]))
        return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


class Views:
    """A dataset that makes the two views of each key."""

    def __init__(self, make: Callable[[tuple[int, int]], list[Any]]):
        self.make = make

    def __getitem__(self, key: tuple[int, int]) -> list[Any]:
        return self.make(key)


def in_our_order(task: Task, images: Images, make: Callable[[tuple[int, int]], list[Any]]) -> Iterable:
    """Batches of what is made of each (epoch, patch id), in the order in which our loader has them."""
    from torch.utils.data import DataLoader

    return DataLoader(Views(make), batch_sampler=our_batches(task, images.ids), num_workers=processes(task))  # type: ignore


def our_batches(task: Task, ids: Any) -> list[list[tuple[int, int]]]:
    """The (epoch, patch id) of each step of all epochs, as our loader has them."""
    from pipelines.sampler import epoch_order, rank_slice

    found = []
    for epoch in range(task.epochs):
        order = epoch_order(ids, seed=task.seed, epoch=epoch)
        for step in range(len(ids) // task.batch_size):
            batch = rank_slice(order, step, task.batch_size, rank=0, world_size=1)
            found.append([(epoch, int(i)) for i in batch])
    return found


def full_nt_xent(z0_BD: Any, z1_BD: Any, temperature: float = TEMPERATURE) -> Any:
    """Equation 1 of Chen et al. 2020 (SimCLR), over both views as anchors: a scalar."""
    import torch
    from torch.nn import functional as F

    u_MD = F.normalize(torch.cat([z0_BD, z1_BD]).float(), dim=1)
    s_MM = u_MD @ u_MD.T / temperature
    itself_MM = torch.eye(len(u_MD), dtype=torch.bool, device=u_MD.device)
    other_view_M = torch.arange(len(u_MD), device=u_MD.device).roll(len(z0_BD))
    return F.cross_entropy(s_MM.masked_fill(itself_MM, -torch.inf), other_view_M)


def rate(step: int, *, steps: int, warmup_steps: int) -> float:
    """The learning rate as a share of its peak: up a line, down half a cosine. step: 0 for the first one."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def initial_backbone(task: Task) -> Any:
    """What all begin with: the seed decides the weights."""
    import torch

    from models.backbones import build_backbone

    torch.manual_seed(task.seed)
    return build_backbone(task.backbone, task.image_size)


def plain_net(task: Task) -> Any:
    from torch import nn

    backbone = initial_backbone(task)
    width = backbone.num_features
    # Made in this order, the head's weights too are those of ours.
    return nn.Sequential(
        backbone,
        nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, PROJECTION, bias=False)),
    )


def processes(task: Task) -> int:
    """Of a DataLoader: on a single core it works in the process that trains."""
    return task.cores if task.cores > 1 else 0


def run_loop(task: Task, net: Any, batches: Iterable, loss_of: Callable[[list[Any]], Any], *, patches: int) -> list[float]:
    """The loss of every step. net: the backbone and the head, in this order; batches: of lists of two views."""
    import torch
    from safetensors.torch import save_file

    net.to(task.device).train()
    steps_per_epoch = patches // task.batch_size
    warmup_steps = round(WARMUP * task.epochs * steps_per_epoch)
    weights = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=PEAK)
    share = functools.partial(rate, steps=task.epochs * steps_per_epoch, warmup_steps=warmup_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses = []
    for views in batches:
        optimizer.zero_grad()
        with torch.autocast(task.device, torch.bfloat16, enabled=task.bf16):
            loss = loss_of([view.to(task.device) for view in views])
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    save_file({name: tensor.cpu().contiguous() for name, tensor in net[0].state_dict().items()}, Path(task.work) / WEIGHTS)
    return losses
