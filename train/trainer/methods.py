"""What is learnt: a method says which recipe makes its views, which head sits on the backbone, and what the loss is.

A new pretext method is a class here and an entry in METHODS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn

from models.heads import LinearHead, ProjectionHead
from models.ntxent import alignment_uniformity, contrastive_top1, embedding_std, nt_xent
from pipelines.recipes import RECIPES, Recipe, get_recipe
from train.config import PretrainConfig

# V views, B local patches, D width of the head's output


@dataclass(frozen=True)
class SimCLR:
    """Contrastive learning of two views of each patch (Chen et al. 2020)."""

    projection_dim: int
    temperature: float
    recipe_name: str = "simclr"
    projection_layers: int = 2

    needs: ClassVar[str] = "two random views of each patch"

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.recipe_name)

    def takes(self, recipe: Recipe) -> bool:
        """Whether the recipe's views are what the loss is for."""
        return recipe.views == 2 and recipe.is_random and recipe.view_labels is None

    def build_head(self, features: int) -> nn.Module:
        return ProjectionHead(features, self.projection_dim, self.projection_layers)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's anchors; the mean over ranks is the loss of the global batch."""
        return nt_xent(z_VBD, self.temperature, group)

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """top1: share of anchors whose positive is nearer than every negative, those of all ranks; of this rank's
        embeddings alone: alignment and uniformity (lower is better), embedding_std (1 when spread out, 0 when collapsed)."""
        alignment, uniformity = alignment_uniformity(z_VBD)
        return {
            "top1": contrastive_top1(z_VBD, group),
            "alignment": alignment,
            "uniformity": uniformity,
            "embedding_std": embedding_std(z_VBD),
        }

    def chance_loss(self, batch_size: int) -> float:
        """The loss when nothing is learnt: all 2N - 1 other views of the global batch are equally likely the positive."""
        return math.log(2 * batch_size - 1)


@dataclass(frozen=True)
class RotNet:
    """Telling by which quarter turn each view of a patch was turned (Gidaris et al. 2018)."""

    recipe_name: str = "rotnet"

    needs: ClassVar[str] = "four views of each patch, one for each quarter turn"

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.recipe_name)

    def takes(self, recipe: Recipe) -> bool:
        """Whether the recipe's views are what the loss is for."""
        return recipe.view_labels == (0, 1, 2, 3)

    def build_head(self, features: int) -> nn.Module:
        return LinearHead(features, 4)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's views (the paper's equations 2 and 3)."""
        return _cross_entropy(z_VBD, self._turns(z_VBD))

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """rotation_accuracy: share of this rank's views whose turn is told right; 0.25 by chance."""
        return {"rotation_accuracy": (z_VBD.argmax(-1) == self._turns(z_VBD)).float().mean()}

    def chance_loss(self, batch_size: int) -> float:
        """The loss when nothing is learnt: all four turns are equally likely."""
        return math.log(4)

    def _turns(self, z_VBD: torch.Tensor) -> torch.Tensor:
        """(V, B) how often each view was turned."""
        labels = self.recipe.view_labels
        assert labels is not None and len(labels) == len(z_VBD), (self.recipe_name, z_VBD.shape)
        # Filled on the device: a copy from the host would make the step wait.
        return torch.stack([z_VBD.new_full(z_VBD.shape[1:2], label, dtype=torch.int64) for label in labels])


@dataclass(frozen=True)
class Supervised:
    """Classification with labels, by cross-entropy: the baseline, and fine-tuning.

    labels: the set's label of each output, where not all of its classes are learnt; None: output k is label k.
    """

    classes: int
    recipe_name: str = "supervised"
    labels: tuple[int, ...] | None = None

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.recipe_name)

    def build_head(self, features: int) -> nn.Module:
        return LinearHead(features, self.classes)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's patches."""
        return _cross_entropy(z_VBD, self._outputs(label_B).expand(len(z_VBD), -1))

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """train_accuracy: share of this batch that is classified right."""
        return {"train_accuracy": (z_VBD.argmax(-1) == self._outputs(label_B)).float().mean()}

    def _outputs(self, label_B: torch.Tensor) -> torch.Tensor:
        """(B,) which output each patch should have. Its label is among the known ones."""
        if self.labels is None:
            return label_B
        # Filled on the device: a copy from the host would make the step wait.
        label_K = torch.stack([label_B.new_full((), label) for label in self.labels])
        return (label_B[:, None] == label_K).long().argmax(1)

    def chance_loss(self, batch_size: int) -> float:
        """The loss when nothing is learnt, of classes of one size."""
        return math.log(self.classes)


Pretext = SimCLR | RotNet
Method = Pretext | Supervised

# What --method may name, and how the config makes it; --recipe takes the place of the method's own.
METHODS: dict[str, Callable[[PretrainConfig], Pretext]] = {
    "simclr": lambda config: SimCLR(
        config.projection_dim, config.temperature, config.recipe or "simclr", projection_layers=config.projection_layers
    ),
    "rotnet": lambda config: RotNet(config.recipe or "rotnet"),
    "rotnet-jitter": lambda config: RotNet(config.recipe or "rotnet-jitter"),
}


def build_method(config: PretrainConfig) -> Pretext:
    """The method that a config names. Raises ValueError when its recipe's views are not what the method learns from."""
    method = METHODS[config.method](config)
    if not method.takes(method.recipe):
        fitting = [name for name, recipe in RECIPES.items() if method.takes(recipe)]
        raise ValueError(
            f"--recipe {config.recipe} does not suit --method {config.method}, which needs {method.needs}:"
            f" leave it out, or give {' or '.join(fitting)}"
        )
    return method


def _cross_entropy(z_VBD: torch.Tensor, target_VB: torch.Tensor) -> torch.Tensor:
    """The mean over views and patches, in float32 whatever autocast says (float64 for float64)."""
    z_VBD = z_VBD.to(torch.promote_types(z_VBD.dtype, torch.float32))
    return nn.functional.cross_entropy(z_VBD.flatten(0, 1), target_VB.flatten())
