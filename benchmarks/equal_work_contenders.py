"""Who pretrains in the benchmark of equal work: the project's own stage, lightly, and a loop of torch and torchvision alone.

Each runs in a process of its own, on the same patches of the same shard set, from the same initial weights of the backbone, for
as many steps of the same optimiser, and leaves the loss of every step and the backbone. A further process judges that.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

WEIGHTS = "backbone.safetensors"
FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
MODES = {"linear": "linear", "knn": "kNN"}
_PROJECTION, _TEMPERATURE = 128, 0.5
_PEAK, _DECAY, _WARMUP = 3e-4, 1e-6, 0.1  # of Adam: the rate at its peak, the decay of weights; the share of the epochs before it


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


class Contender(NamedTuple):
    """train: leaves the backbone at `weights_of`, and returns the loss of every step; None: random weights."""

    title: str
    train: Callable[[Task], list[float]] | None


def weights_of(task: Task, name: str) -> str:
    """What `train/evaluate.py --backbone` is given."""
    return "scratch" if CONTENDERS[name].train is None else str(Path(task.work) / WEIGHTS)


# ---- Ours ----


def ours(task: Task) -> list[float]:
    """The stage as a user starts it, without Ray."""
    from train.config import PretrainConfig
    from train.pretraining import pretrain

    config = PretrainConfig(
        data=task.shards,
        name="pretrained",
        recipe=task.recipe,  # type: ignore[arg-type]
        backbone=task.backbone,
        image_size=task.image_size,
        batch_size=task.batch_size,
        projection_dim=_PROJECTION,
        temperature=_TEMPERATURE,
        optimizer="adam",
        learning_rate=_PEAK,
        weight_decay=_DECAY,
        epochs=task.epochs,
        warmup_epochs=_WARMUP * task.epochs,
        precision="bf16" if task.bf16 else "fp32",
        seed=task.seed,
        workers=0,
        threads=task.cores,
        log_every=1,
        probe_every=0,
        checkpoint_every=10**9,
        storage=task.work,
    )
    run = pretrain(config)
    shutil.copyfile(run.folder / WEIGHTS, Path(task.work) / WEIGHTS)
    return [row["loss"] for row in run.metrics()]


# ---- The others ----


def lightly(task: Task) -> list[float]:
    """As examples/pytorch/simclr.py of lightly, with its own order, but the head without biases and norms, and without blur."""
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import ProjectionHead
    from lightly.transforms import SimCLRTransform
    from torch.utils.data import DataLoader

    images, backbone = Images(task), _backbone(task)
    width = backbone.num_features
    head = ProjectionHead([(width, width, None, torch.nn.ReLU(), False), (width, _PROJECTION, None, None, False)])
    net = torch.nn.Sequential(backbone, head)
    transform = SimCLRTransform(input_size=task.image_size, gaussian_blur=0.0, **lightly_arguments(task.recipe))
    dataset = LightlyDataset.from_torch_dataset(images, transform=transform)
    workers = _processes(task)
    loader: Iterable = DataLoader(
        dataset, task.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    criterion = NTXentLoss(temperature=_TEMPERATURE)
    batches = (views for _ in range(task.epochs) for views, _, _ in loader)
    return _train(task, net, batches, lambda views: criterion(*map(net, views)), patches=len(images))


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


def plain(task: Task) -> list[float]:
    """torchvision on Pillow, DataLoader, one view after the other through the network, all similarities in one matrix; in our
    order of the patches, with torch's random numbers for the views."""
    net, images = _plain_net(task), Images(task)
    return _train(task, net, _plain_batches(task, images), lambda views: full_nt_xent(*map(net, views)), patches=len(images))


def plain_joint(task: Task) -> list[float]:
    """As plain, but both views of a batch go through the network together, so that batch norm sees them as one batch."""
    net, images = _plain_net(task), Images(task)
    return _train(task, net, _plain_batches(task, images), functools.partial(_joint_loss, net), patches=len(images))


def _joint_loss(net: Any, views: list[Any]) -> Any:
    import torch

    return full_nt_xent(*net(torch.cat(views)).chunk(2))


def _plain_batches(task: Task, images: "Images") -> Iterable:
    from torchvision import transforms

    from pipelines.recipes import get_recipe

    recipe = get_recipe(task.recipe)
    assert recipe.crop and recipe.jitter, task.recipe
    jitter = recipe.jitter
    colour = transforms.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(task.image_size, scale=recipe.crop.area, ratio=recipe.crop.ratio),
            transforms.RandomHorizontalFlip(recipe.flip),
            transforms.RandomApply([colour], jitter.probability),
            transforms.RandomGrayscale(recipe.grey),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
    )

    def two_views(key: tuple[int, int]) -> list[Any]:
        image = images.image(key[1])
        return [transform(image), transform(image)]

    return _in_our_order(task, images, two_views)


