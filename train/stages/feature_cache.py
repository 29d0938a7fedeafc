"""The feature cache: features of a set by a frozen backbone, computed in parts on any number of workers, and only once."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from torch import nn

from models.weights import weights_hash
from pipelines.recipes import describe_recipe, get_recipe
from sharding.manifest import fingerprint
from train.cluster.launcher import map_on_workers
from train.config import EmbedConfig, EvaluateConfig
from train.records.data import open_set
from train.records.json_files import replacing
from train.scoring.features import compute_features

# Raise when the same backbone, data and recipe would give other features.
FEATURES_VERSION = 3
PART = 8192  # patches: what a worker does at a time, and what is lost when it dies


@dataclass(frozen=True)
class FeaturePass:
    """What is computed, as plain data that travels to every worker.

    shards: the set's folder or URL; fingerprint: of its content; recipe: its name, of one view and nothing random.
    """

    backbone: nn.Module = field(repr=False)
    shards: str
    fingerprint: str
    recipe: str
    image_size: int
    cache_bytes: int | None = None


@dataclass(frozen=True)
class WorkerOptions:
    """On which workers: see launcher.map_on_workers."""

    workers: str | int = 0
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 0
    threads: int | None = None

    @classmethod
    def from_config(cls, config: EvaluateConfig | EmbedConfig) -> Self:
        return cls(config.workers, config.gpus_per_worker, config.cpus_per_worker, config.threads or None)


def frozen_features(
    what: FeaturePass, ids: np.ndarray, options: WorkerOptions, *, cache: Path, title: str = "features"
) -> np.ndarray:
    """Features of these patches by the backbone in eval mode: (n, F) float32, in the order of ids.

    cache: a folder; parts that were computed before for the same weights, data, recipe, size and ids are read from there.
    The backbone's weights and statistics are the same afterwards, which is checked by their hash.
    """
    parts = split_parts(ids)
    weights = weights_hash(what.backbone)
    paths = [cache / f"{_key(what, weights, part)}.npy" for part in parts]
    missing = [place for place, path in enumerate(paths) if not path.exists()]
    for done, features in compute_parts(what, [parts[place] for place in missing], options, title=title):
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(paths[missing[done]]) as partial, open(partial, "wb") as file:
            np.save(file, features)
    return np.concatenate([np.load(path) for path in paths])


def split_parts(ids: np.ndarray) -> list[np.ndarray]:
    """The ids in parts of PART, in their order."""
    return [ids[start : start + PART] for start in range(0, len(ids), PART)]


def compute_parts(
    what: FeaturePass, parts: list[np.ndarray], options: WorkerOptions, *, title: str
) -> Iterator[tuple[int, np.ndarray]]:
    """The place and the features, (n, F) float32, of each part as it is done."""
    before = weights_hash(what.backbone)
    titles = [f"{title}, part {place + 1} of {len(parts)}" if len(parts) > 1 else title for place in range(len(parts))]
    items = list(zip(parts, titles, strict=True))
    sets = [(what.shards, what.fingerprint)]
    for place, (features, after) in map_on_workers(_one_part, what, items, sets=sets, **dataclasses.asdict(options)):
        assert before == after, "the backbone changed while it should have been frozen"
        yield place, features


def _one_part(what: FeaturePass, item: tuple[np.ndarray, str], device: str, threads: int) -> tuple[np.ndarray, str]:
    """The features, and the hash of the backbone that they were computed by."""
    ids, title = item
    with open_set(what.shards, what.cache_bytes) as reader:
        if fingerprint(reader.folder) != what.fingerprint:
            raise ValueError(
                f"{what.shards}: this is not the shard set that the command started with (its fingerprint differs): it has"
                " changed, or this node has another copy; restore it and run the command again"
            )
        features = compute_features(
            what.backbone,
            reader,
            ids,
            recipe=get_recipe(what.recipe),
            image_size=what.image_size,
            device=device,
            threads=threads or None,
            title=title,
        )
    return features, weights_hash(what.backbone)


def _key(what: FeaturePass, weights: str, ids: np.ndarray) -> str:
    decides = {
        "version": FEATURES_VERSION,
        "weights": weights,
        "data": what.fingerprint,
        "recipe": describe_recipe(get_recipe(what.recipe)),
        "image_size": what.image_size,
        "ids": hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
