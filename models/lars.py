"""LARS as in SimCLR's published code, and parameter groups for it and other optimisers."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step in each tensor is scaled to that tensor's own length.

    For a tensor w with gradient g, learning rate lr, momentum m, trust coefficient eta and weight decay d:

        g     <- g + d w
        ratio <- eta |w| / |g|            (1 where either length is 0, or in groups with `adapt: False`)
        v     <- m v + lr ratio g         (v starts at 0)
        w     <- w - v

    The learning rate is inside the momentum buffer, so a change of it reaches full effect only after about 1 / (1 - m)
    steps: implementations with `w <- w - lr v` differ as soon as the learning rate changes. The ratio divides by the
    length of g after decay was added.

    parameters: tensors, or groups as from `parameter_groups`; a group may set any of the other arguments.
    lr: learning rate (>= 0). Raises ValueError when an argument is out of its range.

    Source: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, algorithm 1; in the form of
    lars_optimizer.py (classic momentum, no Nesterov) of github.com/google-research/simclr.
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ):
        for name, value in {"lr": lr, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}.items():
            if not value >= 0:
                raise ValueError(f"{name} {value} must not be below 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} must be at least 0 and below 1")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Take one step. closure: recomputes the loss with gradients; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            # One call for many tensors: no hundreds of small kernels, and no synchronisation with the host.
            gradients = torch._foreach_add([w.grad for w in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                lengths = torch.stack(torch._foreach_norm(weights))
                gradient_lengths = torch.stack(torch._foreach_norm(gradients))
                ratios = group["trust_coefficient"] * lengths / gradient_lengths
                ratios = torch.where((lengths > 0) & (gradient_lengths > 0), ratios, 1.0)
                torch._foreach_mul_(gradients, list((group["lr"] * ratios).unbind()))
            else:
                torch._foreach_mul_(gradients, group["lr"])
            for w in weights:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w, memory_format=torch.preserve_format)
            velocities = [self.state[w]["momentum_buffer"] for w in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, gradients)
            torch._foreach_sub_(weights, velocities)
        return loss


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The model's trainable parameters in two groups: weights; and biases and norms, without decay and adaptation.

    weight_decay: the decay of the weights. Biases and norm parameters are those with at most one dimension.
    Returns groups with `name`, `params`, `weight_decay` and `adapt`, for LARS and, `adapt` being ignored, for any optimiser
    of torch.optim. A group without parameters is left out.

    Raises ValueError when nothing is trainable.

    Source: Chen et al. 2020 (SimCLR), appendix B.9; the exclusions of github.com/google-research/simclr.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: unfreeze some before making an optimiser")
    weights = [p for p in trainable if p.ndim > 1]
    rest = [p for p in trainable if p.ndim <= 1]
    groups = [
        {"name": "weights", "params": weights, "weight_decay": weight_decay, "adapt": True},
        {"name": "biases and norms", "params": rest, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def describe_groups(groups: list[dict], *, adapted: bool) -> list[str]:
    """One line per group for the console: its name, tensors, numbers, decay (optimizer.param_groups do as well).

    adapted: whether the optimizer is LARS, which adapts the rate to each layer of some groups.
    """
    lines = []
    for group in groups:
        adaptation = f", layer adaptation {'on' if group['adapt'] else 'off'}" if adapted else ""
        lines.append(
            f"{group['name']}: {len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} numbers, "
            f"weight decay {group['weight_decay']:g}{adaptation}"
        )
    return lines
