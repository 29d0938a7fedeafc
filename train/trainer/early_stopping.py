"""Early stopping: keep the weights of the lowest validation loss, and stop when it no longer falls."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.recipes import get_recipe
from train.records.data import Input
from train.scoring.features import compute_features


@dataclass(frozen=True)
class Validation:
    """The validation part, as plain data. input: its patches; outputs: (n,) the right output of each, in the order of their ids;
    patience: epochs without a lower loss after which training ends, None: never."""

    input: Input
    outputs: np.ndarray = field(repr=False)
    patience: int | None


class EarlyStopping:
    """Keeps the best weights of a model (a backbone and a head) and decides when to stop.

    Its state, with the best weights, is part of a checkpoint: a resumed run ends with the same ones.
    """

    def __init__(self, validation: Validation):
        self._validation = validation
        self.best_loss, self.best_epoch = math.inf, -1
        self.stopped = False
        self._best: dict[str, torch.Tensor] | None = None

    def evaluate(self, model: nn.Module, epoch: int, *, image_size: int, device: str, threads: int | None) -> dict[str, float]:
        """Evaluate the model after this epoch. Returns validation_loss (nats) and validation_accuracy, for metrics.jsonl."""
        validation = self._validation
        features = features_while_training(
            model.backbone,  # type: ignore[arg-type]
            validation.input,
            image_size=image_size,
            device=device,
            threads=threads,
        )
        with torch.no_grad():
            weight = next(model.head.parameters())  # type: ignore[union-attr]
            scores = model.head(torch.from_numpy(features).to(weight)).double().cpu()  # type: ignore[operator]
        target = torch.from_numpy(validation.outputs)
        loss = float(nn.functional.cross_entropy(scores, target))
        if loss < self.best_loss:  # false if the loss is NaN
            self.best_loss, self.best_epoch = loss, epoch
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self.stopped = validation.patience is not None and epoch - self.best_epoch >= validation.patience
        return {"validation_loss": loss, "validation_accuracy": float((scores.argmax(1) == target).double().mean())}

    def load_best(self, model: nn.Module) -> None:
        """Give the model the best weights; its own stay where no loss was a number."""
        if self._best is not None:
            model.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_epoch": self.best_epoch, "stopped": self.stopped, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_epoch, self.stopped = state["best_loss"], state["best_epoch"], state["stopped"]
        self._best = state["best"]


def features_while_training(backbone: nn.Module, data: Input, *, image_size: int, device: str, threads: int | None) -> np.ndarray:
    """(n, F) float32 features of these patches by a backbone that is being trained, which is then in the mode that it was in."""
    training = backbone.training
    try:
        with data.opened() as (reader, ids):
            return compute_features(
                backbone,
                reader,
                ids,
                recipe=get_recipe("eval"),
                image_size=image_size,
                device=device,
                threads=threads,
                title=None,
            )
    finally:
        backbone.train(training)
