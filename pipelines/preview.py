"""Write a contact sheet of patches and their views, as training sees them:

python pipelines/preview.py --data shards/kidney --out views.png
python pipelines/preview.py --data shards/kidney --step 1200 --batch-size 256 --seed 42 --out views.png
python pipelines/preview.py --run runs/kidney --step 1200 --out views.png

Steps are counted as in a run's metrics.jsonl: from 1, over all epochs. Views are made on the CPU; a GPU's differ by the rounding
of its decoder and its resize.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.recipes import get_recipe
from pipelines.shard_reader import ShardReader
from pipelines.training_input import InputSet, TrainingInput, read_training_input
from pipelines.view_sheet import MIN_CELL_WIDTH, count_of, step_sheet, view_sheet
from sharding.cli import option, required, run_script
from sharding.selection import select


@dataclass(frozen=True)
class PreviewConfig:
    """A sheet of patches and their views. Either --data or --run is given."""

    out: str = required("the PNG file to write")
    data: str | None = option(None, "folder or URL of the shard set")
    run: str | None = option(None, "folder or URL of a run, instead of --data and the settings of training; needs --step")
    step: int | None = option(
        None, "show the batch of this training step, counted from 1 as in metrics.jsonl; default: the first patches of the set"
    )
    patches: int = option(8, "number of patches: the first ones of the step's batch, or of the set")
    recipe: str | None = option(None, "the augmentation recipe; default: simclr")
    split: str | None = option(None, "show only patches of this split; default: all, or train with --step")
    fraction: float | None = option(None, "fraction of the split that training uses; default: 1")
    image_size: int | None = option(None, "side of a view in pixels; default: 160")
    batch_size: int | None = option(None, "with --step: patches per step, over all workers; default: 256")
    shuffle_window: int | None = option(
        None, "with --step: the --shuffle-window of training; default: shuffle all shards at once"
    )
    seed: int | None = option(None, "the seed of training; default: 42")
    epoch: int | None = option(None, "without --step: show the views of this epoch, counted from 0; default: 0")


def _from_run(config: PreviewConfig, run: str) -> TrainingInput:
    """The training of --run. Further flags must agree with the record."""
    training = read_training_input(run)
    for name in ("recipe", "split", "fraction", "image_size", "batch_size", "shuffle_window", "seed"):
        given = getattr(config, name)
        recorded = training.selection.get(name) if name in ("split", "fraction") else getattr(training, name)
        if given is not None and given != recorded:
            raise ValueError(f"--{name.replace('_', '-')} {given}: {run} was trained with {recorded}; leave the flag out")
    return training


def _from_flags(config: PreviewConfig, data: str) -> TrainingInput:
    """The training that the flags describe, with train/pretrain.py's defaults."""
    seed = _or(config.seed, 42)
    return TrainingInput(
        name=data,
        sets=[InputSet(data, 1.0, None)],
        selection={"split": _or(config.split, "train"), "fraction": _or(config.fraction, 1.0), "seed": seed},
        recipe=_or(config.recipe, "simclr"),
        image_size=_or(config.image_size, 160),
        batch_size=_or(config.batch_size, 256),
        shuffle_window=config.shuffle_window,
        seed=seed,
        epochs=None,
    )


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _first_patches(config: PreviewConfig, data: str) -> Image.Image:
    """The sheet of a set's first patches, at no training step."""
    for flag, given in (("--batch-size", config.batch_size), ("--shuffle-window", config.shuffle_window)):
        if given is not None:
            raise ValueError(f"{flag} {given} affects only the batch of a step: give --step too, or leave it out")
    recipe, epoch, seed = _or(config.recipe, "simclr"), _or(config.epoch, 0), _or(config.seed, 42)
    with contextlib.closing(ShardReader(data)) as reader:
        ids = select(reader.manifest, split=config.split, fraction=_or(config.fraction, 1.0), seed=seed)
        shown = ids[: config.patches]
        return view_sheet(
            reader,
            shown,
            recipe=get_recipe(recipe),
            image_size=_or(config.image_size, 160),
            seed=seed,
            epoch=epoch,
            cell=MIN_CELL_WIDTH,
            title=f"{data}: {count_of(len(shown), len(ids))}\nepoch {epoch}, recipe {recipe}, seed {seed}",
        )


def main(config: PreviewConfig) -> None:
    if config.patches < 1:
        raise ValueError(f"--patches {config.patches}: show at least one")
    if config.step is not None and config.epoch is not None:
        raise ValueError(
            f"--epoch {config.epoch} and --step {config.step} exclude each other: a step belongs to one epoch; give one of them"
        )
    if config.run is not None and config.data is None:
        if config.step is None:
            raise ValueError("--run shows the batch of a training step: give --step too, as in its metrics.jsonl")
        sheet = step_sheet(_from_run(config, config.run), config.step, patches=config.patches)
    elif config.data is not None and config.run is None:
        if config.step is None:
            sheet = _first_patches(config, config.data)
        else:
            sheet = step_sheet(_from_flags(config, config.data), config.step, patches=config.patches)
    else:
        raise ValueError("give --data, a shard set, or --run, the folder of a run, and not both")
    sheet.save(config.out)
    print(Path(config.out))


if __name__ == "__main__":
    sys.exit(run_script(main, PreviewConfig, prog="preview.py", description="Write a contact sheet of patches and their views."))
