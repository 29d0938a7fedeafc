"""Optimisers and learning rates. The learning rate is a function of the global step alone."""

import math

import torch
from torch import nn

from models.lars import LARS, parameter_groups


def default_learning_rate(optimizer: str, batch_size: int) -> float:
    """The peak learning rate where none is given: linear in the batch for LARS and SGD (Chen et al. 2020, section 2.2)."""
    return 0.3 * batch_size / 256 if optimizer in ("lars", "sgd") else 3e-4


def learning_rate(step: int, *, peak: float, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to 0 (Loshchilov and Hutter 2017; no restarts).

    step: 0 for the first one; steps: of the whole run.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
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
