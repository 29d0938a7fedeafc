"""Evaluate a backbone on a labelled shard set: python train/evaluate.py --data shards/breast --backbone kidney --fraction 0.05"""

import sys

from sharding.cli import run_script
from train.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from train.stages.evaluation import evaluate  # torch takes seconds to import, and --help should not

    print(evaluate(config).folder / "result.json")


if __name__ == "__main__":
    sys.exit(run_script(main, EvaluateConfig, prog="evaluate.py", description="Evaluate a backbone on a labelled shard set."))
