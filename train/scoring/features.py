"""Compute the features of patches with a frozen backbone."""

import time

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture
from pipelines.recipes import Recipe
from pipelines.shard_reader import ShardReader

_BATCH = 128


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

    recipe: one view, nothing random. device: "cpu" or "cuda", where the backbone runs; None: a GPU if there is one.
    title: of the bar and of the line that says how fast it went; None for neither.
    """
    assert not recipe.is_random and recipe.views == 1, recipe
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
    parts, started = [], time.perf_counter()
    console = Console()
    with loader, Progress(console=console, transient=True, disable=title is None or not console.is_terminal) as progress:
        task = progress.add_task(title or "", total=len(ids))
        for batch in loader:
            parts.append(backbone(batch.views[0].to(dtype)).float().cpu().numpy())
            progress.advance(task, len(batch.id))
        waited = loader.wait_seconds
    if title is not None:
        seconds = time.perf_counter() - started
        print(f"{title}: {len(ids):,} patches, {len(ids) / seconds:,.0f} patches/s, data wait {waited / seconds:.0%}", flush=True)
    return np.concatenate(parts)
