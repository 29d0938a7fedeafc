"""The contents of a run's folder, read once, for the sections of a report."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.records.json_files import check_fields
from train.records.runs import RECORD_NAME, Run
from train.reporting.gallery import GALLERY_NAME, MAP_NAME, MISTAKES_NAME, THUMBNAILS_NAME
from train.reporting.markup import Html, heading

# The types of what a report shows of run.json, beside what every reader needs.
_SHOWN_FIELDS = {"input.sets": list, "input.recipe": str, "input.recipe_fields": dict, "machine.cores": int}
NO_VALUE: dict[str, Any] = dict.fromkeys(("mean", "std", "low", "high"))


def summary_metric(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """mean, std, low, high of a metric, all None where the evaluation was made before the metric was added."""
    return summary["metrics"].get(name, NO_VALUE)


@dataclass(frozen=True)
class Predictions:
    """Predictions of the first seed of the largest fraction of labels, for n patches of the test split. labels: (n,);
    probabilities: (n, K)."""

    labels: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class RunView:
    """A finished run. number: its place in the report, which decides its colour; result, record: from result.json and run.json;
    rows: from metrics.jsonl; of several trainings, those of the first seed of the largest fraction of labels."""

    run: Run
    number: int
    result: dict[str, Any] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def is_evaluation(self) -> bool:
        """Whether it is an evaluation, with metrics on a test split."""
        return "cells" in self.result

    @property
    def sets(self) -> list[dict[str, Any]]:
        """The shard sets that it was trained on: name, fingerprint, weight."""
        return [each | {"name": PurePosixPath(each["shards"]).name} for each in self.record["input"]["sets"]]

    @property
    def classes(self) -> list[str]:
        return self.result["classes"]

    @property
    def largest(self) -> dict[str, Any]:
        """The summary of the largest fraction of labels."""
        return max(self.result["summary"], key=lambda each: each["fraction"])

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The results for that fraction, one per seed, in the order of the config."""
        return [cell for cell in self.result["cells"] if cell["fraction"] == self.largest["fraction"]]

    @functools.cached_property
    def predictions(self) -> Predictions:
        """Raises ValueError if the file is missing or lacks them."""
        table = self.table("predictions.parquet")
        first = self.cells[0]
        try:
            chosen = pc.and_(pc.equal(table["fraction"], first["fraction"]), pc.equal(table["seed"], first["seed"]))
            table = table.filter(chosen)
            flat = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return Predictions(table["label"].to_numpy(), flat.reshape(table.num_rows, len(self.classes)))
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise self._damaged("predictions.parquet") from error

    @property
    def map(self) -> tuple[pa.Table, dict[str, Any]] | None:
        """The points of the map (see train/reporting/gallery.py) and how they were computed; None if the run has no map."""
        if not (self.run.folder / MAP_NAME).exists():
            return None
        table = self.table(MAP_NAME)
        return table, json.loads(table.schema.metadata[b"map"])

    @property
    def gallery(self) -> list[dict[str, Any]]:
        """Queries and their neighbours; empty if the run has none."""
        return self._list(GALLERY_NAME)

    @property
    def mistakes(self) -> list[dict[str, Any]] | None:
        """The worst first; None if the run did not record them."""
        return self._list(MISTAKES_NAME) if (self.run.folder / MISTAKES_NAME).exists() else None

    @functools.cached_property
    def thumbnails(self) -> dict[int, bytes]:
        """JPEG by patch id."""
        table = self.table(THUMBNAILS_NAME)
        return dict(zip(table["id"].to_pylist(), table["jpeg"].to_pylist(), strict=True))

    def table(self, name: str) -> pa.Table:
        """A Parquet file of the folder. Raises ValueError if it is missing or damaged."""
        try:
            return pq.read_table(self.run.folder / name)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(name) from error

    def _list(self, name):
        path = self.run.folder / name
        try:
            return json.loads(path.read_bytes()) if path.exists() else []
        except ValueError as error:
            raise self._damaged(name) from error

    def _damaged(self, name):
        return ValueError(f"{self.run.folder / name}: this file is missing or damaged: remove the run and run its command again")


def per_run(runs: Sequence[RunView], shown: Sequence[RunView], parts: Callable[[RunView], list[Html]]) -> list[Html]:
    """The parts of each run that is shown, below its name where the report is of several runs."""
    return [part for run in shown for part in ([heading(run.name)] if len(runs) > 1 else []) + parts(run)]


def read_run(run: Run, number: int) -> RunView:
    """Raises ValueError if the run is not finished, or was evaluated by an older version of this code."""
    result = run.result
    if "metrics" in result:
        raise ValueError(
            f"{run.name}: an older version of this code made this evaluation: run its command again under a new name"
        )
    view = RunView(run, number, result, run.record, run.metrics())
    path = run.folder / RECORD_NAME
    check_fields(view.record, _SHOWN_FIELDS, path)
    for each in view.record["input"]["sets"]:
        check_fields({"set": each}, {"set": dict, "set.shards": str, "set.fingerprint": str, "set.weight": (int, float)}, path)
    if view.is_evaluation and not view.rows:
        # A run of several trainings has a folder for each (see train/stages/evaluation.py).
        first = view.cells[0]
        view.rows.extend(Run(run.folder / "cells" / f"{100 * first['fraction']:g}%-seed{first['seed']}").metrics())
    return view
