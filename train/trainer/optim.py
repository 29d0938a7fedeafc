"""Optimisers and learning rates. The learning rate is a function of the global step alone."""

import math

import torch
from torch import nn

from models.lars import LARS, parameter_groups

_SCALED = ("lars", "sgd")  # their steps are as long as their gradients, so the rate goes with the batch


def peak_learning_rate(given: float | None, *, optimizer: str, batch_size: int, rule: str) -> float:
    """The given learning rate, or the optimiser's default.

    batch_size: of the global batch. rule: how the default of LARS and SGD grows with it, "linear" (0.3 x batch / 256) or
    "sqrt" (0.075 x sqrt(batch); the two meet at a batch of 4096). Adam's and AdamW's default is 3e-4 for every batch.

    Raises ValueError for a rate that is not above 0, and for a rule that would change nothing.

    Source: Chen et al. 2020 (SimCLR), section 2.2 and appendix B.1.
    """
    if rule != "linear" and (given is not None or optimizer not in _SCALED):
        raise ValueError(
            f"--lr-rule {rule} is for the default rate of {' and '.join(_SCALED)}: leave it out"
            f" with {'--learning-rate' if given is not None else f'--optimizer {optimizer}'}"
        )
    if given is not None:
        if not 0 < given < math.inf:
            raise ValueError(f"--learning-rate {given:g} must be above 0 and finite; leave it out for the optimiser's default")
        return given
    if optimizer not in _SCALED:
        return 3e-4
    return 0.3 * batch_size / 256 if rule == "linear" else 0.075 * math.sqrt(batch_size)


def learning_rate(step: int, *, peak: float, steps: int, warmup_steps: int, schedule: str = "cosine") -> float:
    """Linear warm-up to the peak; then "cosine", half a cosine down to 0 (Loshchilov and Hutter 2017; no restarts), or
    "constant", the peak to the end.

    step: 0 for the first one; steps: of the whole run.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def build_optimizer(name: str, model: nn.Module, *, weight_decay: float, fused: bool) -> torch.optim.Optimizer:
    """An optimiser over the model's parameters; the learning rate is set at every step."""
    groups = parameter_groups(model, weight_decay)
    if name == "lars":
        return LARS(groups, lr=0.0)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, lr=0.0, fused=fused)
    assert name == "adamw", name
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)
