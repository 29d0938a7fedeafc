"""Pretext methods: what a backbone learns. A method is one class here, registered in METHODS.

The class defines everything that is specific to the method: its views, head and loss, the metrics that it logs, their plots in
reports, and the metrics by which a study may compare its runs. `--method`, the training loop, reports, studies and Prometheus
read them from here.

torch is imported inside functions only, because `pretrain.py --help` lists the methods and should not wait seconds for torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipelines.recipes import RECIPES, Recipe, get_recipe

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn

# V views, B local patches, D width of the head's output

_MORE_NEGATIVES = "NT-Xent's loss and top-1 accuracy depend on the batch size (more negatives are harder: docs/pretraining.md)"


class Method:
    """The base of every method. Instances are plain data, which is sent to the workers."""

    summary: ClassVar[str]  # the pretext task, for `--help`
    needs: ClassVar[str]  # which views, for the message that refuses a recipe
    accuracy: ClassVar[str | None] = None  # the logged metric, 0 to 1, that the progress bar and the report's table show
    curves: ClassVar[dict[str, str]] = {}  # titles of "loss" and of logged metrics, to be drawn beside those of every run
    descriptions: ClassVar[dict[str, str]] = {}  # of logged metrics, for Prometheus
    # By which metrics runs may be compared, and which settings must then be equal (beside method and recipe), and why.
    comparable_by: ClassVar[dict[str, dict[str, str]]] = {"loss": {}}
    comparison_note: ClassVar[str | None] = None  # for the console and the result of each run

    recipe_name: str

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The method as a PretrainConfig asks for it. config.recipe: None is the method's own."""
        raise NotImplementedError

    @property
    def recipe(self) -> Recipe:
        return get_recipe(self.recipe_name)

    def takes(self, recipe: Recipe) -> bool:
        """Whether the loss is made for this recipe's views."""
        raise NotImplementedError

    def build_head(self, features: int) -> nn.Module:
        """The module that takes the backbone's (n, features) to the (n, D) of the loss."""
        raise NotImplementedError

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """A scalar whose mean over ranks is the loss of the global batch. z_VBD: the head's output; label_B: the set's labels,
        -1 for unlabelled patches; group: the ranks of the run, None for one process."""
        raise NotImplementedError

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """Scalars to log beside the loss, of this rank; metrics.jsonl has their mean over ranks. Arguments as for `loss`."""
        return {}

    def chance_loss(self, batch_size: int) -> float:
        """The loss of a model that has learned nothing. batch_size: of the global batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class SimCLR(Method):
    """Contrastive learning of two views of each patch (Chen et al. 2020)."""

    projection_dim: int
    temperature: float
    recipe_name: str = "simclr"
    projection_layers: int = 2

    summary = "NT-Xent on two views"
    needs = "two random views of each patch"
    accuracy = "top1"
    curves: ClassVar = {
        "loss": "loss (NT-Xent)",
        "top1": "contrastive top-1 accuracy",
        "embedding_std": "spread of the embeddings (1: spread out, 0: collapsed)",
    }
    descriptions: ClassVar = {
        "top1": "Share of anchors whose positive is nearer than every negative",
        "alignment": "Mean squared distance of a patch's two views; lower is better",
        "uniformity": "Logarithm of the mean Gaussian potential of two patches' embeddings; lower is better",
        "embedding_std": "1 where embeddings are spread out, 0 where they have collapsed",
    }
    # Top-1 accuracy is among the negatives of a batch too, so that a small batch is easier; it is the same for any temperature,
    # which scales all similarities.
    comparable_by: ClassVar = {
        "loss": {"batch_size": _MORE_NEGATIVES, "temperature": "the loss of NT-Xent depends on the temperature, which scales it"},
        "top1": {"batch_size": _MORE_NEGATIVES},
    }
    comparison_note = "runs with different batch sizes are compared by top1 and the probe, not by the loss"

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(
            config.projection_dim, config.temperature, config.recipe or "simclr", projection_layers=config.projection_layers
        )

    def takes(self, recipe: Recipe) -> bool:
        return recipe.views == 2 and recipe.is_random and recipe.view_labels is None

    def build_head(self, features: int) -> nn.Module:
        from models.heads import ProjectionHead

        return ProjectionHead(features, self.projection_dim, self.projection_layers)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's anchors."""
        from models.ntxent import nt_xent

        return nt_xent(z_VBD, self.temperature, group)

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """top1 is among the negatives of all ranks; alignment, uniformity and embedding_std are of this rank's embeddings."""
        from models.ntxent import alignment_uniformity, contrastive_top1, embedding_std

        alignment, uniformity = alignment_uniformity(z_VBD)
        return {
            "top1": contrastive_top1(z_VBD, group),
            "alignment": alignment,
            "uniformity": uniformity,
            "embedding_std": embedding_std(z_VBD),
        }

    def chance_loss(self, batch_size: int) -> float:
        """All 2N - 1 other views of the global batch are equally likely the positive."""
        return math.log(2 * batch_size - 1)


