"""Running a study's stages: each once, an unfinished one from its checkpoint, a finished one not at all."""

from collections.abc import Callable

from train.evaluation import evaluate
from train.pretraining import pretrain
from train.runs import Run, open_run
from tune.study import Cell, Study

_RUN: dict[str, Callable[..., Run]] = {"pretrain": pretrain, "evaluate": evaluate}


def run_study(study: Study) -> list[Run]:
    """Run the cells in order. Returns their runs. Raises what a stage raises; what was finished before stays."""
    return [_RUN[cell.kind](cell.config) for cell in study.cells]


def is_finished(study: Study, cell: Cell) -> bool:
    """Whether a run of that name is finished. That it is of this very config is seen when the stage is run."""
    return open_run(study.storage, cell.name).finished
