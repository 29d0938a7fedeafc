"""What a cell of a study has to tell a table: where it stands, by axis, and the figures of each of its seeds."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from train.records.runs import Run
from train.reporting.markup import share
from train.scoring.metrics import METRICS
from tune.schema import FINAL, Cell

if TYPE_CHECKING:
    from tune.study_state import Outcome

_PRETRAINED = {"loss": "loss", "top1": "contrastive top-1 accuracy", "probe": "balanced accuracy of the ridge probe"}


def metric_titles(kind: str) -> dict[str, str]:
    """The metrics of a kind of stage by name, with what a person reads."""
    return _PRETRAINED if kind == "pretrain" else {name: metric.title for name, metric in METRICS.items()}


def lower_is_better(metric: str) -> bool:
    """Of either kind of stage."""
    return metric == "loss" or (metric in METRICS and METRICS[metric].lower_is_better)


@dataclass(frozen=True)
class Observed:
    """A cell, or where it judges several shares of the labels, one of them.

    at: the values of its axes; run: None where the cell is not done; error: why; values: the figures of each seed, by what tells
    seeds apart; summary: the run's own means, with intervals; compares: what must be equal for two figures to compare, by metric.
    """

    cell: Cell
    at: dict[str, Any]
    run: Run | None = None
    error: str | None = None
    values: dict[Hashable, dict[str, float | None]] = field(default_factory=dict)
    summary: dict[str, dict[str, float | None]] = field(default_factory=dict)
    compares: dict[str, Hashable] = field(default_factory=dict)


def places(cell: Cell) -> list[dict[str, Any]]:
    """Where in a table a cell stands, by axis: an evaluation in one place for each share of the labels.

    What an evaluation has inherited is its parent's share of the patches, and not its own of the labels: pretrain.fraction.
    """
    at = {"stage": cell.stage, **cell.axes}
    if cell.kind == "pretrain":
        return [at]
    fraction = at.pop("fraction", None)
    if isinstance(fraction, float | int) and cell.config.fraction != [fraction]:
        at["pretrain.fraction"] = fraction
    return [at | {"fraction": fraction} for fraction in cell.config.fraction]


def observe(cell: Cell, outcome: "Outcome") -> Iterator[Observed]:
    """The cell in each of its places."""
    run = outcome.runs.get(cell.name)
    for at in places(cell):
        if run is None:
            yield Observed(cell, at, error=outcome.failed.get(cell.name))
        else:
            yield (_pretrained if cell.kind == "pretrain" else _judged)(cell, at, run)


def axis_title(axis: str) -> str:
    """An axis as people read it."""
    return axis.replace("_", " ")


def axis_value(axis: str, value: Any) -> str:
    """A value of an axis as people read it; a dash where a cell has no such axis."""
    if value is None:
        return "–"
    if axis.split(".")[-1] == "fraction":
        return share(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pretrained(cell, at, run):
    config, final, data = cell.config, run.result["final"], run.record["stage"]["data"]
    # A loss has the scale of its method, batch and temperature; a probe is a task of its set.
    compares = dict.fromkeys(_PRETRAINED, config.probe_data or data)
    compares["loss"] = (data, config.method, config.batch_size, config.temperature)
    figures = {name: _known(final.get(FINAL[name])) for name in _PRETRAINED}
    return Observed(cell, at, run, values={cell.name: figures}, compares=compares)


def _known(value):
    """A loss that was lost on the way is no figure."""
    return value if value is not None and math.isfinite(value) else None


def _judged(cell, at, run):
    own = [each for each in run.result["cells"] if each["fraction"] == at["fraction"]]
    (summary,) = (each["metrics"] for each in run.result["summary"] if each["fraction"] == at["fraction"])
    # Cells whose ranges of seeds overlap (`seed: [1, 2]` with `seeds: 2`) judge some seeds of one backbone twice.
    values: dict[Hashable, dict[str, float | None]] = {(cell.config.backbone, each["seed"]): each["metrics"] for each in own}
    compares: dict[str, Hashable] = dict.fromkeys(METRICS, (run.record["stage"]["data"], own[0]["test_patches"], at["fraction"]))
    return Observed(cell, at, run, values=values, summary=summary, compares=compares)
