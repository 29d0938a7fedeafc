"""The book of a running study: what may begin, what is done, what failed, and what was selected. It knows nothing of Ray.

A stage that was finished before, in this study's storage and under whatever name, is not run again. A cell's run has the cell's
name; where that name stands for another stage already (the study was edited meanwhile), the first digits of its key are added.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.remote_folder import is_url
from train.config import EvaluateConfig, PretrainConfig
from train.records.runs import Run, open_run, runs_of
from tune.schema import PARENT_FIELDS, Cell, Node, Selection, Study
from tune.selection_rules import select_best
from tune.stage_runner import stage_of


@dataclass(frozen=True)
class Outcome:
    """What came of a study.

    runs: finished run by the name of its cell or selection; failed: error by the name of the cell, "not run: ..." where what
    it starts from failed; selected: by the selection's name, see selecting.select_best; again: cells that ran now.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    selected: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Begun:
    """A cell that is to be run now: its config, with the run that it starts from."""

    cell: Cell
    config: PretrainConfig | EvaluateConfig


class Book:
    """Hands out cells whose parents are done; is told how they ended.

    say: is given a line for each thing that happens.
    """

    def __init__(self, study: Study, say: Callable[[str], None] = print):
        self.study, self.outcome, self._say = study, Outcome(), say
        self._left = {node.name: node for node in study.nodes}
        self._running: dict[str, Begun] = {}
        self._known = runs_by_key(study.storage)

    @property
    def ended(self) -> bool:
        return not self._left and not self._running

    @property
    def runs(self) -> list[Run]:
        """All that were in the storage at the beginning, or are finished since."""
        return list(self._known.values())

    def known(self, begun: Begun) -> Run | None:
        """The run of that name, if there is one already."""
        return next((run for run in self._known.values() if run.name == begun.config.name), None)

    def next(self) -> Begun | None:
        """A cell to begin with; None where none is ready, for now or for good (see `ended`)."""
        while True:
            ready = next((node for node in self._left.values() if self._is_ready(node)), None)
            if ready is None:
                return None
            del self._left[ready.name]
            begun = self._begin(ready)
            if begun is not None:
                self._running[ready.name] = begun
                return begun

    def give_back(self, begun: Begun) -> None:
        """It was not begun after all, and is the next again."""
        del self._running[begun.cell.name]
        self._left = {begun.cell.name: begun.cell, **self._left}

    def done(self, name: str, run: Run) -> None:
        """A cell that was begun is finished."""
        begun = self._running.pop(name)
        self._known[run.record["key"]] = run
        self.outcome.ran.append(name)
        self._take(begun.cell, run, f"finished in {run.record['wall_seconds']:,.0f} s")

    def failed(self, name: str, why: str) -> None:
        """A cell that was begun has failed: what starts from it is not run, all others are."""
        self._running.pop(name)
        self._fail(name, why)

    def _is_ready(self, node: Node) -> bool:
        before = node.candidates if isinstance(node, Selection) else node.parents
        return all(name in self.outcome.runs or name in self.outcome.failed for name in before)

    def _begin(self, node: Node) -> Begun | None:
        """What is to be run; None where nothing is."""
        if isinstance(node, Selection):
            self._select(node)
            return None
        broken = [name for name in node.parents if name in self.outcome.failed]
        if broken:
            self._fail(node.name, f"not run: {broken[0]} failed")
            return None
        try:
            config = self._settled(node)
            key = stage_of(node.kind, config).key
        except (ValueError, OSError) as error:
            self._fail(node.name, str(error))
            return None
        same = self._known.get(key)
        if same is not None and same.finished:
            self._take(node, same, "finished already")
            return None
        return Begun(node, dataclasses.replace(config, name=self._name_for(node, key, same)))

    def _settled(self, cell: Cell):
        """The config, with the run's folder in the place of the parent's name."""
        fields = {}
        parent = getattr(cell.config, PARENT_FIELDS[cell.kind])
        if parent in cell.parents:
            run = self.outcome.runs[parent]
            fields[PARENT_FIELDS[cell.kind]] = run.url or str(run.folder)
        return dataclasses.replace(cell.config, **fields)

    def _name_for(self, cell: Cell, key: str, same: Run | None) -> str:
        if same is not None:  # begun before, under whatever name
            return same.name
        there = open_run(self.study.storage, cell.name)
        if not (there.folder / "run.json").exists() or there.record["key"] == key or not there.has_work():
            return cell.name
        self._say(f"{cell.name}: the run of that name is of another stage and stays; this one is {cell.name}-{key[:8]}")
        return f"{cell.name}-{key[:8]}"

    def _select(self, selection: Selection) -> None:
        runs = {name: self.outcome.runs[name] for name in selection.candidates if name in self.outcome.runs}
        if not runs:
            self._fail(selection.name, f"not run: {selection.candidates[0]} failed")
            return
        try:
            selected = select_best(selection, runs)
        except ValueError as error:
            self._fail(selection.name, str(error))
            return
        without = [name for name in selection.candidates if name not in runs]
        self.outcome.selected[selection.name] = selected | {"without": without}
        but = f", without {', '.join(without)}, which failed" if without else ""
        self._take(selection, runs[selected["chosen"]], f"{selected['chosen']} (by {selection.by}{but})")

    def _take(self, node: Node, run: Run, how: str) -> None:
        self.outcome.runs[node.name] = run
        self._said(node.name, how if run.name == node.name or isinstance(node, Selection) else f"{how}, as {run.name}")

    def _fail(self, name: str, why: str) -> None:
        self.outcome.failed[name] = why
        self._said(name, f"FAILED: {why}" if not why.startswith("not run") else why)

    def _said(self, name: str, text: str) -> None:
        so_far = len(self.outcome.runs) + len(self.outcome.failed)
        self._say(f"[{so_far}/{len(self.study.nodes)}] {name}: {text}")


def runs_by_key(storage: str) -> dict[str, Run]:
    """The runs of a storage by their stage's key; of several with one key the finished one."""
    found: dict[str, Run] = {}
    for run in runs_of(storage):
        key = run.record["key"]
        if key not in found or run.finished:
            found[key] = run
    return found


def set_aside(study: Study, stages: list[str]) -> list[Path]:
    """Move the runs of these stages, and of all that start from them, out of the way, so that they are run again. Returns where
    they are now.

    Raises ValueError for a stage that there is not, and for a storage at a URL.
    """
    known = {node.stage for node in study.nodes}
    for stage in stages:
        if stage not in known:
            raise ValueError(f"--force {stage}: the study has no such stage; there are {', '.join(sorted(known))}")
    if stages and is_url(study.storage):
        raise ValueError(f"--force: remove the runs at {study.storage} yourself, and run the study again")
    doomed: set[str] = set()
    moved = []
    for node in study.nodes:
        before = node.candidates if isinstance(node, Selection) else node.parents
        if node.stage in stages or doomed.intersection(before):
            doomed.add(node.name)
            for run in runs_of(study.storage):
                if isinstance(node, Cell) and (
                    run.name == node.name or (run.name.startswith(f"{node.name}-") and _suffixed(run, node))
                ):
                    moved.append(_moved(run))
    return moved


def _suffixed(run: Run, node: Cell) -> bool:
    return run.name == f"{node.name}-{run.record['key'][:8]}"


def _moved(run: Run) -> Path:
    place = run.folder.parent / ".superseded"
    place.mkdir(exist_ok=True)
    number = 1 + len(list(place.glob(f"{run.name}.*")))
    return run.folder.rename(place / f"{run.name}.{number}")
