"""The metrics of a study's trials: their place in a table, by axis, and the values of each seed."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from train.records.runs import Run
from train.reporting.markup import share
from train.scoring.metrics import METRICS
from tune.study.grid_expansion import table_places
from tune.study.schema import PRETRAINING_METRICS, Trial

if TYPE_CHECKING:
    from tune.execution.study_state import StudyResult


def metric_titles(kind: str) -> dict[str, str]:
    """The metrics of a kind of stage by name, with what a person reads."""
    return {name: metric.title for name, metric in (PRETRAINING_METRICS if kind == "pretrain" else METRICS).items()}


def lower_is_better(metric: str) -> bool:
    """Of either kind of stage."""
    known = PRETRAINING_METRICS | METRICS
    return metric in known and known[metric].lower_is_better


@dataclass(frozen=True)
class TrialMetrics:
    """The metrics of a trial, or of one fraction of the labels if it evaluates several.

    at: the values of its axes; run: None unless the trial is finished; error: why it failed; values: the metrics of each seed, by
    a key for the seed; summary: the run's own means and intervals; compares: by metric, what must be equal for two values to
    compare.
    """

    trial: Trial
    at: dict[str, Any]
    run: Run | None = None
    error: str | None = None
    values: dict[Hashable, dict[str, float | None]] = field(default_factory=dict)
    summary: dict[str, dict[str, float | None]] = field(default_factory=dict)
    compares: dict[str, Hashable] = field(default_factory=dict)


def read_metrics(trial: Trial, result: "StudyResult") -> Iterator[TrialMetrics]:
    """The metrics of a trial in each of its places."""
    run = result.runs.get(trial.name)
    for at in table_places(trial):
        if run is None:
            yield TrialMetrics(trial, at, error=result.failed.get(trial.name))
        else:
            yield (_pretraining_metrics if trial.kind == "pretrain" else _evaluation_metrics)(trial, at, run)


def format_axis(axis: str) -> str:
    """The name of an axis as people read it."""
    return axis.replace("_", " ")


def format_axis_value(axis: str, value: Any) -> str:
    """The value of an axis as people read it; a dash if a trial has no such axis."""
    if value is None:
        return "–"
    if axis.split(".")[-1] == "fraction":
        return share(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pretraining_metrics(trial, at, run):
    config, final, data = trial.config, run.result["final"], run.record["stage"]["data"]
    # The scale of a loss depends on the method, batch size and temperature. A probe depends on its shard set alone.
    compares = dict.fromkeys(PRETRAINING_METRICS, config.probe_data or data)
    compares["loss"] = (data, config.method, config.batch_size, config.temperature)
    metrics = {name: _finite(final.get(metric.field)) for name, metric in PRETRAINING_METRICS.items()}
    return TrialMetrics(trial, at, run, values={trial.name: metrics}, compares=compares)


def _finite(value):
    """None for a loss that diverged."""
    return value if value is not None and math.isfinite(value) else None


def _evaluation_metrics(trial, at, run):
    own = [each for each in run.result["cells"] if each["fraction"] == at["fraction"]]
    (summary,) = (each["metrics"] for each in run.result["summary"] if each["fraction"] == at["fraction"])
    # Trials whose ranges of seeds overlap (`seed: [1, 2]` with `seeds: 2`) evaluate some seeds of a backbone twice.
    values: dict[Hashable, dict[str, float | None]] = {(trial.config.backbone, each["seed"]): each["metrics"] for each in own}
    compares: dict[str, Hashable] = dict.fromkeys(METRICS, (run.record["stage"]["data"], own[0]["test_patches"], at["fraction"]))
    return TrialMetrics(trial, at, run, values=values, summary=summary, compares=compares)
