"""Features of patches by a frozen backbone, computed once and kept: the same backbone, data and recipe are never run twice."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from models.weights import weights_hash
from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture
from pipelines.recipes import Recipe, describe_recipe
from pipelines.shards import ShardReader
from sharding.manifest import fingerprint
from train.runs import replacing

# Raise when the same backbone, data and recipe would give other features.
FEATURES_VERSION = 2
_BATCH = 128


def frozen_features(
    backbone: nn.Module,
    reader: ShardReader,
    ids: np.ndarray,
    *,
    recipe: Recipe,
    image_size: int,
    cache: Path,
    threads: int | None = None,
    title: str = "features",
) -> np.ndarray:
    """Features of these patches by the backbone in eval mode: (n, F) float32, in the order of ids.

    cache: a folder; what was computed before for the same weights, data, recipe, size and ids is read from there.
    The backbone's weights and statistics are the same afterwards, which is checked by their hash.
    """
    assert not recipe.is_random and recipe.views == 1, recipe
    before = weights_hash(backbone)
    what = {
        "version": FEATURES_VERSION,
        "weights": before,
        "data": fingerprint(reader.folder),
        "recipe": describe_recipe(recipe),
        "image_size": image_size,
        "ids": hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest(),
    }
    path = cache / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]}.npy"
    if path.exists():
        return np.load(path)
    features = compute_features(backbone, reader, ids, recipe=recipe, image_size=image_size, threads=threads, title=title)
    assert weights_hash(backbone) == before, "the backbone changed while it should have been frozen"
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, features)
    return features


@torch.no_grad()
def compute_features(
    backbone: nn.Module,
    reader: ShardReader | Mixture,
    ids: np.ndarray,
    *,
    recipe: Recipe,
    image_size: int,
    device: str | None = None,
    threads: int | None = None,
    title: str | None = "features",
) -> np.ndarray:
    """Features of these patches, each exactly once: (n, F) float32, in the order of ids. The backbone is left in eval mode.

    device: "cpu" or "cuda", to which the backbone goes; None: a GPU where there is one. title: of the bar, None for no bar.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device).eval()
    dtype = next((parameter.dtype for parameter in backbone.parameters()), torch.float32)
    loader = ViewLoader(
        reader,
        ids,
        batch_size=min(_BATCH, len(ids)),
        image_size=image_size,
        recipe=recipe,
        seed=0,
        device=device,
        shuffle=False,
        window=1,  # ids are mostly in the order of the shards, and no more of them than these need be open or in a cache
        drop_last=False,
        threads=threads,
    )
    parts = []
    console = Console()
    with loader, Progress(console=console, transient=True, disable=title is None or not console.is_terminal) as progress:
        task = progress.add_task(title or "", total=len(ids))
        for batch in loader:
            parts.append(backbone(batch.views[0].to(dtype)).float().cpu().numpy())
            progress.advance(task, len(batch.id))
    return np.concatenate(parts)