def replayed(task: Task) -> list[float]:
    """The plain loop, but torchvision makes the views that we drew, and both views of a batch are normalised together."""
    import numpy as np

    from pipelines.recipes import get_recipe
    from pipelines.reference import reference_views
    from pipelines.views import draw_views

    recipe, images = get_recipe(task.recipe), Images(task)
    net = _plain_net(task)

    def two_views(key: tuple[int, int]) -> list[Any]:
        epoch, ids = key[0], np.array(key[1:])
        sizes = images.reader.sizes[ids]
        parameters = draw_views(images.reader.draw_keys(ids), seed=task.seed, epoch=epoch, recipe=recipe, sizes=sizes)
        return list(reference_views(images.reader.read(ids), parameters, recipe=recipe, image_size=task.image_size)[:, 0])

    batches = _in_our_order(task, images, two_views)
    return _train(task, net, batches, functools.partial(_joint_loss, net), patches=len(images))


class Images:
    """The train split's patches of the shard set as a dataset of Pillow images without labels. ids: (n,) int64."""

    def __init__(self, task: Task):
        from pipelines.shards import ShardReader
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


class _Views:
    """A dataset that makes the two views of each key."""

    def __init__(self, make: Callable[[tuple[int, int]], list[Any]]):
        self.make = make

    def __getitem__(self, key: tuple[int, int]) -> list[Any]:
        return self.make(key)


def _in_our_order(task: Task, images: Images, make: Callable[[tuple[int, int]], list[Any]]) -> Iterable:
    from torch.utils.data import DataLoader

    return DataLoader(_Views(make), batch_sampler=our_batches(task, images.ids), num_workers=_processes(task))  # type: ignore


def our_batches(task: Task, ids: Any) -> list[list[tuple[int, int]]]:
    """The (epoch, patch id) of each step of all epochs, as our loader has them."""
    from pipelines.order import epoch_order, rank_slice

    found = []
    for epoch in range(task.epochs):
        order = epoch_order(ids, seed=task.seed, epoch=epoch)
        for step in range(len(ids) // task.batch_size):
            batch = rank_slice(order, step, task.batch_size, rank=0, world_size=1)
            found.append([(epoch, int(i)) for i in batch])
    return found


def full_nt_xent(z0_BD: Any, z1_BD: Any, temperature: float = _TEMPERATURE) -> Any:
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


def _backbone(task: Task) -> Any:
    """What all begin with: the seed decides the weights."""
    import torch

    from models.backbones import build_backbone

    torch.manual_seed(task.seed)
    return build_backbone(task.backbone, task.image_size)


def _plain_net(task: Task) -> Any:
    from torch import nn

    backbone = _backbone(task)
    width = backbone.num_features
    # Made in this order, the head's weights too are those of ours.
    return nn.Sequential(
        backbone,
        nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, _PROJECTION, bias=False)),
    )


def _processes(task: Task) -> int:
    """Of a DataLoader: on a single core it works in the process that trains."""
    return task.cores if task.cores > 1 else 0


def _train(task: Task, net: Any, batches: Iterable, loss_of: Callable[[list[Any]], Any], *, patches: int) -> list[float]:
    """The loss of every step. net: the backbone and the head, in this order; batches: of lists of two views."""
    import torch
    from safetensors.torch import save_file

    net.to(task.device).train()
    steps_per_epoch = patches // task.batch_size
    warmup_steps = round(_WARMUP * task.epochs * steps_per_epoch)
    weights = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": _DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=_PEAK)
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


# In the order in which they run: what is compared stands side by side
CONTENDERS = {
    "ours": Contender("ours", ours),
    "lightly": Contender("lightly", lightly),
    "plain": Contender("plain torch and torchvision", plain),
    "plain-joint": Contender("plain, both views as one batch", plain_joint),
    "replayed": Contender("the same on our draws", replayed),
    "random": Contender("random weights", None),
}


# ---- Judging ----


def judge(task: Task, weights: str) -> dict[str, float]:
    """What `train/evaluate.py` finds for these weights on the test split: by MODES and FIGURES, such as "kNN accuracy"."""
    from train.config import EvaluateConfig
    from train.evaluation import evaluate

    found = {}
    for mode, title in MODES.items():
        config = EvaluateConfig(
            data=task.judged,
            backbone=weights,
            mode=mode,  # type: ignore[arg-type]
            name=mode,
            architecture=task.backbone,
            image_size=task.image_size,
            seed=task.seed,
            threads=task.cores,
            storage=task.work,
        )
        (summary,) = evaluate(config).result["summary"]  # one fraction of the labels: all
        for figure, words in FIGURES.items():
            found[f"{title} {words}"] = summary["metrics"][figure]["mean"]
    return found


def main(what: str, name: str, given: str, result: str) -> None:
    """what: train or judge the contender of that name."""
    task = Task(**json.loads(given))
    if what == "judge":
        found: dict[str, Any] = judge(task, weights_of(task, name))
    else:
        train = CONTENDERS[name].train
        assert what == "train" and train is not None, (what, name)
        began = time.monotonic()
        losses = train(task)
        found = {"losses": losses, "seconds": time.monotonic() - began}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _, _, asked, _ = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = str(json.loads(asked)["cores"])  # whatever the shell says; no library is imported yet
    if json.loads(asked)["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stage takes a GPU where it sees one
    main(*sys.argv[1:])
