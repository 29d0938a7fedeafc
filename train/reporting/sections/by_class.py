"""Each class on its own: its metrics, what it is confused with, and how well the probabilities are calibrated."""

from collections.abc import Sequence
from statistics import mean

from train.reporting import plots
from train.reporting.markup import Content, Html, count, element, figure, joined, note, number, row, share, table
from train.reporting.run_view import RunView, per_run

_TITLES = {"precision": "precision", "recall": "recall", "f1": "F1", "auroc": "AUROC"}


def show(runs: Sequence[RunView]) -> list[Html]:
    return per_run(runs, [run for run in runs if run.is_evaluation], _class_section)


def _class_section(run: RunView) -> list[Html]:
    first = run.cells[0]
    seeds = f"mean over {count(len(run.cells), 'seed')}" if len(run.cells) > 1 else f"seed {first['seed']}"
    text = f"With {share(run.largest['fraction'])} of the labels. Table: {seeds}. Matrix and diagram: seed {first['seed']}."
    return [note(text), row(_per_class(run), _confusion(run), _reliability(run))]


def _per_class(run: RunView) -> Html:
    lines: list[list[Content]] = []
    for k, name in enumerate(run.classes):
        found = [cell["metrics"]["per_class"][k] for cell in run.cells]
        means = [[each[column] for each in found if each[column] is not None] for column in _TITLES]
        lines.append([name, *(number(mean(values) if values else None) for values in means), f"{found[0]['support']:,}"])
    return table("Per class", ["class", *_TITLES.values(), "test patches"], lines)


def _confusion(run: RunView) -> Html:
    counts = run.cells[0]["metrics"]["confusion"]
    lines: list[list[Content]] = []
    for name, found in zip(run.classes, counts, strict=True):
        cells = []
        for amount in found:
            part = amount / sum(found) if sum(found) else 0.0
            ink = "dark" if part > 0.7 else "light"
            shares = element("small", f"{part:.0%}" if sum(found) else "–")
            cells.append(element("td", joined([f"{amount:,}", shares]), class_=ink, style=f"--share: {part:.3f}"))
        lines.append([name, *cells])
    titles = ["true ↓ predicted →", *run.classes]
    return table("Confusion matrix: patches, and share of the true class", titles, lines, kind="confusion")


def _reliability(run: RunView) -> Html:
    found = run.predictions
    confidence = found.probabilities.max(1)
    right = found.probabilities.argmax(1) == found.labels
    error = number(run.cells[0]["metrics"]["calibration_error"])
    return figure(
        plots.reliability(confidence, right),
        "Reliability",
        alt=f"Reliability diagram of {run.name}; expected calibration error {error}",
        more=note(
            "On the dashed line, predictions are correct as often as their probability says. Bars: share of the predictions."
            f" Calibration error {error}."
        ),
    )
