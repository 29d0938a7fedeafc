"""Write the features of a shard set as Parquet: python train/embed.py --data shards/breast --backbone kidney --out breast"""

import sys

from sharding.cli import run_script
from train.config import EmbedConfig


def main(config: EmbedConfig) -> None:
    from train.stages.embedding import embed  # torch takes seconds to import, and --help should not

    print(embed(config))


if __name__ == "__main__":
    sys.exit(run_script(main, EmbedConfig, prog="embed.py", description="Write a backbone's features of a shard set as Parquet."))
