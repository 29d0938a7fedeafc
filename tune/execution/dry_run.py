"""`--plan`: which trials are finished, which would resume, and how long the rest may take, judging by finished runs."""

from typing import Any

import numpy as np

from train.records.runs import Run
from tune.execution.selection_rules import check_probes
from tune.execution.study_state import StudyState
from tune.study.schema import Study, Trial


def dry_run_lines(study: Study) -> list[str]:
    """A line for each trial and selection, and the total. Runs and writes nothing.

    A line begins with finished, resumes, to do, to choose, CANNOT RUN, or blocked (it starts from one that cannot run).
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
    impossible: set[str] = set()
    for node in study.nodes:
        if node.name in state.outcome.runs:
            lines.append(f"{'finished':10} {node.name}")
            continue
        why = state.outcome.failed[node.name]
        if blocked := impossible.intersection(node.parents if isinstance(node, Trial) else node.candidates):
            impossible.add(node.name)
            lines.append(f"{'blocked':10} {node.name}, which needs {min(blocked)}")
        elif not why.startswith("not run"):
            impossible.add(node.name)
            lines.append(f"CANNOT RUN {node.name}: {why}")
        elif not isinstance(node, Trial):
            lines.append(f"{'to choose':10} {node.name}, of {len(node.candidates)} by {node.by}")
        else:
            seconds = _estimate(node, rates)
            unknown += seconds is None
            sum_seconds += seconds or 0.0
            about = "time unknown: no similar run on record" if seconds is None else f"about {_duration(seconds)}"
            lines.append(f"{status.get(node.name, 'to do'):10} {node.name} ({about})")
    finished = sum(node.name in state.outcome.runs for node in study.nodes)
    total = [f"{finished} of {len(study.nodes)} finished"]
    if sum_seconds:
        total.append(f"about {_duration(sum_seconds)} of trials to do")
    if unknown:
        total.append(f"{unknown} to do whose time is unknown")
    if impossible:
        total.append(f"{len(impossible)} cannot run")
    return [*lines, ", ".join(total)]


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
