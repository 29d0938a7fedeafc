"""Processes that begin different stages under one name. A module of its own, so that they import no more than they need."""

from pathlib import Path

from train.config import PretrainConfig
from train.records.runs import Run, Stage, identity


def contend(storage: Path, seed: int, barrier, finished) -> None:
    """Begin a stage with this seed under the names 0, 1, ..., work on it, and finish it. finished: counts by name."""
    for number in range(len(finished)):
        config = PretrainConfig(data="shards", name=str(number), seed=seed)
        run, stage = Run(storage / config.name), Stage("pretrain", identity(config), "d" * 64, "scratch")
        barrier.wait(100)
        try:
            run.begin(stage, config, {"seed": seed}, lambda run=run: (run.folder / "prepared").write_text(str(seed)))
            barrier.wait(100)  # all have begun, and none has done anything
            with run.locked(stage.key):
                (run.folder / "metrics.jsonl").write_text(f'{{"step": 1, "seed": {seed}}}\n')
        except ValueError as error:
            if "was taken by another command" in str(error):
                continue
            raise
        run.finish({"key": stage.key}, wall_seconds=1, device="CPU")
        with finished.get_lock():
            finished[number] += 1
