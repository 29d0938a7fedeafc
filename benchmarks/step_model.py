"""The model alone: training steps as the loop takes them, on views that lie on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.backbones import build_backbone
from train.trainer.grad_cache import grad_cache_backward
from train.trainer.loop import ViewModel
from train.trainer.methods import SimCLR
from train.trainer.optim import build_optimizer
from train.trainer.precision import default_on_cuda

METHOD = SimCLR(128, 0.5)  # width of the projection, temperature
WEIGHT_DECAY = 1e-6
SEED = 42
_RATE = 0.01


class Training(NamedTuple):
    """step: takes one; net: what it trains, to be compiled in place."""

    net: torch.nn.Module
    step: Callable[[], None]


def model_step(
    *,
    backbone: str,
    image_size: int,
    batch_size: int,
    device: str,
    precision: str,
    channels_last: bool | None = None,
    micro_batch: int | None = None,
) -> Training:
    """Steps of SimCLR with LARS, always on the same random views, which are as the loop has them from its loader.

    precision: fp32, or bf16 under autocast. channels_last: None is the loop's own choice. micro_batch: in two passes, so many
    patches at a time. What the loop sets for the whole process is the caller's: `train.trainer.precision.backend_settings`.
    """
    torch.manual_seed(SEED)
    bf16, last = precision == "bf16", default_on_cuda(channels_last, torch.device(device))
    features = build_backbone(backbone, image_size)
    net: Any = ViewModel(features, METHOD.build_head(int(features.num_features))).to(device)  # type: ignore[arg-type]
    views_VBCSS = torch.randn(2, batch_size, 3, image_size, image_size, device=device)
    if bf16 and device == "cuda":
        views_VBCSS = views_VBCSS.bfloat16()
    if last:
        net = net.to(memory_format=torch.channels_last)
        views_VBCSS = views_VBCSS.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    optimizer = build_optimizer("lars", net, weight_decay=WEIGHT_DECAY, fused=device == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = _RATE
    net.train()
    label_B = torch.full((batch_size,), -1, device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=bf16)

    def loss_of(z_VBD: torch.Tensor) -> torch.Tensor:
        return METHOD.loss(z_VBD, label_B, None)

    def reseed(number: int) -> None:
        torch.manual_seed(number)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if micro_batch is None:
            with autocast():
                loss = loss_of(net(views_VBCSS))
            loss.backward()
        else:
            grad_cache_backward(net, views_VBCSS, loss_of, micro_batch=micro_batch, reseed=reseed, autocast=autocast)
        optimizer.step()

    return Training(net, step)


def step_flops(training: Training) -> int:
    """Floating-point operations of a step (a multiply and an add are two), by taking one. Before the net is compiled: the
    compiler's own kernels are not counted."""
    with FlopCounterMode(display=False) as counter:
        training.step()
    return counter.get_total_flops()