@dataclass(frozen=True)
class RotNet(Method):
    """Prediction of the quarter turn by which each view of a patch was rotated (Gidaris et al. 2018).

    Registered under the names of two recipes: with `rotnet-jitter` each view has its own colour jitter.
    """

    recipe_name: str = "rotnet"

    summary = "predict the quarter turn of each of four views; with -jitter, each view has its own colour jitter"
    needs = "four views of each patch, one for each quarter turn"
    accuracy = "rotation_accuracy"
    curves: ClassVar = {
        "loss": "loss (cross-entropy of quarter turns)",
        "rotation_accuracy": "accuracy of predicted quarter turns",
    }
    descriptions: ClassVar = {"rotation_accuracy": "Share of views whose turn is predicted correctly; 0.25 by chance"}

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(config.recipe or config.method)

    def takes(self, recipe: Recipe) -> bool:
        return recipe.view_labels == (0, 1, 2, 3)

    def build_head(self, features: int) -> nn.Module:
        from models.heads import LinearHead

        return LinearHead(features, 4)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's views (the paper's equations 2 and 3)."""
        return _cross_entropy(z_VBD, self._turns(z_VBD))

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        return {"rotation_accuracy": (z_VBD.argmax(-1) == self._turns(z_VBD)).float().mean()}

    def chance_loss(self, batch_size: int) -> float:
        """All four turns are equally likely."""
        return math.log(4)

    def _turns(self, z_VBD: torch.Tensor) -> torch.Tensor:
        """(V, B) number of quarter turns of each view."""
        labels = self.recipe.view_labels
        assert labels is not None and len(labels) == len(z_VBD), (self.recipe_name, z_VBD.shape)
        return _on_device(z_VBD, labels)[:, None].expand(-1, z_VBD.shape[1])


@dataclass(frozen=True)
class Supervised(Method):
    """Classification with labels, by cross-entropy: the baseline, and fine-tuning.

    labels: the set's label of each output, if the model has only some of its classes; None: output k is label k.
    """

    classes: int
    recipe_name: str = "supervised"
    labels: tuple[int, ...] | None = None

    accuracy = "train_accuracy"
    curves: ClassVar = {"loss": "loss (cross-entropy)", "train_accuracy": "accuracy on the training batch"}
    descriptions: ClassVar = {"train_accuracy": "Share of the newest batch that is classified correctly"}

    def build_head(self, features: int) -> nn.Module:
        from models.heads import LinearHead

        return LinearHead(features, self.classes)

    def loss(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Mean over this rank's patches."""
        return _cross_entropy(z_VBD, self._outputs(label_B).expand(len(z_VBD), -1))

    def metrics(self, z_VBD: torch.Tensor, label_B: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        return {"train_accuracy": (z_VBD.argmax(-1) == self._outputs(label_B)).float().mean()}

    def chance_loss(self, batch_size: int) -> float:
        """All classes are equally likely, which holds for classes of one size."""
        return math.log(self.classes)

    def _outputs(self, label_B: torch.Tensor) -> torch.Tensor:
        """(B,) index of the output that each patch should have. Its label is among the known ones."""
        if self.labels is None:
            return label_B
        return (label_B[:, None] == _on_device(label_B, self.labels)).long().argmax(1)


# What --method accepts. `rotnet-jitter` is RotNet with a recipe of that name.
METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "rotnet": RotNet, "rotnet-jitter": RotNet}


def method_summaries() -> str:
    """All registered methods and what each learns, for `--help`."""
    names: dict[type[Method], list[str]] = {}
    for name, method in METHODS.items():
        names.setdefault(method, []).append(name)
    return "; ".join(f"{' or '.join(same)}: {method.summary}" for method, same in names.items())


def build_method(config: Any) -> Method:
    """The method that a PretrainConfig names. Raises ValueError for a name that is not registered and for an unfit recipe."""
    if config.method not in METHODS:
        raise ValueError(f"there is no --method {config.method}: choose one of {', '.join(METHODS)}")
    method = METHODS[config.method].from_config(config)
    if not method.takes(method.recipe):
        fitting = [name for name, recipe in RECIPES.items() if method.takes(recipe)]
        raise ValueError(
            f"--recipe {config.recipe} does not suit --method {config.method}, which needs {method.needs}:"
            f" leave it out, or give {' or '.join(fitting)}"
        )
    return method


def _on_device(like: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """(n,) int64 on the tensor's device. Filled there: a copy from the host would make the step wait."""
    import torch

    return torch.stack([like.new_full((), value, dtype=torch.int64) for value in values])


def _cross_entropy(z_VBD: torch.Tensor, target_VB: torch.Tensor) -> torch.Tensor:
    """The mean over views and patches, in float32 whatever autocast says (float64 for float64)."""
    import torch

    z_VBD = z_VBD.to(torch.promote_types(z_VBD.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(z_VBD.flatten(0, 1), target_VB.flatten())
