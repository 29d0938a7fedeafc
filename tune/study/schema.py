"""The parts of a study, as plain data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sharding.cli import option, required
from train.config import EvaluateConfig, PretrainConfig

KINDS: dict[str, type] = {"pretrain": PretrainConfig, "evaluate": EvaluateConfig}
PARENT_FIELDS = {"pretrain": "init", "evaluate": "backbone"}


class PretrainingMetric(NamedTuple):
    """field: in the final metrics of a run; title, short_title: as people read it."""

    field: str
    title: str
    short_title: str
    lower_is_better: bool


# The metrics by which pretrainings are compared and selected. Those of a method also stand in its `comparable_by`.
PRETRAINING_METRICS = {
    "loss": PretrainingMetric("loss", "loss", "loss", lower_is_better=True),
    "probe": PretrainingMetric("probe_balanced_accuracy", "balanced accuracy of the ridge probe", "probe", lower_is_better=False),
    "top1": PretrainingMetric("top1", "contrastive top-1 accuracy", "contrastive top-1", lower_is_better=False),
}


@dataclass(frozen=True)
class Trial:
    """One stage with every field settled.

    kind: a key of KINDS; config: of that class, with the trial's name and storage. Its init or backbone is the name of the node
    that it starts from, or something from outside the study. stage: of the file; axes: the values that tell it from the
    stage's other trials, inherited ones first; parents: names of the nodes that come before it; line: of the stage, in the file.
    """

    kind: str
    config: Any
    stage: str
    axes: dict[str, Any]
    parents: tuple[str, ...]
    line: int

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class Selection:
    """The best of several pretrainings, chosen when they are done. candidates: names of pretrain trials or of other selections;
    the rest is as in Trial."""

    name: str
    stage: str
    axes: dict[str, Any]
    candidates: tuple[str, ...]
    by: str
    line: int


GraphNode = Trial | Selection


@dataclass(frozen=True)
class Published:
    """A published value. at: its place in the table, like {"stage": "linear", "fraction": 0.05}; some of the table's axes may be
    missing. value: shares from 0 to 1, not percentages."""

    metric: str
    at: dict[str, Any]
    value: float


@dataclass(frozen=True)
class TableSpec:
    """A table to fill. stages: all of one kind; rows, columns: names of axes, which include "stage", and `fraction` (of the
    labels) for evaluate stages; values: keys of train.scoring.metrics.METRICS, or of PRETRAINING_METRICS for pretrain stages.

    No two trials share an entry unless they differ only in their seed.
    """

    title: str
    stages: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[str, ...]
    published: tuple[Published, ...]


@dataclass(frozen=True)
class Resources:
    """What each trial of a kind gets."""

    workers: int = option(0, "Ray Train workers per trial; 0: train in the trial's own process")
    gpus: float | None = option(None, "GPUs per trial: 0.25 runs four trials on one GPU; default: 1 if there are GPUs")
    cpus: float = option(1.0, "CPU cores per trial")


@dataclass(frozen=True)
class EarlyStopping:
    """Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter tuning") among the trials
    of each pretrain stage."""

    by: str = required("the metric that compares trials", choices=PRETRAINING_METRICS)
    grace_epochs: int = required("epochs before a trial may be stopped")
    reduction: int = option(3, "one in this many trials continues at each rung")


@dataclass(frozen=True)
class Study:
    """A study file, read and checked. about: its leading comment; nodes: parents before children; resources: of each of KINDS."""

    name: str
    storage: str
    report: Path
    about: str
    nodes: tuple[GraphNode, ...]
    tables: tuple[TableSpec, ...]
    resources: dict[str, Resources]
    early_stopping: EarlyStopping | None
    smoke: bool

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(node for node in self.nodes if isinstance(node, Trial))
