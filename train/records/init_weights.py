"""A stage's initial weights: random, ImageNet's, an earlier run's, or a file's."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.weights import CARD_NAME, imagenet_weights, tensors_hash
from train.records.json_files import read_json
from train.records.runs import Run, find_run


@dataclass(frozen=True)
class InitialWeights:
    """source: the argument of `models.weights.apply_init`; key: their part of the stage's key; chain: the stages that they come
    from, in words; card: their model card, empty if there is none; run: the earlier run, if they are one's."""

    source: str
    key: str
    chain: list[str]
    card: dict[str, Any]
    run: Run | None = None

    @property
    def address(self) -> str:
        """The source as every node can reach it: a run's URL if it has one. See `train.records.remote_run.fetch_source`."""
        return self.run.url if self.run and self.run.url else self.source


@dataclass(frozen=True)
class StartingPoint:
    """The weights that a stage starts from, their architecture, and the side of its views in pixels."""

    parent: InitialWeights
    architecture: str
    image_size: int


def resolve_backbone(config: Any) -> StartingPoint:
    """What an EvaluateConfig or an EmbedConfig names.

    Raises ValueError as `resolve_init` does, and where neither --architecture nor a model card says what the weights are of.
    """
    asked = config.architecture if config.backbone == "imagenet" else None
    parent = resolve_init(config.backbone, config.storage, backbone=asked)
    architecture = config.architecture or parent.card.get("backbone")
    if architecture is None:
        raise ValueError(f"{config.backbone} has no model card that says what it is: give --architecture, a timm model name")
    return StartingPoint(parent, architecture, view_size(config, parent.card))


def view_size(config: Any, card: dict[str, Any]) -> int:
    """--image-size, or else the size that the backbone with this model card was trained at."""
    return config.image_size or card.get("image_size") or 224


def resolve_init(init: str, storage: str, *, backbone: str | None = None) -> InitialWeights:
    """The weights that --init or --backbone names. backbone: the architecture that they must be of, if it is known.

    Raises ValueError if they do not exist, if the run is not finished, or if they are of another architecture.
    """
    if init == "scratch":
        return InitialWeights("scratch", "scratch", [], {})
    if init == "imagenet":
        if backbone and ":" in backbone:  # a model on disk or on the hub, whose weights may change and may be of anything
            return InitialWeights("imagenet", tensors_hash(imagenet_weights(backbone)), [backbone], {})
        return InitialWeights("imagenet", "imagenet", ["ImageNet"], {})
    run = find_run(init, storage)
    if run is not None:
        _ = run.result  # raises if the run is not finished
        card = read_json(run.folder / CARD_NAME, "this run has no backbone: give a run of pretraining or fine-tuning")
        parent = InitialWeights(str(run.folder), run.record["key"], card.get("chain", []), card, run)
    elif Path(init).is_file():
        with open(init, "rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
        beside = Path(init).with_name(CARD_NAME)
        card = read_json(beside, "") if beside.exists() else {}
        parent = InitialWeights(str(Path(init).absolute()), key, card.get("chain", [Path(init).name]), card)
    else:
        raise ValueError(f"{init}: no run of that name in {storage}, and no such file; choose scratch, imagenet, a run or a file")
    theirs = parent.card.get("backbone")
    if backbone and theirs and theirs != backbone:
        raise ValueError(f"{init} is a {theirs}, not a {backbone}: give --backbone {theirs}, or other weights")
    return parent
