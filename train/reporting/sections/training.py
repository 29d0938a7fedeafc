"""Training: the metrics of pretraining, and curves over steps."""

from collections.abc import Sequence
from typing import Any

from train.reporting import plots
from train.reporting.legends import run_legend
from train.reporting.markup import Content, Html, figure, note, number, percent, row, table
from train.reporting.run_view import RunView
from train.trainer.methods import METHODS, Method, Supervised

# Metrics that mean the same for every method, and their titles.
_SHARED = {
    "validation_loss": "loss on the validation labels",
    "learning_rate": "learning rate",
    "probe_balanced_accuracy": "balanced accuracy of the ridge probe",
    "probe_knn_balanced_accuracy": "balanced accuracy of the kNN probe",
    "gradient_norm": "norm of the gradient",
}


def show(runs: Sequence[RunView]) -> list[Html]:
    pretrained = [run for run in runs if not run.is_evaluation]
    logged = [run for run in runs if run.rows]
    parts = [_table(pretrained)] if pretrained else []
    if len(pretrained) > 1:
        parts.append(
            note(
                "A loss depends on the method and the batch size. Compare such runs by their probes on one set: the balanced"
                " accuracy of a classifier on frozen features, evaluated on a held-out part of the training split."
            )
        )
    if any(run.is_evaluation and len(run.result["cells"]) > 1 for run in logged):
        parts.append(note("Of several trainings, the curves show the first seed of the largest fraction of labels."))
    return parts + ([run_legend(logged), row(*_curves(logged))] if logged else [])


def _table(runs: Sequence[RunView]) -> Html:
    lines: list[list[Content]] = []
    for run in runs:
        result, final = run.result, run.result["final"]
        lines.append(
            [
                run.name,
                number(final["loss"]),
                number(result["nothing_learned_loss"]),
                percent(final.get(_method_of(run).accuracy)),
                percent(final.get("probe_balanced_accuracy")),
                percent(final.get("probe_knn_balanced_accuracy")),
                number(result["patches_per_s"], 0),
                percent(result["data_wait"]),
                number(run.record["wall_seconds"], 0),
            ]
        )
    titles = ["run", "loss", "chance level", "accuracy of the pretext task", "ridge probe", "kNN probe", "patches/s",
              "data wait", "seconds"]  # fmt: skip
    return table("Pretraining", titles, lines)


def _method_of(run: RunView) -> type[Method]:
    """The run's method. Method itself if it is no longer registered."""
    if run.is_evaluation:
        return Supervised
    return METHODS.get(run.record["stage"]["config"].get("method"), Method)


def _curves(runs: Sequence[RunView]) -> list[Html]:
    """Runs share axes where the metric means the same for all of them: the losses of two tasks have nothing in common."""
    axes: dict[tuple[str, str], list[RunView]] = {}
    for run in runs:
        loss = {"loss": f"loss ({run.record['stage']['config'].get('method')})"}  # unless the method has a title of its own
        for curve in (loss | _method_of(run).curves).items():
            axes.setdefault(curve, []).append(run)
    axes |= {curve: list(runs) for curve in _SHARED.items()}
    return [drawn for (metric, title), shown in axes.items() for drawn in _curve(shown, metric, title)]


def _curve(runs: Sequence[RunView], measure: str, title: str) -> list[Html]:
    """The plot, if any of the runs has such values."""
    lines, names = [], []
    for run in runs:
        points = _points(run.rows, measure)
        if points:
            lines.append(plots.Line(run.number, *zip(*points, strict=True)))
            names.append(run.name)
    if not lines:
        return []
    caption = title[:1].upper() + title[1:]
    return [figure(plots.curves(lines), caption, alt=f"{caption} over steps of {', '.join(names)}")]


def _points(rows: list[dict[str, Any]], measure: str) -> list[tuple[int, float]]:
    return [(row["step"], row[measure]) for row in rows if row.get(measure) is not None]
