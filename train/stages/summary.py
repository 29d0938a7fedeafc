"""From predictions to a paper's table: metrics of each cell, intervals by group, and their summary over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shard_reader import ShardReader
from train.records.runs import replacing
from train.scoring.bootstrap import bootstrap, combine, count_units, interval, mean_and_deviation
from train.scoring.metrics import METRICS, score
from train.stages.label_sets import LabelledSet, Labels, rows_of

PREDICTIONS_NAME = "predictions.parquet"


@dataclass(frozen=True)
class Cell:
    """A fraction of the labels and a seed, judged. probabilities: (n, K), a row for each of labels.test; fit: what is to be
    told of the fitting."""

    fraction: float
    seed: int
    labels: Labels
    probabilities: np.ndarray = field(repr=False)
    fit: dict[str, Any]


def write_predictions(folder: Path, reader: ShardReader, known: LabelledSet, cells: Sequence[Cell]) -> None:
    """predictions.parquet: fraction, seed, id, key, group, label, prediction, probabilities (K), cell after cell."""
    tables = []
    for cell in cells:
        count, flat = len(cell.labels.test), pa.array(cell.probabilities.ravel())
        rows = rows_of(reader.manifest, cell.labels.test)
        columns = {
            "fraction": pa.array(np.full(count, cell.fraction)),
            "seed": pa.array(np.full(count, cell.seed, np.int64)),
            **{name: rows[name] for name in ("id", "key", "group")},
            "label": pa.array(known.labels[cell.labels.test]),
            "prediction": pa.array(cell.probabilities.argmax(1)),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, cell.probabilities.shape[1]),
        }
        tables.append(pa.table(columns))
    with replacing(folder / PREDICTIONS_NAME) as partial:
        pq.write_table(pa.concat_tables(tables).unify_dictionaries(), partial)


def judged(known: LabelledSet, cells: Sequence[Cell], *, draws: int) -> dict[str, Any]:
    """`cells` and `summary` of result.json: each cell's figures, and for each fraction their mean, deviation and interval."""
    described: list[dict[str, Any]] = []
    drawn = []
    for cell in cells:
        truth, groups = known.labels[cell.labels.test], known.groups[cell.labels.test]
        sampled = bootstrap(cell.probabilities, truth, groups if (groups >= 0).any() else None, draws=draws)
        drawn.append(sampled)
        described.append(
            {
                "fraction": cell.fraction,
                "seed": cell.seed,
                "labels": len(cell.labels.used),
                "test_patches": len(truth),
                "metrics": score(cell.probabilities, truth),
                "intervals": {name: _interval(sampled[name]) for name in METRICS},
                "fit": cell.fit,
            }
        )
    summary = []
    for fraction in dict.fromkeys(cell.fraction for cell in cells):
        own = [place for place, cell in enumerate(cells) if cell.fraction == fraction]
        first = cells[own[0]].labels.test
        same_test = all(np.array_equal(first, cells[place].labels.test) for place in own)
        figures = {}
        for name in METRICS:
            mean, deviation = mean_and_deviation([described[place]["metrics"][name] for place in own])
            # Seeds that are judged on tests of their own have no draws in common.
            low, high = _interval(combine([drawn[place] for place in own])[name]) if same_test else (None, None)
            figures[name] = {"mean": mean, "std": deviation, "low": low, "high": high}
        groups = known.groups[first]
        summary.append(
            {
                "fraction": fraction,
                "labels": described[own[0]]["labels"],
                "seeds": len(own),
                "unit": "group" if (groups >= 0).any() else "patch",
                "units": count_units(groups, len(groups)),
                "metrics": figures,
            }
        )
    return {"cells": described, "summary": summary}


def _interval(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(bound) else float(bound) for bound in interval(values)]


def summary_lines(summary: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each fraction, for the console."""
    lines = []
    for row in summary:
        parts = []
        for name in ("accuracy", "balanced_accuracy", "auroc"):
            figure = row["metrics"][name]
            if figure["mean"] is None:
                continue
            deviation = "" if figure["std"] is None else f" ± {figure['std']:.3f}"
            bounds = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
            parts.append(f"{METRICS[name].title} {figure['mean']:.3f}{deviation}{bounds}")
        seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
        lines.append(f"{row['fraction']:.0%} of the labels ({row['labels']:,}{seeds}): {', '.join(parts)}")
    return lines
