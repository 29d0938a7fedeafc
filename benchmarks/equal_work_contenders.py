"""Who pretrains in the benchmark of equal work: the project's own stage, lightly, and a loop of torch and torchvision alone.

Each runs in a process of its own, on the same patches of the same shard set, from the same initial weights of the backbone, for
as many steps of the same optimiser, and leaves the loss of every step and the backbone. A further process judges that.
"""

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

from equal_work_loop import (  # noqa: E402
    DECAY,
    PEAK,
    PROJECTION,
    TEMPERATURE,
    WARMUP,
    WEIGHTS,
    Images,
    Task,
    full_nt_xent,
    in_our_order,
    initial_backbone,
    plain_net,
    processes,
    run_loop,
)

FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
MODES = {"linear": "linear", "knn": "kNN"}


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
    from train.stages.pretraining import pretrain

    config = PretrainConfig(
        data=task.shards,
        name="pretrained",
        recipe=task.recipe,  # type: ignore[arg-type]
        backbone=task.backbone,
        image_size=task.image_size,
        batch_size=task.batch_size,
        projection_dim=PROJECTION,
        temperature=TEMPERATURE,
        optimizer="adam",
        learning_rate=PEAK,
        weight_decay=DECAY,
        epochs=task.epochs,
        warmup_epochs=WARMUP * task.epochs,
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

    images, backbone = Images(task), initial_backbone(task)
    width = backbone.num_features
    head = ProjectionHead([(width, width, None, torch.nn.ReLU(), False), (width, PROJECTION, None, None, False)])
    net = torch.nn.Sequential(backbone, head)
    transform = SimCLRTransform(input_size=task.image_size, gaussian_blur=0.0, **lightly_arguments(task.recipe))
    dataset = LightlyDataset.from_torch_dataset(images, transform=transform)
    workers = processes(task)
    loader: Iterable = DataLoader(
        dataset, task.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    criterion = NTXentLoss(temperature=TEMPERATURE)
    batches = (views for _ in range(task.epochs) for views, _, _ in loader)
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


def plain(task: Task) -> list[float]:
    """torchvision on Pillow, DataLoader, one view after the other through the network, all similarities in one matrix; in our
    order of the patches, with torch's random numbers for the views."""
    net, images = plain_net(task), Images(task)
    return run_loop(task, net, _plain_batches(task, images), lambda views: full_nt_xent(*map(net, views)), patches=len(images))


def plain_joint(task: Task) -> list[float]:
    """As plain, but both views of a batch go through the network together, so that batch norm sees them as one batch."""
    net, images = plain_net(task), Images(task)
    return run_loop(task, net, _plain_batches(task, images), functools.partial(_joint_loss, net), patches=len(images))


def _joint_loss(net: Any, views: list[Any]) -> Any:
    import torch

    return full_nt_xent(*net(torch.cat(views)).chunk(2))


def _plain_batches(task: Task, images: Images) -> Iterable:
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

    return in_our_order(task, images, two_views)


def replayed(task: Task) -> list[float]:
    """The plain loop, but torchvision makes the views that we drew, and both views of a batch are normalised together."""
    import numpy as np

    from pipelines.recipes import get_recipe
    from pipelines.torchvision_reference import reference_views
    from pipelines.views import draw_views

    recipe, images = get_recipe(task.recipe), Images(task)
    net = plain_net(task)

    def two_views(key: tuple[int, int]) -> list[Any]:
        epoch, ids = key[0], np.array(key[1:])
        sizes = images.reader.sizes[ids]
        parameters = draw_views(images.reader.draw_keys(ids), seed=task.seed, epoch=epoch, recipe=recipe, sizes=sizes)
        return list(reference_views(images.reader.read(ids), parameters, recipe=recipe, image_size=task.image_size)[:, 0])

    batches = in_our_order(task, images, two_views)
    return run_loop(task, net, batches, functools.partial(_joint_loss, net), patches=len(images))


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
    from train.stages.evaluation import evaluate

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
