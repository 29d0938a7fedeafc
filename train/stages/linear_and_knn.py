"""Evaluation of frozen features: the linear protocol and k nearest neighbours."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.backbones import build_backbone
from models.weights import apply_init
from train.config import EvaluateConfig
from train.records.init_weights import StartingPoint
from train.scoring.knn import knn_probabilities
from train.scoring.linear_heads import PROTOCOLS, HeadTask, train_heads
from train.scoring.logistic import fit_with_validation
from train.stages.feature_cache import FeaturePass, WorkerOptions, frozen_features
from train.stages.label_sets import LabelSplit
from train.stages.summary import SeedResult

TEMPERATURE = 0.07  # of the neighbours' votes, as Wu et al. 2018


@dataclass(frozen=True)
class Features:
    """Features of some patches of a set. values: (n, F) float32; rows: (N,) by patch id, -1 for patches without features."""

    values: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """(n,) the rows of these patches."""
        rows = self.rows[ids]
        assert (rows >= 0).all(), "a patch without features"
        return rows


def init_backbone(start: StartingPoint, seed: int) -> tuple[torch.nn.Module, list[str]]:
    """The backbone to evaluate, and how its weights were initialised. Random weights depend on the seed alone."""
    torch.manual_seed(seed)
    backbone = build_backbone(start.architecture, start.image_size)
    return backbone, apply_init(backbone, start.architecture, start.parent.source)


def split_features(
    what: FeaturePass, splits: dict[str, np.ndarray], patches: int, options: WorkerOptions, cache: Path
) -> Features:
    """Features of the splits' patches, each split kept for itself, so that every fraction, seed and later run finds it.

    splits: name -> ids, without a patch in two; patches: of the whole set.
    """
    rows = np.full(patches, -1, np.int64)
    values: list[np.ndarray] = []
    for name, ids in splits.items():
        assert (rows[ids] < 0).all(), f"patches of {name} are also of another split"
        rows[ids] = np.arange(len(ids)) + sum(len(part) for part in values)
        values.append(frozen_features(what, ids, options, cache=cache, title=f"features of {name}"))
    return Features(np.concatenate(values), rows)


def evaluate_frozen(
    config: EvaluateConfig, features: Features, labels: np.ndarray, classes: int, splits: Sequence[tuple[float, int, LabelSplit]]
) -> list[SeedResult]:
    """Fit a classifier for each fraction and seed, and predict the test patches. labels: (N,) by patch id."""
    if config.mode == "knn":
        found = [_evaluate_knn(config, features, labels, classes, split) for *_, split in splits]
    else:
        by_row = np.full(len(features.values), -1)
        by_row[features.rows[features.rows >= 0]] = labels[features.rows >= 0]
        if config.protocol == "lbfgs":
            found = [_evaluate_logistic(features, by_row, classes, split) for *_, split in splits]
        else:
            found = _evaluate_trained_heads(config, features, by_row, classes, splits)
    return [
        SeedResult(fraction, seed, split, probabilities, fit)
        for (fraction, seed, split), (probabilities, fit) in zip(splits, found, strict=True)
    ]


def _evaluate_knn(config, features, labels, classes, split):
    count = min(config.neighbours, len(split.used))
    probabilities = knn_probabilities(
        features.values[features.of(split.used)],
        labels[split.used],
        features.values[features.of(split.test)],
        classes=classes,
        neighbours=count,
        temperature=TEMPERATURE,
    )
    return probabilities, {"neighbours": count, "temperature": TEMPERATURE}


def _evaluate_logistic(features, by_row, classes, split) -> tuple[np.ndarray, dict[str, Any]]:
    head, losses = fit_with_validation(
        features.values,
        by_row,
        train=features.of(split.train),
        validation=features.of(split.validation),
        used=features.of(split.used),
        classes=classes,
    )
    fit = {"decay": head.decay, "validation_log_loss": {f"{decay:g}": loss for decay, loss in losses.items()}}
    return head.probabilities(features.values[features.of(split.test)]), fit


def _evaluate_trained_heads(config, features, by_row, classes, splits) -> list[tuple[np.ndarray, dict[str, Any]]]:
    tasks = [HeadTask(features.of(split.train), features.of(split.validation), seed) for _, seed, split in splits]
    protocol = dataclasses.replace(PROTOCOLS[config.protocol], head=config.head)
    heads = train_heads(features.values, by_row, tasks, classes=classes, protocol=protocol)
    found = []
    for head, (*_, split) in zip(heads, splits, strict=True):
        fit = {
            "protocol": dataclasses.asdict(protocol),
            "best_epoch": head.best_epoch,
            "epochs_run": head.epochs_run,
            "validation_log_loss": float(head.validation_loss[head.best_epoch - 1]),
        }
        found.append((head.probabilities(features.values[features.of(split.test)]), fit))
    return found
