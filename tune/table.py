"""The table that a study fills."""

from collections.abc import Sequence

from rich.table import Table

from train.metrics import TITLES
from train.runs import Run

_SHOWN = ("accuracy", "balanced_accuracy", "f1", "auroc")  # what a console has room for; the report has them all


def result_table(runs: Sequence[Run]) -> Table:
    """A row per judged run and share of labels: the main figures of its test split, with their deviation over seeds."""
    table = Table()
    for title in ("run", "labels", *(TITLES[name] for name in _SHOWN)):
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=title == "run")
    for run in runs:
        for row in run.result.get("summary", []):
            table.add_row(run.name, f"{row['labels']:,}", *(_figure(row["metrics"][name]) for name in _SHOWN))
    return table


def _figure(figure):
    if figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.3f}" + ("" if figure["std"] is None else f" ± {figure['std']:.3f}")
