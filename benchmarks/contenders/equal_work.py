"""Contenders of the benchmark of equal work: the project's own stage, lightly, and a loop of torch and torchvision alone.

Each pretrains on the same patches of the same shard set, from the same initial weights of the backbone, for as many steps of the
same optimiser. It returns the loss of every step and leaves the backbone in the task's folder, where `evaluated` evaluates it.
"""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ntxent import plain as plain_loss
from worker import Contender

from contenders.loader import TwoViews, torchvision_transform
from contenders.step import PROJECTION, TEMPERATURE, pretrained, seeded_backbone

WEIGHTS = "backbone.safetensors"
PEAK, DECAY, WARMUP = 3e-4, 1e-6, 0.1  # of Adam: the rate at its peak, the decay of weights; the share of the epochs before it
METRICS = {"linear accuracy": "linear", "kNN accuracy": "knn"}  # and the mode of train/evaluate.py that finds it


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt from what, and where it is evaluated.

    shards: folder of the set to learn from, of which the train split is used; judged: of the labelled one; work: an empty folder
    of this run; image_size: side of the views, pixels; cores: threads of whatever has threads; weights: what is evaluated.
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
    weights: str = "scratch"

    @property
    def bf16(self) -> bool:
        return self.device == "cuda"


# ---- A loop of torch alone, as one would write it without the project ----


class Images:
    """The train split's patches of the shard set as a dataset: `make` says what an item is. ids: (n,) int64."""

    def __init__(self, task: Task):
        from pipelines.shard_reader import ShardReader
        from sharding.selection import select

        self.reader = ShardReader(task.shards)
        self.ids = select(self.reader.manifest, split="train")
        self.make: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Any) -> Any:
        return self.make(key)

    def encoded(self, i: int) -> bytes:
        import numpy as np

        (found,) = self.reader.read(np.array([i]))
        return found.tobytes()


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


