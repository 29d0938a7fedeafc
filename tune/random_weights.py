"""Weights drawn at random: python tune/random_weights.py --backbone test_resnet --out random.safetensors

A study in smoke size starts from them where the study itself starts from ImageNet's weights: it shows that the chain runs, also
where nothing can be fetched. The file's name should say what it is, as a report names it.
"""

import sys
from dataclasses import dataclass

from sharding.cli import option, required, run_script


@dataclass(frozen=True)
class RandomWeightsConfig:
    """Which weights."""

    backbone: str = required("timm's name of the architecture")
    out: str = required("the file to write, NAME.safetensors; its model card goes beside it")
    seed: int = option(0, "of the draw")


def main(config: RandomWeightsConfig) -> None:
    if not config.out.endswith(".safetensors"):
        raise ValueError(f"--out {config.out}: the name should end in .safetensors")
    import torch

    from models.backbones import create_timm_model
    from models.weights import save_backbone

    torch.manual_seed(config.seed)
    backbone = create_timm_model(config.backbone, None, pretrained=False)
    card = {"backbone": config.backbone, "weights": f"drawn at random (seed {config.seed}), never trained"}
    print(save_backbone(backbone, config.out, card))


if __name__ == "__main__":
    sys.exit(run_script(main, RandomWeightsConfig, prog="random_weights.py", description="Write weights drawn at random."))
