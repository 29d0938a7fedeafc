"""Runs as train/stages/pretraining.py and train/stages/evaluation.py leave them, without the hours."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_reader import ShardReader
from sharding.selection import select
from train.config import PretrainConfig
from train.records.runs import Run, Stage
from train.reporting.gallery import write_gallery
from train.scoring.metrics import METRICS, score
from train.trainer.methods import METHODS

ODD = "R&D <i>신장 'a\" $x$ $y"  # what a folder may be called
ODD_CLASS = "종양 <script>alert(1)</script> &"
JPEG = b"\xff\xd8\xff not really"


def run_of(storage: Path, name: str, kind: str, result: dict, rows=(), *, data: str = "d" * 64) -> Run:
    """A finished run of that result, of the method that it is named after, or else SimCLR. rows: of metrics.jsonl."""
    shards = str(storage / "no shards")
    run = Run(storage / name)
    settings = {
        "method": name if name in METHODS else "simclr",
        "recipe": "simclr",
        "image_size": 64,
        "seed": 7,
        "backbone": "resnet18",
        "epochs": 3,
    }
    command = "python sharding/build.py '신장 <1>' --group-by slide --out 'no shards'"
    sets = [{"shards": shards, "weight": 1.0, "fingerprint": data, "packed_by": [command]}]
    recipe = "simclr" if kind == "pretrain" else "eval"
    reads = {"sets": sets, "recipe": recipe, "recipe_fields": describe_recipe(get_recipe(recipe)), "image_size": 64, "seed": 7}
    run.begin(Stage(kind, settings, data, "scratch"), PretrainConfig(data=shards, name=name, seed=7), reads)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.finish({"kind": kind, **result}, wall_seconds=61, device="2 x CPU")
    return run


def training_rows(measure: str, losses, **more) -> list[dict]:
    """Rows of metrics.jsonl, ten steps apart."""
    common = {"learning_rate": 0.1, measure: 0.5, "gradient_norm": 1.5} | more
    return [{"epoch": i, "step": 10 * i + 1, "loss": loss} | common for i, loss in enumerate(losses)]


def pretrained(storage: Path, name: str = "kidney", *, loss: float | None = 4.5, picture: bool = True, **changes) -> Run:
    result = {
        "chain": ["ImageNet", f"simclr on {name}"],
        "patches": 12345,
        "steps": 96,
        "final": {"loss": loss, "top1": 0.125},
        "nothing_learned_loss": 5.541,
        "patches_per_s": 36.4,
        "data_wait": 0.0123,
        "warnings": [],
    }
    run = run_of(storage, name, "pretrain", result | changes, training_rows("top1", [5.4, None, loss], embedding_std=0.9))
    if picture:
        said = f"patch 0\nclass 1, {ODD_CLASS}"
        pq.write_table(pa.table({"row": [0], "jpeg": [JPEG], "said": [said]}), run.folder / "views.parquet")
    return run


def judged(
    storage: Path,
    name: str = "linear",
    *,
    shards: Path | None = None,
    classes=("benign", ODD_CLASS, "in situ"),
    fractions=(1.0,),
    seeds=(42,),
    kind: str = "linear",
    skill: float = 1.0,
    rows=(),
    unit: str = "group",
    data: str = "d" * 64,
    **changes,
) -> Run:
    """A judged run. shards: a set whose test patches are shown too, with as many classes; skill: how good its figures are."""
    reader = ShardReader(shards) if shards else None
    ids = select(reader.manifest, split="test") if reader else np.arange(60)
    labels = reader.labels[ids] if reader else ids % len(classes)
    cells, predictions, shown = [], [], {}
    for fraction in fractions:
        for seed in seeds:
            drawn = np.random.default_rng([seed, round(1000 * fraction)])
            logits = drawn.normal(size=(len(ids), len(classes))) + skill * (1 + fraction) * np.eye(len(classes))[labels]
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            shown.setdefault(fraction, p)
            metrics = score(p, labels)
            cells.append(
                {
                    "fraction": fraction,
                    "seed": seed,
                    "labels": round(2000 * fraction),
                    "test_patches": len(ids),
                    "metrics": metrics,
                    "intervals": {title: [0.1, 0.2] for title in METRICS},
                    "fit": {},
                }
            )
            predictions.append(
                pa.table(
                    {
                        "fraction": np.full(len(ids), fraction),
                        "seed": np.full(len(ids), seed),
                        "id": ids,
                        "label": labels,
                        "prediction": p.argmax(1),
                        "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(p.ravel()), len(classes)),
                    }
                )
            )
    result = {
        "chain": ["simclr on kidney"],
        "architecture": "resnet18",
        "classes": list(classes),
        "split_rule": "trained on 'train', tested on 'test'",
        "warnings": ["no groups <are> known"],
        "notes": [],
        "cells": cells,
        "summary": [_summary(cells, fraction, unit) for fraction in fractions],
    }
    run = run_of(storage, name, kind, result | changes, rows, data=data)
    pq.write_table(pa.concat_tables(predictions), run.folder / "predictions.parquet")
    if reader:
        known = select(reader.manifest, split="train")
        drawn = np.random.default_rng(1)
        write_gallery(
            run.folder,
            reader,
            test=ids,
            test_features=drawn.normal(size=(len(ids), 8)).astype(np.float32),
            known=known,
            known_features=drawn.normal(size=(len(known), 8)).astype(np.float32),
            labels=reader.labels,
            probabilities=shown[max(fractions)],
            seed=7,
        )
        reader.close()
    return run


def _summary(cells, fraction, unit):
    own = [cell for cell in cells if cell["fraction"] == fraction]
    figures = {}
    for name in METRICS:
        values = [cell["metrics"][name] for cell in own]
        mean = float(np.mean(values))
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        figures[name] = {"mean": mean, "std": deviation, "low": mean - 0.05, "high": mean + 0.05}
    labels = own[0]["labels"]
    return {"fraction": fraction, "labels": labels, "seeds": len(own), "unit": unit, "units": 12, "metrics": figures}