def rate(step: int, *, steps: int, warmup_steps: int) -> float:
    """The learning rate as a share of its peak: up a line, down half a cosine. step: 0 for the first one."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


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


# ---- Ours ----


def ours(task: Task) -> list[float]:
    """The stage as a user starts it, without Ray."""
    run = pretrained(
        task,
        name="pretrained",
        recipe=task.recipe,
        optimizer="adam",
        learning_rate=PEAK,
        weight_decay=DECAY,
        epochs=task.epochs,
        warmup_epochs=WARMUP * task.epochs,
        seed=task.seed,
        workers=0,
        log_every=1,
        probe_every=0,
    )
    shutil.copyfile(run.folder / WEIGHTS, Path(task.work) / WEIGHTS)
    return [row["loss"] for row in run.metrics()]


# ---- The others ----


def lightly(task: Task) -> list[float]:
    """As examples/pytorch/simclr.py of lightly, with its own order, but the head without biases and norms, and without blur."""
    import io

    import torch
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import ProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image
    from torch.utils.data import DataLoader

    images, backbone = Images(task), seeded_backbone(task.backbone, task.image_size, task.seed)
    width = backbone.num_features
    head = ProjectionHead([(width, width, None, torch.nn.ReLU(), False), (width, PROJECTION, None, None, False)])
    net = torch.nn.Sequential(backbone, head)
    transform = SimCLRTransform(input_size=task.image_size, gaussian_blur=0.0, **lightly_arguments(task.recipe))

    def two_views(place: int) -> list[Any]:
        with Image.open(io.BytesIO(images.encoded(int(images.ids[place])))) as file:
            return transform(file.convert("RGB"))

    images.make = two_views
    loader: Iterable = DataLoader(images, task.batch_size, shuffle=True, drop_last=True, num_workers=processes(task))  # type: ignore[arg-type]
    criterion = NTXentLoss(temperature=TEMPERATURE)
    batches = (views for _ in range(task.epochs) for views in loader)
    return run_loop(task, net, batches, lambda views: criterion(*map(net, views)), patches=len(images))


def lightly_arguments(recipe: str) -> dict[str, Any]:
    """The recipe as SimCLRTransform has it."""
    from pipelines.recipes import get_recipe

    found = get_recipe(recipe)
    assert found.crop and found.jitter and found.crop.ratio == (3 / 4, 4 / 3), recipe
    return {
        "min_scale": found.crop.area[0],
        "hf_prob": found.flip,
        "cj_prob": found.jitter.probability,
        "cj_strength": 1.0,
        "cj_bright": found.jitter.brightness,
        "cj_contrast": found.jitter.contrast,
        "cj_sat": found.jitter.saturation,
        "cj_hue": found.jitter.hue,
        "random_gray_scale": found.grey,
        "normalize": {"mean": list(found.mean), "std": list(found.std)},
    }


def plain(task: Task, *, jointly: bool, our_draws: bool = False) -> list[float]:
    """A DataLoader, all similarities in one matrix, and our order of the patches.

    jointly: both views of a batch go through the network together, so that batch norm sees them as one batch; or else one after
    the other. our_draws: torchvision makes the views that we drew; or else its own, with torch's random numbers, on Pillow.
    """
    import torch
    from torch.utils.data import DataLoader

    images, backbone = Images(task), seeded_backbone(task.backbone, task.image_size, task.seed)
    width = backbone.num_features
    # Made in this order, the head's weights too are those of ours.
    layers = [torch.nn.Linear(width, width, bias=False), torch.nn.ReLU(), torch.nn.Linear(width, PROJECTION, bias=False)]
    net = torch.nn.Sequential(backbone, torch.nn.Sequential(*layers))
    criterion = plain_loss(task.batch_size, TEMPERATURE, task.device)
    two_views = TwoViews(torchvision_transform(task.recipe, task.image_size))
    images.make = functools.partial(_our_views, task, images) if our_draws else lambda key: two_views(images.encoded(key[1]))
    order = our_batches(task, images.ids)
    batches: Iterable = DataLoader(images, batch_sampler=order, num_workers=processes(task))  # type: ignore[arg-type]

    def loss_of(views: list[Any]) -> Any:
        z = net(torch.cat(views)).chunk(2) if jointly else list(map(net, views))
        return criterion(torch.stack(list(z)).float())

    return run_loop(task, net, batches, loss_of, patches=len(images))


def _our_views(task: Task, images: Images, key: tuple[int, int]) -> list[Any]:
    import numpy as np

    from pipelines.recipes import get_recipe
    from pipelines.torchvision_reference import reference_views
    from pipelines.views import draw_views

    epoch, i = key
    recipe, ids = get_recipe(task.recipe), np.array([i])
    drawn = draw_views(images.reader.draw_keys(ids), seed=task.seed, epoch=epoch, recipe=recipe, sizes=images.reader.sizes[ids])
    return list(reference_views(images.reader.read(ids), drawn, recipe=recipe, image_size=task.image_size)[:, 0])


# ---- Evaluation ----


def evaluated(task: Task) -> dict[str, float]:
    """What `train/evaluate.py` finds for `task.weights` on the test split: METRICS."""
    from train.config import EvaluateConfig
    from train.stages.evaluation import evaluate

    found = {}
    for metric, mode in METRICS.items():
        config = EvaluateConfig(
            data=task.judged,
            backbone=task.weights,
            mode=mode,  # type: ignore[arg-type]
            name=mode,
            architecture=task.backbone,
            image_size=task.image_size,
            seed=task.seed,
            threads=task.cores,
            storage=task.work,
        )
        (summary,) = evaluate(config).result["summary"]  # one fraction of the labels: all
        found[metric] = summary["metrics"]["accuracy"]["mean"]
    return found


def _pretrain(title: str, train: Callable[..., list[float]], **given: Any) -> Contender:
    def run(task: Task) -> dict[str, Any]:
        began = time.monotonic()
        losses = train(task, **given)
        return {"losses": losses, "seconds": time.monotonic() - began}

    return Contender(title, run, pinned=False)


# In the order in which they run: what is compared stands side by side
PRETRAINED = {
    "ours": _pretrain("ours", ours),
    "lightly": _pretrain("lightly", lightly),
    "plain": _pretrain("plain torch and torchvision", plain, jointly=False),
    "plain-joint": _pretrain("plain, both views as one batch", plain, jointly=True),
    "replayed": _pretrain("the same on our draws", plain, jointly=True, our_draws=True),
    "random": Contender("random weights", None),
}
CONTENDERS = PRETRAINED | {"evaluate": Contender("train/evaluate.py", evaluated, pinned=False)}
