"""From predictions to the table of a paper: metrics and intervals for each fraction and seed, and their summary over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shard_reader import ShardReader
from train.records.json_files import replacing
from train.scoring.bootstrap import bootstrap, combine, count_units, interval, mean_and_deviation
from train.scoring.metrics import METRICS, score
from train.stages.label_sets import LabelledSet, LabelSplit

PREDICTIONS_NAME = "predictions.parquet"


@dataclass(frozen=True)
class SeedResult:
    """The predictions for one fraction of the labels and one seed. probabilities: (n, K), a row for each of split.test; fit: how
    the classifier was fitted, for the record."""

    fraction: float
    seed: int
    split: LabelSplit
    probabilities: np.ndarray = field(repr=False)
    fit: dict[str, Any]


def write_predictions(folder: Path, reader: ShardReader, known: LabelledSet, results: Sequence[SeedResult]) -> None:
    """predictions.parquet: fraction, seed, id, key, group, label, prediction, probabilities (K)."""
    tables = []
    for one in results:
        count, flat = len(one.split.test), pa.array(one.probabilities.ravel())
        rows = reader.manifest.select(["id", "key", "group"]).take(pa.array(one.split.test))
        columns = {
            "fraction": pa.array(np.full(count, one.fraction)),
            "seed": pa.array(np.full(count, one.seed, np.int64)),
            **{name: rows[name] for name in ("id", "key", "group")},
            "label": pa.array(known.labels[one.split.test]),
            "prediction": pa.array(one.probabilities.argmax(1)),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, one.probabilities.shape[1]),
        }
        tables.append(pa.table(columns))
    with replacing(folder / PREDICTIONS_NAME) as partial:
        pq.write_table(pa.concat_tables(tables).unify_dictionaries(), partial)


def summarise(known: LabelledSet, results: Sequence[SeedResult], *, draws: int) -> dict[str, Any]:
    """`cells` and `summary` of result.json: metrics by fraction and seed, and their mean, deviation and interval."""
    described: list[dict[str, Any]] = []
    drawn = []
    for one in results:
        truth, groups = known.labels[one.split.test], known.groups[one.split.test]
        sampled = bootstrap(one.probabilities, truth, groups if (groups >= 0).any() else None, draws=draws)
        drawn.append(sampled)
        described.append(
            {
                "fraction": one.fraction,
                "seed": one.seed,
                "labels": len(one.split.used),
                "test_patches": len(truth),
                "metrics": score(one.probabilities, truth),
                "intervals": {name: _interval(sampled[name]) for name in METRICS},
                "fit": one.fit,
            }
        )
    summary = []
    for fraction in dict.fromkeys(one.fraction for one in results):
        same = [place for place, one in enumerate(results) if one.fraction == fraction]
        first = results[same[0]].split.test
        same_test = all(np.array_equal(first, results[place].split.test) for place in same)
        metrics = {}
        for name in METRICS:
            mean, deviation = mean_and_deviation([described[place]["metrics"][name] for place in same])
            # Seeds with different test patches have no draws in common.
            low, high = _interval(combine([drawn[place] for place in same])[name]) if same_test else (None, None)
            metrics[name] = {"mean": mean, "std": deviation, "low": low, "high": high}
        groups = known.groups[first]
        summary.append(
            {
                "fraction": fraction,
                "labels": described[same[0]]["labels"],
                "seeds": len(same),
                "unit": "group" if (groups >= 0).any() else "patch",
                "units": count_units(groups, len(groups)),
                "metrics": metrics,
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
            metric = row["metrics"][name]
            if metric["mean"] is None:
                continue
            deviation = "" if metric["std"] is None else f" ± {metric['std']:.3f}"
            bounds = "" if metric["low"] is None else f" [{metric['low']:.3f}, {metric['high']:.3f}]"
            parts.append(f"{METRICS[name].title} {metric['mean']:.3f}{deviation}{bounds}")
        seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
        lines.append(f"{row['fraction']:.0%} of the labels ({row['labels']:,}{seeds}): {', '.join(parts)}")
    return lines
