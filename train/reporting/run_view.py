"""A run as the report's sections see it: what its folder says, read once."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.records.runs import Run
from train.reporting.gallery import GALLERY_NAME, MAP_NAME, MISTAKES_NAME, THUMBNAILS_NAME

NO_VALUE: dict[str, Any] = dict.fromkeys(("mean", "std", "low", "high"))


def summary_metric(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """mean, std, low, high of a metric, all None where the evaluation was made before the metric was added."""
    return summary["metrics"].get(name, NO_VALUE)


@dataclass(frozen=True)
class Predictions:
    """Of the first seed of the largest share of labels: n patches of the test split, each once. labels: (n,); probabilities:
    (n, K)."""

    labels: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Shown:
    """A finished run. number: its place in the report, which decides its colour; result, record: of result.json and run.json;
    rows: of metrics.jsonl; of several trainings, those of the first seed of the largest share of labels."""

    run: Run
    number: int
    result: dict[str, Any] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def is_judged(self) -> bool:
        """Whether it has figures of a test split."""
        return "cells" in self.result

    @property
    def sets(self) -> list[dict[str, Any]]:
        """The shard sets that it learnt from: name, fingerprint, weight."""
        return [each | {"name": PurePosixPath(each["shards"]).name} for each in self.record["input"]["sets"]]

    @property
    def classes(self) -> list[str]:
        return self.result["classes"]

    @property
    def largest(self) -> dict[str, Any]:
        """The summary of the largest share of labels."""
        return max(self.result["summary"], key=lambda each: each["fraction"])

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The results of that share, one per seed, in the order in which they were asked for."""
        return [cell for cell in self.result["cells"] if cell["fraction"] == self.largest["fraction"]]

    @functools.cached_property
    def predictions(self) -> Predictions:
        """Raises ValueError where the file is not to be had or does not hold them."""
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
        """The points of the map (see train/reporting/gallery.py) and how they were made; None where the run left none."""
        if not (self.run.folder / MAP_NAME).exists():
            return None
        table = self.table(MAP_NAME)
        return table, json.loads(table.schema.metadata[b"map"])

    @property
    def gallery(self) -> list[dict[str, Any]]:
        """Queries and their neighbours; empty where the run left none."""
        return self._list(GALLERY_NAME)

    @property
    def mistakes(self) -> list[dict[str, Any]] | None:
        """The worst first; None where the run did not say."""
        return self._list(MISTAKES_NAME) if (self.run.folder / MISTAKES_NAME).exists() else None

    @functools.cached_property
    def thumbnails(self) -> dict[int, bytes]:
        """JPEG by patch id."""
        table = self.table(THUMBNAILS_NAME)
        return dict(zip(table["id"].to_pylist(), table["jpeg"].to_pylist(), strict=True))

    def table(self, name: str) -> pa.Table:
        """A Parquet file of the folder. Raises ValueError where it is missing or damaged."""
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


def read_shown(run: Run, number: int) -> Shown:
    """Raises ValueError where the run is not finished, or was judged by an older version of this code."""
    result = run.result
    if "metrics" in result:
        raise ValueError(
            f"{run.name}: this run was judged by an older version of this code: run its command again under a new name"
        )
    shown = Shown(run, number, result, run.record, run.metrics())
    if shown.is_judged and not shown.rows:
        # What trains several times does so below its folder (see train/stages/evaluation.py).
        first = shown.cells[0]
        shown.rows.extend(Run(run.folder / "cells" / f"{100 * first['fraction']:g}%-seed{first['seed']}").metrics())
    return shown
