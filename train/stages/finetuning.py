"""Evaluation by training all weights: fine-tuning, and the supervised baseline. Each fraction and seed has its own run."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from models.backbones import build_backbone
from models.heads import LinearHead
from models.weights import load_backbone_weights
from train.cluster.launcher import run_job
from train.config import EvaluateConfig
from train.records.data import Input, SetInput, cache_limit
from train.records.init_weights import StartingPoint
from train.records.json_files import read_json, replacing
from train.records.provenance import write_training_record
from train.records.runs import Run
from train.stages.feature_cache import FeaturePass, WorkerOptions, compute_parts, split_parts
from train.stages.label_sets import LabelledSet, LabelSplit
from train.stages.summary import SeedResult
from train.trainer.early_stopping import Validation
from train.trainer.loop import HEAD_NAME, Job
from train.trainer.methods import Supervised
from train.trainer.model_summary import describe_model, describe_rate
from train.trainer.progress import follow

_FEATURES_NAME = "test_features.npy"
_PEAKS = {"supervised": 1e-3, "finetune": 1e-4}


def check_learning_rate(config: EvaluateConfig) -> None:
    """Raises ValueError for a rate that is not above 0."""
    if config.learning_rate is not None and not 0 < config.learning_rate < math.inf:
        raise ValueError(f"--learning-rate {config.learning_rate:g}: give a rate above 0, or leave it out for the default")


def batch_size_of(config: EvaluateConfig, split: LabelSplit) -> int:
    """The configured batch size, but no more than there are training patches. Raises ValueError for fewer than 2 of them, which
    batch norm cannot take."""
    if len(split.train) < 2:
        raise ValueError(f"{len(split.train)} patch is left to train on: give a larger --fraction or --cap, or less --validation")
    return min(config.batch_size, len(split.train))


def train_and_predict(
    config: EvaluateConfig,
    fraction: float,
    seed: int,
    split: LabelSplit,
    *,
    run: Run,
    data: SetInput,
    known: LabelledSet,
    start: StartingPoint,
    key: str,
    say: Callable[[str], None],
) -> tuple[SeedResult, np.ndarray, str]:
    """Train in this run's folder, or resume there, and evaluate.

    data: the set; its ids are ignored. Returns the predictions, the test patches' features, and the device.
    """
    train = _subset(data, split.train, config)
    folder = run.folder
    run.fetch()
    job = _job(config, seed, split, train, run=run, data=data, known=known, start=start, key=key)
    with run.locked(key):
        write_training_record(folder, kind=config.mode, data=_subset(data, split.used, config), parent=start.parent)
    if not (folder / _FEATURES_NAME).exists():  # else it had finished before the run was interrupted
        model = describe_model(
            job.method,
            backbone=job.backbone,
            image_size=job.image_size,
            init=start.parent.source,
            weight_decay=job.weight_decay,
            optimizer=job.optimizer,
        )
        for line in [*model, describe_rate(job)]:
            say(line)
        with follow(run, steps=job.steps, title=folder.name, starting="starting", accuracy=job.method.accuracy):
            run_job(job, config.workers, config.gpus_per_worker, config.cpus_per_worker)
    device = read_json(folder / "engine.json", "remove this folder, and it is trained again")["device"]
    backbone = build_backbone(job.backbone, job.image_size)
    load_backbone_weights(backbone, folder)
    head = LinearHead(int(backbone.num_features), len(known.classes))  # type: ignore[arg-type]
    head.load_state_dict(torch.load(folder / HEAD_NAME, weights_only=True, map_location="cpu"))
    features = _test_features(config, backbone, data, split, start, folder)
    run.publish()
    with torch.no_grad():
        probabilities = torch.softmax(head.double()(torch.from_numpy(features).double()), dim=1).numpy()
    return (
        SeedResult(fraction, seed, split, probabilities, {"batch_size": job.batch_size} | _training_summary(run)),
        features,
        device,
    )


def _subset(data: SetInput, ids: np.ndarray, config: EvaluateConfig) -> Input:
    return Input((replace(data, ids=ids),), cache_bytes=cache_limit(config.cache_gib))


def _job(config, seed, split, train, *, run, data, known, start, key) -> Job:
    validation = None
    if len(split.validation):
        outputs = known.labels[split.validation]
        validation = Validation(_subset(data, split.validation, config), outputs, config.patience or None)
    codes = known.set_labels
    return Job.from_config(
        config,
        folder=run.folder,
        url=run.url,
        input=train,
        method=Supervised(classes=len(codes), labels=None if codes == tuple(range(len(codes))) else codes),
        backbone=start.architecture,
        init=start.parent.address,
        image_size=start.image_size,
        batch_size=batch_size_of(config, split),
        peak_learning_rate=_PEAKS[config.mode] if config.learning_rate is None else config.learning_rate,
        warmup_epochs=min(config.warmup_epochs, config.epochs / 10),
        seed=seed,
        compile=False,
        checkpoint_every=0,
        card={"method": config.mode, "chain": [*start.parent.chain, f"{config.mode} on {train.name}"], "key": key},
        validation=validation,
    )


def _test_features(config, backbone, data, split, start, folder) -> np.ndarray:
    """Features of the test patches from the trained weights, kept in the run's folder for when the run is resumed."""
    path = folder / _FEATURES_NAME
    if not path.exists():
        what = FeaturePass(backbone, data.shards, data.fingerprint, "eval", start.image_size, cache_limit(config.cache_gib))
        parts = split_parts(split.test)
        found = dict(compute_parts(what, parts, WorkerOptions.from_config(config), title="predictions"))
        with replacing(path) as partial, open(partial, "wb") as file:
            np.save(file, np.concatenate([found[place] for place in range(len(parts))]))
    return np.load(path)


def _training_summary(run: Run) -> dict[str, Any]:
    """Steps taken, and the epoch whose weights were kept."""
    rows = run.metrics()
    validated = [row for row in rows if row.get("validation_loss") is not None]
    if not validated:
        return {"steps": rows[-1]["step"]}
    best = min(validated, key=lambda row: row["validation_loss"])
    return {
        "steps": rows[-1]["step"],
        "best_epoch": best["epoch"] + 1,
        "epochs_run": validated[-1]["epoch"] + 1,
        "validation_log_loss": best["validation_loss"],
    }
