"""The inputs that determine the batches of a training, from the record of a run, so that any batch can be recomputed."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.mixture import Mixture, Part
from pipelines.recipes import RECIPES, Recipe, describe_recipe
from pipelines.remote_folder import MAX_JSON_BYTES, NotThere, RemoteFolder, is_url
from pipelines.shard_reader import ShardReader
from sharding.manifest import fingerprint
from sharding.selection import select


class InputSet(NamedTuple):
    """One shard set: its folder or URL, its weight relative to the others', and its fingerprint if known."""

    shards: str
    weight: float
    fingerprint: str | None


@dataclass(frozen=True)
class TrainingInput:
    """Everything that determines the batches of a training.

    selection: keyword arguments of sharding.selection.select; epochs: how many the training has, None for no limit.
    """

    name: str
    sets: list[InputSet]
    selection: dict[str, Any]
    recipe: str
    image_size: int
    batch_size: int
    shuffle_window: int | None
    seed: int
    epochs: int | None


@contextlib.contextmanager
def open_sets(training: TrainingInput) -> Iterator[Mixture]:
    """The selected patches of all sets. A mixture of one set reads what the set alone would give."""
    with contextlib.ExitStack() as stack:
        parts = []
        for shards, weight, expected in training.sets:
            reader = stack.enter_context(contextlib.closing(ShardReader(shards)))
            if expected is not None and fingerprint(reader.folder) != expected:
                raise ValueError(
                    f"{shards}: {training.name} was trained on another version of this set, whose fingerprint began with"
                    f" {expected[:8]}; restore it to see its patches"
                )
            parts.append(Part(reader, select(reader.manifest, **training.selection), weight))
        yield Mixture(parts)


def read_training_input(run: str | Path) -> TrainingInput:
    """The training input that a run's run.json records.

    Raises ValueError if there is no record, if the run took no training steps, and if its recipe has changed since.
    """
    path = f"{run}/run.json"
    try:
        record = json.loads(
            RemoteFolder(str(run)).read("run.json", 0, MAX_JSON_BYTES) if is_url(run) else Path(path).read_bytes()
        )
        if "input" not in record:
            raise ValueError(
                f"{path} was written by an older version, which did not record the input: give --data and its settings"
            )
        if "batch_size" not in record["input"]:
            raise ValueError(f"{path}: this run trained no backbone; give a run of pretraining or fine-tuning")
        return _from_record(str(run), record)
    except (FileNotFoundError, NotADirectoryError, NotThere):
        raise ValueError(f"{path}: no such file; give the folder of a run that train/ wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: this file is damaged; copy it again, or give --data and the run's settings") from error


def _from_record(name: str, record: dict[str, Any]) -> TrainingInput:
    found = record["input"]
    if change := _change_of_recipe(found["recipe"], found["recipe_fields"]):
        raise ValueError(f"{name}: its recipe {found['recipe']!r} {change}; use the code of commit {record['commit'][:10]}")
    return TrainingInput(
        name=name,
        sets=[InputSet(each["shards"], each["weight"], each["fingerprint"]) for each in found["sets"]],
        epochs=record["stage"]["config"]["epochs"],
        **{name: found[name] for name in ("selection", "recipe", "image_size", "batch_size", "shuffle_window", "seed")},
    )


def _change_of_recipe(name: str, then: dict[str, Any]) -> str | None:
    """How the recipe differs from its recorded fields, in words; None if it does not."""
    if name not in RECIPES:
        return "no longer exists"
    # Through JSON, as the record was: it has no tuples. Fields that the record lacks came later, and their defaults are off.
    now, default = (json.loads(json.dumps(describe_recipe(recipe))) for recipe in (RECIPES[name], Recipe()))
    then = default | then
    different = [field for field in then if then[field] != now.get(field)]
    return f"has changed since ({', '.join(different)})" if different else None
