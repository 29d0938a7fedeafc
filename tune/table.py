"""The table that a study fills."""

from collections.abc import Sequence

from rich.table import Table

from train.metrics import TITLES
from train.runs import Run

_SHOWN = ("accuracy", "balanced_accuracy", "f1", "auroc")  # what a console has room for; the report has them all


def result_table(runs: Sequence[Run]) -> Table:
    """A row per judged run: labels, and the main figures of its test split."""
    table = Table()
    for title in ("run", "labels", *(TITLES[name] for name in _SHOWN)):
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=title == "run")
    for run in runs:
        result = run.result
        if "metrics" in result:
            figures = [result["metrics"][name] for name in _SHOWN]
            table.add_row(run.name, f"{result['labels']:,}", *("–" if value is None else f"{value:.3f}" for value in figures))
    return table
