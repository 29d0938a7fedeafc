"""The model alone: training steps as the loop takes them, on views that lie on the device."""

from collections.abc import Callable
from typing import Any

import torch

from models.backbones import build_backbone
from train.loop import ViewModel
from train.methods import SimCLR
from train.schedules import build_optimizer

METHOD = SimCLR(128, 0.5)  # width of the projection, temperature
WEIGHT_DECAY = 1e-6
SEED = 42
_RATE = 0.01


def model_step(*, backbone: str, image_size: int, batch_size: int, device: str, bf16: bool) -> Callable[[], None]:
    """A function that takes a step: SimCLR with LARS, always on the same random views. bf16: under autocast."""
    torch.manual_seed(SEED)
    features = build_backbone(backbone, image_size)
    net: Any = ViewModel(features, METHOD.build_head(int(features.num_features))).to(device)  # type: ignore[arg-type]
    if device == "cuda":
        net = net.to(memory_format=torch.channels_last)
    optimizer = build_optimizer("lars", net, weight_decay=WEIGHT_DECAY, fused=device == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = _RATE
    net.train()
    views_VBCSS = torch.randn(2, batch_size, 3, image_size, image_size, device=device)
    label_B = torch.full((batch_size,), -1, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = METHOD.loss(net(views_VBCSS), label_B, None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step
