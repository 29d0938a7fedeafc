"""Pretrain a backbone on a shard set: python train/pretrain.py --data shards/kidney --name kidney --workers 2"""

import sys

from sharding.cli import run_script
from train.config import PretrainConfig


def main(config: PretrainConfig) -> None:
    from train.stages.pretraining import pretrain  # torch takes seconds to import, and --help should not

    print(pretrain(config).folder / "backbone.safetensors")


if __name__ == "__main__":
    sys.exit(run_script(main, PretrainConfig, prog="pretrain.py", description="Self-supervised pretraining on a shard set."))
