"""The data loader: shard set, ids, recipe and seed -> batches of views, resumable at any step with any world size."""

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.mixture import Mixture
from pipelines.recipes import Recipe
from pipelines.replacements import Replacements
from pipelines.sampler import Order, by_first_use, epoch_order, rank_slice, steps_per_epoch
from pipelines.shard_reader import ShardReader, check_ids
from pipelines.torchvision_reference import reference_views
from pipelines.views import ViewParameters, draw_views
from pipelines.wait_timer import WaitClock

# V views, B patches of this rank, S image size
BACKENDS = ("dali", "torchvision")


@dataclass(frozen=True)
class Batch:
    """views: (V, B, 3, S, S), normalised; id: (B,) int64 ids of the patches shown; label: (B,) int64, -1 where unlabelled.

    views are on the loader's device and of its dtype, id and label on the CPU. B may be 0, in an incomplete last batch.
    """

    views: torch.Tensor
    id: torch.Tensor
    label: torch.Tensor


class ViewLoader:
    """Iterating yields the rest of the current epoch; the loader is then at the start of the next.

    Its whole state is (epoch, step): pixels and order are functions of (seed, epoch, ids). So views do not depend on batch size,
    thread count or world size, and a restart at (epoch, step) continues exactly.

    shards: folder or URL of a shard set, an open ShardReader, or a Mixture; ids: (n,) patch ids to read (see
    sharding.selection; for a mixture, its `ids`).
    batch_size: the global batch; rank r of world_size reads its part of each.
    shuffle: a new order per epoch, else the order of the ids; window: shuffle within this many shards at a time, for sets larger
    than the page cache (see sampler.epoch_order); None shuffles all patches together.
    drop_last: drop an incomplete last batch. Otherwise every rank gets a batch at every step, possibly empty, so that collective
    operations do not hang.
    backend: "dali", or "torchvision" for the slow reference with the same draws. device: "cpu" or "cuda", torch's current GPU.
    dtype: of the views, converted from float32 at the end; channels_last: memory layout of the views (torch.channels_last, also
    after `views.flatten(0, 1)`).
    replace_damaged: read another patch for a damaged one (see Replacements); `damaged` has their ids.
    On a GPU, rank 0 warns once of patches that the CPU has to decode (PNG and rarer kinds of JPEG).
    Raises ValueError without ids, for ids that the set does not have, for a batch that the ranks do not divide or that is larger
    than the selection, and, while iterating, for a shard that changed or cannot be decoded.
    A context manager; or call `close`.
    """

    def __init__(
        self,
        shards: str | Path | ShardReader | Mixture,
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
        window: int | None = None,
        drop_last: bool = True,
        threads: int | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        replace_damaged: bool = False,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        self._owns_reader = not isinstance(shards, ShardReader | Mixture)
        self.reader = shards if isinstance(shards, ShardReader | Mixture) else ShardReader(shards)
        self.ids = np.asarray(ids, np.int64)
        self.batch_size, self.image_size, self.recipe, self.seed = batch_size, image_size, recipe, seed
        self.rank, self.world_size, self.device, self.backend = rank, world_size, device, backend
        self.shuffle, self.window, self.drop_last = shuffle, window, drop_last
        self.dtype, self.channels_last = dtype, channels_last
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) // world_size)
        self._check()
        self._replacements = Replacements(self.reader, self.ids, seed) if replace_damaged else None
        self.epoch = self.step = 0
        self._wait = WaitClock(device)
        self._graph: Any = None  # a DaliGraph, made at the first use
        self._warned = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End DALI's threads, free its memory, and unmap the shards unless a reader was given. Iterating again reopens all."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        if self._owns_reader:
            self.reader.close()

    def _check(self):
        check_ids(self.ids, self.reader, self.reader.folder)
        if self.window is not None and self.window < 1:
            raise ValueError(f"a shuffling window of {self.window} shards is too small: give at least 1, or none to shuffle all")
        if self.batch_size < 1 or (self.drop_last and self.batch_size % self.world_size):
            raise ValueError(
                f"batch size {self.batch_size} is the global batch and must be divisible by the {self.world_size} workers;"
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

    @property
    def damaged(self) -> set[int]:
        """The ids of the patches that this rank found damaged and replaced."""
        return self._replacements.damaged if self._replacements else set()

    @property
    def wait_seconds(self) -> float:
        """Seconds that the consumer, or on a GPU the device, has waited for batches so far."""
        return self._wait.seconds

    def state_dict(self) -> dict:
        """The consumer's position: the next batch is (epoch, step)."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        """Set the position; start a new iteration afterwards. Raises ValueError for a position that the loader does not have."""
        if state["epoch"] < 0 or not 0 <= state["step"] <= len(self):
            raise ValueError(f"epoch {state['epoch']}, step {state['step']} is no position in epochs of {len(self)} steps")
        self.epoch, self.step = state["epoch"], state["step"]

    def parameters(self, ids: np.ndarray, epochs: np.ndarray | None = None, *, read: np.ndarray | None = None) -> ViewParameters:
        """The view parameters of these patches in the current epoch, or in `epochs` (n,), one for each patch.

        read: (n,) the patches that are read in their place.
        """
        keys, sizes = self.reader.draw_keys(ids), self.reader.sizes[ids if read is None else read]
        different = np.unique(epochs) if epochs is not None and len(epochs) else [self.epoch]
        if len(different) == 1:
            return draw_views(keys, seed=self.seed, epoch=int(different[0]), recipe=self.recipe, sizes=sizes)
        rows = [np.flatnonzero(epochs == epoch) for epoch in different]
        drawn = [
            draw_views(keys[some], seed=self.seed, epoch=int(epoch), recipe=self.recipe, sizes=sizes[some])
            for epoch, some in zip(different, rows, strict=True)
        ]
        back = np.argsort(np.concatenate(rows))
        columns = ([getattr(parameters, field.name) for parameters in drawn] for field in fields(ViewParameters))
        return ViewParameters(*(np.concatenate(column)[back] for column in columns))

    def batch_ids(self, step: int) -> np.ndarray:
        """This rank's patches at a step of the current epoch."""
        return rank_slice(self._order().ids, step, self.batch_size, rank=self.rank, world_size=self.world_size)

    def shards_of(self, order: Order, steps: range) -> np.ndarray:
        """The shards that these global batches read, in order of first use."""
        return by_first_use(self.reader.shards[order.ids[steps.start * self.batch_size : steps.stop * self.batch_size]])

    def _order(self) -> Order:
        if self.shuffle and isinstance(self.reader, Mixture):
            return self.reader.epoch_order(self.ids, seed=self.seed, epoch=self.epoch, window=self.window)
        ids = self.ids
        if self.shuffle:
            shards = None if self.window is None else self.reader.shards[ids]
            ids = epoch_order(ids, seed=self.seed, epoch=self.epoch, shards=shards, window=self.window)
        return Order(ids, np.broadcast_to(np.int64(self.epoch), len(ids)))

    def __iter__(self) -> Iterator[Batch]:
        order, steps = self._order(), range(self.step, len(self))
        make = self._dali_views if self.backend == "dali" else self._reference_views
        for step, (ids, views) in zip(steps, make(self._rank_batches(order, steps)), strict=True):
            # Set before the batch is yielded, so that a checkpoint during its use points to the next one.
            self.step = step + 1
            yield Batch(views, torch.from_numpy(ids), torch.from_numpy(self.reader.labels[ids]))
        self.epoch, self.step = self.epoch + 1, 0

    def _rank_batches(self, order: Order, steps: range) -> Iterator[Order]:
        """This rank's part of each step. Announces upcoming shards to the reader on the way."""
        every = len(steps)
        if self.window is not None:
            # About the number of steps in a window. Two windows are announced: one in use, one being downloaded.
            every = max(1, self.window * len(order.ids) // (int(self.reader.shards.max()) + 1) // self.batch_size)
        for step in steps:
            if (step - steps.start) % every == 0:
                self.reader.expect(self.shards_of(order, range(step, step + 2 * every)))
            yield order.part(step, self.batch_size, rank=self.rank, world_size=self.world_size)

    def _empty_views(self) -> torch.Tensor:
        return torch.empty((self.recipe.views, 0, 3, self.image_size, self.image_size), device=self.device)

    def _convert(self, views_VBCSS: torch.Tensor) -> torch.Tensor:
        views_VBCSS = views_VBCSS.to(self.device, self.dtype)
        if self.channels_last:
            views_VBCSS = views_VBCSS.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        return views_VBCSS

    def _read(self, part: Order) -> tuple[np.ndarray, list[np.ndarray], ViewParameters]:
        """The ids of the patches that are read for a rank's part, their bytes, and their parameters."""
        read = self._replacements.read_for(*part) if self._replacements else part.ids
        return read, self.reader.read(read), self.parameters(*part, read=read)

    def _reference_views(self, parts: Iterable[Order]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for part in parts:
            with self._wait.waiting():
                read, views = part.ids, self._empty_views()
                if len(read):
                    read, encoded, parameters = self._read(part)
                    views = reference_views(encoded, parameters, recipe=self.recipe, image_size=self.image_size)
                views = self._convert(views)
            yield read, views

    def _dali_views(self, parts: Iterable[Order]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        from pipelines.dali_graph import AHEAD

        graph = self._idle_graph()
        parts = iter(parts)
        in_flight: deque[np.ndarray] = deque()
        while True:
            with self._wait.waiting():
                while len(in_flight) < AHEAD and (part := next(parts, None)) is not None:
                    read = part.ids
                    if len(read):
                        read, encoded, parameters = self._read(part)
                        graph.put(encoded, parameters)
                    in_flight.append(read)
                if not in_flight:
                    return
                views = self._convert(self._next_views(graph, in_flight))
            yield in_flight.popleft(), views

    def _next_views(self, graph, in_flight: deque[np.ndarray]) -> torch.Tensor:
        if not len(in_flight[0]):
            return self._empty_views()
        try:
            return graph.get()
        except RuntimeError as error:
            graph.close()
            self._graph = None
            self.reader.check(np.concatenate(in_flight))
            raise ValueError(
                f"{self.reader.folder}: DALI cannot make views of the batch with patches {in_flight[0][:4].tolist()} ...,"
                f" although its bytes match the manifest: {error}"
            ) from error

    def _idle_graph(self):
        """The graph, with no batch in flight."""
        from pipelines.dali_graph import DaliGraph

        try:
            while self._graph and self._graph.pending:  # left by an unfinished iteration
                self._graph.get()
        except RuntimeError:  # a patch cannot be decoded: raised when it is read again
            self._graph.close()
            self._graph = None
        if self._graph is None or self._graph.is_closed:
            self._warn_of_cpu_decoding()
            self._graph = DaliGraph(
                recipe=self.recipe,
                batch_size=-(-self.batch_size // self.world_size),
                image_size=self.image_size,
                device=self.device,
                threads=self.threads,
            )
        return self._graph

    def _warn_of_cpu_decoding(self) -> None:
        """Warn once of patches that a GPU cannot decode."""
        if self.device == "cpu" or self.rank or self._warned:
            return
        self._warned = True
        if by_cpu := self.reader.decoders(self.ids).get("CPU"):
            warnings.warn(
                f"{self.reader.folder}: {by_cpu:,} of {len(self.ids):,} patches are of a kind that no GPU decodes, so the CPU"
                " decodes them (sharding/inspect_shards.py shows their kinds; build.py --encode jpeg:95 makes them JPEG)",
                stacklevel=2,
            )
