"""What a stage starts from: random weights, ImageNet's, an earlier run, or a file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.weights import CARD_NAME
from train.records.runs import Run, find_run, read_json


@dataclass(frozen=True)
class Parent:
    """source: what `models.weights.apply_init` takes; key: what it contributes to the stage's key; chain: the stages before,
    in words; card: the model card, empty where there is none; run: the earlier run, if it is one."""

    source: str
    key: str
    chain: list[str]
    card: dict[str, Any]
    run: Run | None = None

    @property
    def address(self) -> str:
        """The source as every node finds it: of a run at a URL, that. See `train.records.remote_run.fetch_source`."""
        return self.run.url if self.run and self.run.url else self.source


def resolve_init(init: str, storage: str, *, backbone: str | None = None) -> Parent:
    """Find what an --init or --backbone names. backbone: the architecture that it has to be, if that is settled.

    Raises ValueError when there is no such thing, when the run is not finished, and when it is of another architecture.
    """
    if init == "scratch":
        return Parent("scratch", "scratch", [], {})
    if init == "imagenet":
        return Parent("imagenet", "imagenet", ["ImageNet"], {})
    run = find_run(init, storage)
    if run is not None:
        _ = run.result  # says what to do when it is not finished
        card = read_json(run.folder / CARD_NAME, "this run has left no backbone: give a run of pretraining or fine-tuning")
        parent = Parent(str(run.folder), run.record["key"], card.get("chain", []), card, run)
    elif Path(init).is_file():
        with open(init, "rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
        beside = Path(init).with_name(CARD_NAME)
        card = read_json(beside, "") if beside.exists() else {}
        parent = Parent(str(Path(init).absolute()), key, card.get("chain", [Path(init).name]), card)
    else:
        raise ValueError(f"{init}: no run of that name in {storage}, and no such file; choose scratch, imagenet, a run or a file")
    theirs = parent.card.get("backbone")
    if backbone and theirs and theirs != backbone:
        raise ValueError(f"{init} is a {theirs}, and a {backbone} was asked for: give --backbone {theirs}, or other weights")
    return parent
