"""What a study would do: which stages are finished, which go on, and how long they may take by the runs on record."""

from typing import Any

import numpy as np

from train.records.runs import Run
from tune.schema import Cell, Study
from tune.selection_rules import check_probes
from tune.study_state import Book


def plan_lines(study: Study) -> list[str]:
    """A line for each stage, and the sum. Nothing is run or written. Raises ValueError as run_study does for selections."""
    check_probes(study)
    book = Book(study, say=lambda line: None)
    status: dict[str, str] = {}
    while (begun := book.next()) is not None:
        there = book.known(begun)
        status[begun.cell.name] = "goes on" if there is not None and there.has_work() else "to do"
        book.failed(begun.cell.name, "not run: planned only")
    rates = _rates(book.runs)
    lines, sum_seconds, unknown = [], 0.0, 0
    for node in study.nodes:
        if node.name in book.outcome.runs:
            lines.append(f"{'finished':9} {node.name}")
            continue
        if not isinstance(node, Cell):
            lines.append(f"{'to choose':9} {node.name}, of {len(node.candidates)} by {node.by}")
            continue
        why = book.outcome.failed[node.name]
        state = status.get(node.name) or ("to do" if why.startswith("not run") else f"CANNOT: {why}")
        seconds = _estimate(node, rates)
        unknown += seconds is None
        sum_seconds += seconds or 0.0
        about = "time unknown: no like run on record" if seconds is None else f"about {_shown(seconds)}"
        lines.append(f"{state:9} {node.name} ({about})")
    counted = f"{_shown(sum_seconds)} of trials" + (f", and {unknown} of unknown time" if unknown else "")
    finished = sum(node.name in book.outcome.runs for node in study.nodes)
    return [*lines, f"{finished} of {len(study.nodes)} finished; to do: {counted}"]


def _rates(runs: list[Run]) -> dict[tuple, float]:
    """Seconds for an epoch of everything, by what decides it: the median over finished runs."""
    found: dict[tuple, list[float]] = {}
    for run in runs:
        if run.finished:
            config = run.record["stage"]["config"]
            found.setdefault(_like(run.record["stage"]["kind"], config), []).append(
                run.record["wall_seconds"] / _amount(run.record["stage"]["kind"], config)
            )
    return {like: float(np.median(seconds)) for like, seconds in found.items()}


def _estimate(cell: Cell, rates: dict[tuple, float]) -> float | None:
    kind = cell.kind if cell.kind == "pretrain" else cell.config.mode
    config = vars(cell.config)
    rate = rates.get(_like(kind, config))
    return None if rate is None else rate * _amount(kind, config)


def _like(kind: str, config: dict[str, Any]) -> tuple:
    """What makes two stages take alike for an epoch. The backbone of a judged one is not known before its parent is."""
    return kind, config.get("backbone") if kind == "pretrain" else None, config.get("image_size") if kind == "pretrain" else None


def _amount(kind: str, config: dict[str, Any]) -> float:
    """Of what the time is a multiple: epochs of the whole, and for judged ones seeds and fractions of the labels."""
    if kind == "pretrain":
        return config["epochs"] * config["fraction"]
    if kind in ("linear", "knn"):
        return 1.0
    return config["epochs"] * config["seeds"] * sum(config["fraction"])


def _shown(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
