"""What a stage reads: a shard set or a mixture of several, each a folder or a URL, as plain data and opened."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipelines.mixture import Mixture, Part
from pipelines.recipes import describe_recipe, get_recipe
from pipelines.shard_cache import RemoteSet, is_remote
from pipelines.shard_reader import ShardReader
from sharding.build_config import packed_by
from sharding.manifest import fingerprint


@dataclass(frozen=True)
class SetInput:
    """Patches of one shard set. shards: its absolute folder or URL; fingerprint: of its content; ids: (n,) int64; weight:
    beside the other sets'; packed_by: the commands that pack it."""

    shards: str
    fingerprint: str
    ids: np.ndarray = field(repr=False)
    weight: float = 1.0
    packed_by: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, shards: str, reader: ShardReader, ids: np.ndarray, weight: float = 1.0) -> "SetInput":
        """shards: as a user gave it; reader: that has it, or a copy of it, open."""
        place = place_of(shards)
        return cls(place, fingerprint(reader.folder), ids, weight, tuple(packed_by(reader.folder, place)))


@dataclass(frozen=True)
class Input:
    """All that a stage learns from. It travels to every worker, each of which opens it for itself.

    window: within so many shards at a time the order is shuffled, None: all; cache_bytes: what the cache of sets at URLs may
    hold, on each node.
    """

    sets: tuple[SetInput, ...]
    window: int | None = None
    cache_bytes: int | None = None

    @property
    def patches(self) -> int:
        """In an epoch."""
        return sum(len(each.ids) for each in self.sets)

    @property
    def fingerprint(self) -> str:
        """Of the one set its own; of a mixture all of them, and their weights."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        return " + ".join(f"{each.weight!r} x {each.fingerprint}" for each in self.sets)

    @property
    def name(self) -> str:
        """The sets' names, without where they lie."""
        return " + ".join(PurePosixPath(each.shards).name for each in self.sets)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[ShardReader | Mixture, np.ndarray]]:
        """What ViewLoader reads, and the ids for it. Nothing of it stays open when the block ends.

        Raises ValueError where a set is not to be had, or is another one than when the ids were chosen.
        """
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(open_set(each.shards, self.cache_bytes)) for each in self.sets]
            for each, reader in zip(self.sets, readers, strict=True):
                if fingerprint(reader.folder) != each.fingerprint:
                    raise ValueError(
                        f"{each.shards}: this is not the shard set that the run began with (its fingerprint differs): it was"
                        " changed meanwhile, or this node has another copy; put it right and start again"
                    )
            if len(self.sets) == 1:
                yield readers[0], self.sets[0].ids
            else:
                parts = zip(readers, self.sets, strict=True)
                mixture = Mixture([Part(reader, each.ids, each.weight) for reader, each in parts])
                yield mixture, mixture.ids

    def describe_sets(self) -> list[dict[str, Any]]:
        """What a model card says of it: each set's name, without where it lies, its fingerprint, and what was chosen of it."""
        return [
            {
                "name": PurePosixPath(each.shards).name,
                "fingerprint": each.fingerprint,
                "patches": len(each.ids),
                "weight": each.weight,
            }
            for each in self.sets
        ]

    def describe(
        self, *, selection: dict[str, Any], recipe: str, image_size: int, seed: int, batch_size: int | None
    ) -> dict[str, Any]:
        """What run.json says of it: enough to show any batch again.

        selection: the keyword arguments of `select` that chose the ids; recipe: its name; batch_size: patches of a global
        batch, None where there are no steps of training.
        """
        described = {
            "sets": [
                {
                    "shards": each.shards,
                    "weight": each.weight,
                    "fingerprint": each.fingerprint,
                    "packed_by": list(each.packed_by),
                }
                for each in self.sets
            ],
            "selection": selection,
            "recipe": recipe,
            "recipe_fields": describe_recipe(get_recipe(recipe)),
            "image_size": image_size,
            "seed": seed,
        }
        return described if batch_size is None else described | {"batch_size": batch_size, "shuffle_window": self.window}


@contextlib.contextmanager
def open_set(shards: str, cache_bytes: int | None = None) -> Iterator[ShardReader]:
    """A reader of the set in a folder or at a URL, with all that it has open closed at the end."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(RemoteSet(shards, limit_bytes=cache_bytes)) if is_remote(shards) else shards
        yield stack.enter_context(contextlib.closing(ShardReader(source)))


def place_of(shards: str) -> str:
    """The set's absolute folder or its URL: Ray's workers have another working directory."""
    return shards.rstrip("/") if is_remote(shards) else str(Path(shards).absolute())


def parse_mix(mix: Sequence[str]) -> list[tuple[str, float]]:
    """Sets and weights of --mix SHARDS=WEIGHT, split at the last "=". Raises ValueError for what is none."""
    parsed = []
    for text in mix:
        shards, _, weight = text.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = float("nan")
        if not shards or not 0 < number < float("inf"):
            raise ValueError(f"--mix {text}: give SHARDS=WEIGHT, a shard set and a number above 0, such as shards/breast=0.5")
        parsed.append((shards, number))
    return parsed


def gib(cache_gib: float | None) -> int | None:
    """--cache-gib in bytes. Raises ValueError for what is no size."""
    if cache_gib is None:
        return None
    if not 0 < cache_gib < float("inf"):
        raise ValueError(f"--cache-gib {cache_gib:g}: give a size above 0, or leave it out to keep all that was fetched")
    return int(cache_gib * 2**30)
