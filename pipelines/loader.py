"""The loader: shard set, selection, recipe and seed -> batches of views, resumable at any step on any world size."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.order import epoch_order, rank_slice, steps_per_epoch
from pipelines.recipes import Recipe
from pipelines.reference import reference_views
from pipelines.shards import ShardReader
from pipelines.views import ViewParameters, draw_views

# V views, B patches of this rank, S image size
BACKENDS = ("dali", "torchvision")


@dataclass(frozen=True)
class Batch:
    """views: (V, B, 3, S, S) float32, normalised; id: (B,) int64 patch ids; label: (B,) int64, -1 where unlabelled.

    views are on the loader's device, id and label on the CPU.
    """

    views: torch.Tensor
    id: torch.Tensor
    label: torch.Tensor


class ViewLoader:
    """Iterating gives the rest of the current epoch, then stands at the start of the next one.

    The whole state is (epoch, step): pixels and order are functions of (seed, epoch, ids), so a loader with another batch
    size, thread count or world size reads the same views, and a restart at (epoch, step) reads what would have come.

    shards: folder of a shard set, or an open ShardReader; ids: (n,) patch ids to read (see sharding.selection).
    batch_size: of the global batch; rank r of world_size reads its part of each.
    shuffle: a new order per epoch, or the order of the ids; drop_last: leave out an incomplete last batch.
    backend: "dali", or "torchvision" for the slow reference with the same draws. device: "cpu" or "cuda".
    Raises ValueError for no ids, ids that the set does not have, a batch that does not divide by the ranks or is larger
    than the selection, and, while iterating, for a shard that changed or cannot be decoded.
    """

    def __init__(
        self,
        shards: str | Path | ShardReader,
        ids: np.ndarray,
        *,
        batch_size: int,
        image_size: int,
        recipe: Recipe,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        backend: str = "dali",
        shuffle: bool = True,
        drop_last: bool = True,
        threads: int | None = None,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        self.reader = shards if isinstance(shards, ShardReader) else ShardReader(shards)
        self.ids = np.asarray(ids, np.int64)
        self.batch_size, self.image_size, self.recipe, self.seed = batch_size, image_size, recipe, seed
        self.rank, self.world_size, self.device, self.backend = rank, world_size, device, backend
        self.shuffle, self.drop_last = shuffle, drop_last
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) // world_size)
        self._check()
        self.epoch = self.step = 0
        self.wait_seconds = 0.0
        self._graph: Any = None  # a DaliGraph, made at the first use

    def _check(self):
        if len(self.ids) == 0:
            raise ValueError(f"{self.reader.folder}: no patch is selected")
        if self.ids.min() < 0 or self.ids.max() >= len(self.reader):
            wrong = self.ids.min() if self.ids.min() < 0 else self.ids.max()
            raise ValueError(f"{self.reader.folder}: has patches 0 to {len(self.reader) - 1}, not {wrong}")
        if self.batch_size < 1 or (self.drop_last and self.batch_size % self.world_size):
            raise ValueError(
                f"batch size {self.batch_size} is the global batch and must divide by the {self.world_size} workers;"
                f" try {max(1, round(self.batch_size / self.world_size)) * self.world_size}"
            )
        if self.drop_last and self.batch_size > len(self.ids):
            raise ValueError(
                f"batch size {self.batch_size} is larger than the {len(self.ids)} selected patches of {self.reader.folder};"
                " choose a smaller batch or a larger selection"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"no backend is called {self.backend!r}: choose one of {', '.join(BACKENDS)}")

    def __len__(self) -> int:
        """Steps in an epoch."""
        return steps_per_epoch(len(self.ids), self.batch_size, drop_last=self.drop_last)

    def state_dict(self) -> dict:
        """Where the consumer stands: the next batch is (epoch, step)."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; iterate anew afterwards."""
        assert 0 <= state["step"] <= len(self), (state, len(self))
        self.epoch, self.step = state["epoch"], state["step"]

    def parameters(self, ids: np.ndarray) -> ViewParameters:
        """What is drawn for these patches in the current epoch."""
        return draw_views(ids, seed=self.seed, epoch=self.epoch, recipe=self.recipe, sizes=self.reader.sizes[ids])

    def batch_ids(self, step: int) -> np.ndarray:
        """The patches of this rank at a step of the current epoch."""
        return rank_slice(self._order(), step, self.batch_size, rank=self.rank, world_size=self.world_size)

    def _order(self):
        return epoch_order(self.ids, seed=self.seed, epoch=self.epoch) if self.shuffle else self.ids

    def __iter__(self) -> Iterator[Batch]:
        order = self._order()
        parts = {
            step: rank_slice(order, step, self.batch_size, rank=self.rank, world_size=self.world_size)
            for step in range(self.step, len(self))
        }
        plan = {step: ids for step, ids in parts.items() if len(ids)}  # a batch smaller than the world has nothing for some
        make = self._dali_views if self.backend == "dali" else self._reference_views
        for (step, ids), views in zip(plan.items(), make(list(plan.values())), strict=True):
            # Set before the batch is handed out: a checkpoint taken while it is in use says what comes next.
            self.step = step + 1
            yield Batch(views, torch.from_numpy(ids), torch.from_numpy(self.reader.labels[ids]))
        self.epoch, self.step = self.epoch + 1, 0

    def _reference_views(self, plan):
        for ids in plan:
            started = time.perf_counter()
            views = reference_views(self.reader.read(ids), self.parameters(ids), recipe=self.recipe, image_size=self.image_size)
            self.wait_seconds += time.perf_counter() - started
            yield views.to(self.device)

    def _dali_views(self, plan):
        from pipelines.graph import AHEAD, DaliGraph

        try:
            while self._graph and self._graph.pending:  # of an iteration that was left early
                self._graph.get()
        except RuntimeError:  # a patch that cannot be decoded: said when it is read again
            self._graph = None
        if self._graph is None:
            largest = -(-self.batch_size // self.world_size)
            self._graph = DaliGraph(
                recipe=self.recipe,
                batch_size=largest,
                image_size=self.image_size,
                device=self.device,
                threads=self.threads,
            )
        graph = self._graph
        for k, ids in enumerate(plan):
            started = time.perf_counter()
            for ahead in range(k + graph.pending, min(k + AHEAD, len(plan))):
                self._put(graph, plan[ahead])
            try:
                views = graph.get()
            except RuntimeError as error:
                self._graph = None
                self.reader.check(np.concatenate(plan[k : k + AHEAD]))
                raise ValueError(
                    f"{self.reader.folder}: DALI cannot make views of the batch with patches {ids[:4].tolist()} ...,"
                    f" though its bytes are as the manifest says: {error}"
                ) from error
            self.wait_seconds += time.perf_counter() - started
            yield views

    def _put(self, graph, ids):
        graph.put(self.reader.read(ids), self.parameters(ids))
