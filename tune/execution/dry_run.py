"""`--plan`: which trials are finished, which would resume, and how long the rest may take, judging by finished runs."""

from typing import Any

import numpy as np

from train.records.runs import Run
from tune.execution.selection_rules import check_probes
from tune.execution.study_state import StudyState
from tune.study.schema import Study, Trial


def dry_run_lines(study: Study) -> list[str]:
    """A line for each trial and selection, and the total. Runs and writes nothing.

    Raises ValueError for selections as run_study does.
    """
    check_probes(study)
    state = StudyState(study, log=lambda line: None)
    status: dict[str, str] = {}
    while (ready := state.next_ready()) is not None:
        there = state.existing_run(ready)
        status[ready.trial.name] = "resumes" if there is not None and there.has_work() else "to do"
        state.mark_failed(ready.trial.name, "not run: planned only")
    rates = _rates(state.runs)
    lines, sum_seconds, unknown = [], 0.0, 0
    for node in study.nodes:
        if node.name in state.outcome.runs:
            lines.append(f"{'finished':9} {node.name}")
            continue
        if not isinstance(node, Trial):
            lines.append(f"{'to choose':9} {node.name}, of {len(node.candidates)} by {node.by}")
            continue
        why = state.outcome.failed[node.name]
        status_text = status.get(node.name) or ("to do" if why.startswith("not run") else f"CANNOT: {why}")
        seconds = _estimate(node, rates)
        unknown += seconds is None
        sum_seconds += seconds or 0.0
        about = "time unknown: no similar run on record" if seconds is None else f"about {_duration(seconds)}"
        lines.append(f"{status_text:9} {node.name} ({about})")
    counted = f"{_duration(sum_seconds)} of trials" + (f", and {unknown} of unknown time" if unknown else "")
    finished = sum(node.name in state.outcome.runs for node in study.nodes)
    return [*lines, f"{finished} of {len(study.nodes)} finished; to do: {counted}"]


def _rates(runs: list[Run]) -> dict[tuple, float]:
    """Median seconds per unit of work over finished runs, by what determines it."""
    found: dict[tuple, list[float]] = {}
    for run in runs:
        if run.finished:
            config = run.record["stage"]["config"]
            found.setdefault(_cost_key(run.record["stage"]["kind"], config), []).append(
                run.record["wall_seconds"] / _work(run.record["stage"]["kind"], config)
            )
    return {cost_key: float(np.median(seconds)) for cost_key, seconds in found.items()}


def _estimate(trial: Trial, rates: dict[tuple, float]) -> float | None:
    kind = trial.kind if trial.kind == "pretrain" else trial.config.mode
    config = vars(trial.config)
    rate = rates.get(_cost_key(kind, config))
    return None if rate is None else rate * _work(kind, config)


def _cost_key(kind: str, config: dict[str, Any]) -> tuple:
    """What determines the time of a unit of work. The backbone of an evaluation is unknown until its parent is."""
    return kind, config.get("backbone") if kind == "pretrain" else None, config.get("image_size") if kind == "pretrain" else None


def _work(kind: str, config: dict[str, Any]) -> float:
    """Units of work: epochs over all patches; for an evaluation, also seeds and fractions of the labels."""
    if kind == "pretrain":
        return config["epochs"] * config["fraction"]
    if kind in ("linear", "knn"):
        return 1.0
    return config["epochs"] * config["seeds"] * sum(config["fraction"])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
