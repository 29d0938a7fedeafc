"""What is learnt: a method says which recipe makes its views, which head sits on the backbone, and what the loss is.

A new pretext method is a class here and an entry in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from models.heads import LinearHead, ProjectionHead
from models.ntxent import contrastive_top1, nt_xent
from pipelines.recipes import Recipe, get_recipe
from train.config import PretrainConfig

# V views, B local patches, D width of the head's output


@dataclass(frozen=True)
class SimCLR:
    """Contrastive learning of two views of each patch (Chen et al. 2020)."""

    projection_dim: int
    temperature: float
    recipe_name: str = "simclr"

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.recipe_name)

    def build_head(self, features: int) -> nn.Module:
        return ProjectionHead(features, self.projection_dim)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's anchors; the mean over ranks is the loss of the global batch."""
        return nt_xent(z_VBD, self.temperature, group)

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """top1: share of anchors whose positive is nearer than every negative."""
        return {"top1": contrastive_top1(z_VBD, group)}


@dataclass(frozen=True)
class Supervised:
    """Classification with labels, by cross-entropy: the baseline, and fine-tuning."""

    classes: int
    recipe_name: str = "supervised"

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.recipe_name)

    def build_head(self, features: int) -> nn.Module:
        return LinearHead(features, self.classes)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's patches."""
        return nn.functional.cross_entropy(z_VBD.flatten(0, 1).float(), label_B.repeat(len(z_VBD)))

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """train_accuracy: share of this batch that is classified right."""
        return {"train_accuracy": (z_VBD.argmax(-1) == label_B).float().mean()}


Method = SimCLR | Supervised

# What --method may name, and how the config makes it.
METHODS: dict[str, Callable[[PretrainConfig], Method]] = {
    "simclr": lambda config: SimCLR(config.projection_dim, config.temperature, config.recipe),
}
