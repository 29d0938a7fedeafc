"""Write random weights of a backbone: python tune/random_weights.py --backbone test_resnet --out random.safetensors

At smoke size, a study uses them in place of ImageNet weights, so that its chains run without a network. Reports show the name
of the file: it should say that the weights are random.
"""

import sys
from dataclasses import dataclass

from sharding.cli import option, required, run_script


@dataclass(frozen=True)
class RandomWeightsConfig:
    """Which weights."""

    backbone: str = required("timm model name")
    out: str = required("the file to write, NAME.safetensors; a model card is written beside it")
    seed: int = option(0, "random seed")


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
    sys.exit(run_script(main, RandomWeightsConfig, prog="random_weights.py", description="Write random weights of a backbone."))
