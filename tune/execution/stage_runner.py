"""The kinds of stages, and how each is run."""

from collections.abc import Callable
from typing import Any

from train.records.runs import Run, Stage
from train.stages import evaluation, pretraining

_STAGES: dict[str, Callable[[Any], Stage]] = {"pretrain": pretraining.stage_of, "evaluate": evaluation.stage_of}
_RUN: dict[str, Callable[[Any], Run]] = {"pretrain": pretraining.pretrain, "evaluate": evaluation.evaluate}


def stage_of(kind: str, config: Any) -> Stage:
    """The stage that a config describes. Raises ValueError, and OSError, for inputs that cannot be read."""
    return _STAGES[kind](config)


def run_stage(kind: str, config: Any) -> Run:
    """Run one stage, here. Raises what it raises."""
    return _RUN[kind](config)
