"""The state of a running study: which trials are ready, finished or failed, and what was selected. It knows nothing of Ray.

A stage that has finished before in this study's storage, under any name, is not run again. A run has its trial's name. If that
name belongs to another stage already (because the study was edited), the first digits of the key are appended.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.remote_folder import is_url
from sharding.cli import describe
from train.config import EvaluateConfig, PretrainConfig
from train.records.runs import Run, open_run, runs_of
from tune.execution.selection_rules import select_best
from tune.execution.stage_runner import stage_of
from tune.study.schema import PARENT_FIELDS, GraphNode, Selection, Study, Trial


@dataclass(frozen=True)
class StudyResult:
    """The result of a study.

    runs: finished runs by the name of their trial or selection; failed: errors by the name of the trial, "not run: ..." where its
    parent failed; selected: by the selection's name, see selection_rules.select_best; ran: trials that ran this time.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    selected: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadyTrial:
    """A trial to run now. config: with the run that it starts from filled in."""

    trial: Trial
    config: PretrainConfig | EvaluateConfig


class StudyState:
    """Hands out trials whose parents are finished, and records how each trial ended. log: called with a line for each event."""

    def __init__(self, study: Study, log: Callable[[str], None] = print):
        self.study, self.outcome, self._log = study, StudyResult(), log
        self._waiting = {node.name: node for node in study.nodes}
        self._running: dict[str, ReadyTrial] = {}
        self._runs_by_key = runs_by_key(study.storage)

    @property
    def is_complete(self) -> bool:
        return not self._waiting and not self._running

    @property
    def runs(self) -> list[Run]:
        """All that were in the storage at the start, or have finished since."""
        return list(self._runs_by_key.values())

    def existing_run(self, ready: ReadyTrial) -> Run | None:
        """The run of that name, if there is one."""
        return next((run for run in self._runs_by_key.values() if run.name == ready.config.name), None)

    def next_ready(self) -> ReadyTrial | None:
        """The next trial to run, or None if none is ready, now or ever (see `is_complete`)."""
        while True:
            node = next((node for node in self._waiting.values() if self._is_ready(node)), None)
            if node is None:
                return None
            del self._waiting[node.name]
            ready = self._begin(node)
            if ready is not None:
                self._running[node.name] = ready
                return ready

    def requeue(self, ready: ReadyTrial) -> None:
        """Put back a trial that was not started: it is the next one again."""
        del self._running[ready.trial.name]
        self._waiting = {ready.trial.name: ready.trial, **self._waiting}

    def mark_finished(self, name: str, run: Run) -> None:
        """Record that a trial has finished."""
        ready = self._running.pop(name)
        self._runs_by_key[run.record["key"]] = run
        self.outcome.ran.append(name)
        self._record_run(ready.trial, run, f"finished in {run.record['wall_seconds']:,.0f} s")

    def mark_failed(self, name: str, why: str) -> None:
        """Record that a trial has failed. Trials that start from it are not run; all others are."""
        self._running.pop(name)
        self._record_failure(name, why)

    def _is_ready(self, node: GraphNode) -> bool:
        before = node.candidates if isinstance(node, Selection) else node.parents
        return all(name in self.outcome.runs or name in self.outcome.failed for name in before)

    def _begin(self, node: GraphNode) -> ReadyTrial | None:
        """The trial to run; None if there is nothing to run."""
        if isinstance(node, Selection):
            self._select(node)
            return None
        broken = [name for name in node.parents if name in self.outcome.failed]
        if broken:
            self._record_failure(node.name, f"not run: {broken[0]} failed")
            return None
        try:
            config = self._config_of(node)
            key = stage_of(node.kind, config).key
        except (ValueError, OSError) as error:
            self._record_failure(node.name, describe(error))
            return None
        same = self._runs_by_key.get(key)
        if same is not None and same.finished:
            self._record_run(node, same, "finished already")
            return None
        return ReadyTrial(node, dataclasses.replace(config, name=self._name_for(node, key, same)))

    def _config_of(self, trial: Trial):
        """The config, with the parent's run in place of its name."""
        fields = {}
        parent = getattr(trial.config, PARENT_FIELDS[trial.kind])
        if parent in trial.parents:
            run = self.outcome.runs[parent]
            fields[PARENT_FIELDS[trial.kind]] = run.url or str(run.folder)
        return dataclasses.replace(trial.config, **fields)

    def _name_for(self, trial: Trial, key: str, same: Run | None) -> str:
        if same is not None:  # started before, under any name
            return same.name
        there = open_run(self.study.storage, trial.name)
        if not there.exists or there.record["key"] == key or not there.has_work():
            return trial.name
        self._log(
            f"{trial.name}: the run of that name belongs to another stage and is kept; this one is named {trial.name}-{key[:8]}"
        )
        return f"{trial.name}-{key[:8]}"

    def _select(self, selection: Selection) -> None:
        runs = {name: self.outcome.runs[name] for name in selection.candidates if name in self.outcome.runs}
        if not runs:
            self._record_failure(selection.name, f"not run: {selection.candidates[0]} failed")
            return
        try:
            selected = select_best(selection, runs)
        except ValueError as error:
            self._record_failure(selection.name, describe(error))
            return
        without = [name for name in selection.candidates if name not in runs]
        self.outcome.selected[selection.name] = selected | {"without": without}
        but = f", without {', '.join(without)}, which failed" if without else ""
        self._record_run(selection, runs[selected["chosen"]], f"{selected['chosen']} (by {selection.by}{but})")

    def _record_run(self, node: GraphNode, run: Run, how: str) -> None:
        self.outcome.runs[node.name] = run
        self._report(node.name, how if run.name == node.name or isinstance(node, Selection) else f"{how}, as {run.name}")

    def _record_failure(self, name: str, why: str) -> None:
        self.outcome.failed[name] = why
        self._report(name, f"FAILED: {why}" if not why.startswith("not run") else why)

    def _report(self, name: str, text: str) -> None:
        so_far = len(self.outcome.runs) + len(self.outcome.failed)
        self._log(f"[{so_far}/{len(self.study.nodes)}] {name}: {text}")


def runs_by_key(storage: str) -> dict[str, Run]:
    """The runs of a storage by their stage's key; if several share a key, the finished one."""
    found: dict[str, Run] = {}
    for run in runs_of(storage):
        key = run.record["key"]
        if key not in found or run.finished:
            found[key] = run
    return found


def set_aside(study: Study, stages: list[str]) -> list[Path]:
    """Move the runs of these stages, and of all that start from them, out of the way, so that they run again. Returns the new
    folders. Raises ValueError for an unknown stage, and for a storage at a URL.
    """
    known = {node.stage for node in study.nodes}
    for stage in stages:
        if stage not in known:
            raise ValueError(f"--force {stage}: the study has no such stage; there are {', '.join(sorted(known))}")
    if stages and is_url(study.storage):
        raise ValueError(f"--force: remove the runs at {study.storage} yourself, and run the study again")
    to_rerun: set[str] = set()
    moved = []
    for node in study.nodes:
        before = node.candidates if isinstance(node, Selection) else node.parents
        if node.stage in stages or to_rerun.intersection(before):
            to_rerun.add(node.name)
            for run in runs_of(study.storage):
                if isinstance(node, Trial) and run.name in (node.name, f"{node.name}-{run.record['key'][:8]}"):
                    moved.append(_moved(run))
    return moved


def _moved(run: Run) -> Path:
    place = run.folder.parent / ".superseded"
    place.mkdir(exist_ok=True)
    number = 1 + len(list(place.glob(f"{run.name}.*")))
    return run.folder.rename(place / f"{run.name}.{number}")
