"""The input of a stage: a shard set or a mixture of several, each in a folder or at a URL."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipelines.mixture import Mixture, Part
from pipelines.recipes import describe_recipe, get_recipe
from pipelines.remote_folder import is_url
from pipelines.shard_cache import RemoteSet
from pipelines.shard_reader import ShardReader
from sharding.build_config import packed_by
from sharding.manifest import fingerprint


@dataclass(frozen=True)
class SetInput:
    """Patches of one shard set. shards: its absolute folder or URL; fingerprint: of its content; ids: (n,) int64; weight:
    relative to the other sets; packed_by: the commands that pack it."""

    shards: str
    fingerprint: str
    ids: np.ndarray = field(repr=False)
    weight: float = 1.0
    packed_by: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, shards: str, reader: ShardReader, ids: np.ndarray, weight: float = 1.0) -> "SetInput":
        """shards: as the user gave it; reader: of the set or of a copy of it."""
        place = place_of(shards)
        return cls(place, fingerprint(reader.folder), ids, weight, tuple(packed_by(reader.folder, place)))


@dataclass(frozen=True)
class Input:
    """All data that a stage learns from. It is sent to every worker, and each opens it.

    window: the order is shuffled within this many shards at a time, None: within all; cache_bytes: the limit of each node's
    cache of sets at URLs.
    """

    sets: tuple[SetInput, ...]
    window: int | None = None
    cache_bytes: int | None = None

    @property
    def patches(self) -> int:
        """The number of patches in an epoch."""
        return sum(len(each.ids) for each in self.sets)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of a single set; for a mixture, all fingerprints and weights."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        return " + ".join(f"{each.weight!r} x {each.fingerprint}" for each in self.sets)

    @property
    def name(self) -> str:
        """The sets' names without their folders."""
        return " + ".join(PurePosixPath(each.shards).name for each in self.sets)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[ShardReader | Mixture, np.ndarray]]:
        """What ViewLoader reads, and the ids for it. All files are closed when the block ends.

        Raises ValueError if a set cannot be read, or has changed since the ids were chosen.
        """
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(open_set(each.shards, self.cache_bytes)) for each in self.sets]
            for each, reader in zip(self.sets, readers, strict=True):
                if fingerprint(reader.folder) != each.fingerprint:
                    raise ValueError(
                        f"{each.shards}: this is not the shard set that the run started with (its fingerprint differs): it has"
                        " changed, or this node has another copy; restore it and run the command again"
                    )
            if len(self.sets) == 1:
                yield readers[0], self.sets[0].ids
            else:
                parts = zip(readers, self.sets, strict=True)
                mixture = Mixture([Part(reader, each.ids, each.weight) for reader, each in parts])
                yield mixture, mixture.ids

    def describe_sets(self) -> list[dict[str, Any]]:
        """The model card's entry: for each set its name without the folder, its fingerprint, weight and number of patches."""
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
        """The `input` entry of run.json: enough to show any batch again.

        selection: the keyword arguments of `select` that chose the ids; recipe: its name; batch_size: patches of a global
        batch, None for a stage without training steps.
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
    """A reader of the set in a folder or at a URL, which is closed at the end of the block."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(RemoteSet(shards, limit_bytes=cache_bytes)) if is_url(shards) else shards
        yield stack.enter_context(contextlib.closing(ShardReader(source)))


def place_of(shards: str) -> str:
    """The set's absolute folder or its URL: Ray's workers run in another working directory."""
    return shards.rstrip("/") if is_url(shards) else str(Path(shards).absolute())


def parse_mix(mix: Sequence[str]) -> list[tuple[str, float]]:
    """Sets and weights of --mix SHARDS=WEIGHT, split at the last "=". Raises ValueError for anything else."""
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


def cache_limit(cache_gib: float | None) -> int | None:
    """--cache-gib in bytes. Raises ValueError unless it is above 0 and finite."""
    if cache_gib is None:
        return None
    if not 0 < cache_gib < float("inf"):
        raise ValueError(f"--cache-gib {cache_gib:g}: give a size above 0, or leave it out for no limit")
    return int(cache_gib * 2**30)
