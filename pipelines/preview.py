"""Show patches as training sees them, or saw them:

python pipelines/preview.py --data shards/kidney --out views.png
python pipelines/preview.py --data shards/kidney --step 1200 --batch-size 256 --seed 42 --out views.png
python pipelines/preview.py --run runs/kidney --step 1200 --out views.png

Steps are counted as in a run's metrics.jsonl: from 1, over all epochs. The pictures are made on the CPU; those of a GPU differ by
what its decoder and its resize round.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture, Part
from pipelines.recipes import RECIPES, Recipe, describe_recipe, get_recipe
from pipelines.remote_folder import NotThere, RemoteFolder, is_url
from pipelines.shard_reader import ShardReader
from pipelines.torchvision_reference import decode
from pipelines.views import OPERATIONS, ViewParameters
from sharding.cli import option, required, run_script
from sharding.manifest import class_names, fingerprint
from sharding.selection import select

_GAP, _CAPTION, _TITLE = 8, 38, 34  # pixels; a caption has three lines, a title two
_MOST = 2**30  # bytes of a run.json, which is fetched in one request
_CELL = 192  # pixels: the least width of an image's place, which is what the longest captions take


@dataclass(frozen=True)
class PreviewConfig:
    """A sheet of patches and their views. Either --data or --run is given."""

    out: str = required("the PNG to write")
    data: str | None = option(None, "folder or URL of the shard set")
    run: str | None = option(None, "a run's folder or URL instead, with --step: all else is taken from its record")
    step: int | None = option(
        None, "the training step to show, counted from 1 as in metrics.jsonl; default: no step, a few patches"
    )
    patches: int = option(8, "how many patches: the first ones of the step's batch, or of the set")
    recipe: str | None = option(None, "the recipe whose views are shown; default simclr")
    split: str | None = option(None, "only patches of this split; default: all, and with --step train")
    fraction: float | None = option(None, "share of the split that training uses; default 1")
    image_size: int | None = option(None, "side of a view, pixels; default 160")
    batch_size: int | None = option(None, "with --step: patches per step over all workers; default 256")
    shuffle_window: int | None = option(None, "with --step: training shuffles within so many shards; default: all together")
    seed: int | None = option(None, "the run's seed; default 42")
    epoch: int | None = option(None, "without --step: the epoch, from 0, whose views are shown; default 0")


class ShownSet(NamedTuple):
    """One shard set: its folder or URL, its weight beside the others', and its fingerprint where that is known."""

    shards: str
    weight: float
    fingerprint: str | None


@dataclass(frozen=True)
class Training:
    """What the batches of a training are a function of.

    selection: keyword arguments of sharding.selection.select; epochs: how many there are, None where any may be asked for.
    """

    name: str
    sets: list[ShownSet]
    selection: dict[str, Any]
    recipe: str
    image_size: int
    batch_size: int
    shuffle_window: int | None
    seed: int
    epochs: int | None


# Sheets


def view_sheet(
    reader: ShardReader | Mixture,
    ids: np.ndarray,
    *,
    recipe: Recipe,
    image_size: int,
    seed: int,
    epoch: int = 0,
    columns: int = 1,
    title: str = "",
    cell: int = 150,
) -> Image.Image:
    """The patches, each with its views beside it and what was drawn for each below, in the order of ids, row by row.

    title: of two lines at most, above them. cell: least width of an image's place, pixels; small views are enlarged by a whole
    number, pixel by pixel, to fill it, and captions end with it.
    """
    with ViewLoader(reader, ids, batch_size=len(ids), image_size=image_size, recipe=recipe, seed=seed, shuffle=False) as loader:
        loader.load_state_dict({"epoch": epoch, "step": 0})
        views = next(iter(loader)).views
        return _sheet(reader, ids, views, loader.parameters(ids), recipe=recipe, columns=columns, title=title, cell=cell)


def step_sheet(training: Training, step: int, *, patches: int) -> Image.Image:
    """The first patches of the global batch of that step, counted from 1, with the views that they have in it.

    What is shown is what a ViewLoader hands out that stands there. Raises ValueError for a step that there is not, for a set
    that is not what the training had, and as ViewLoader does.
    """
    if step < 1:
        raise ValueError(f"--step {step}: steps are counted from 1, as in metrics.jsonl")
    # Rank 0's part is the start of the global batch, so of a large one no more is made than has to be.
    size = training.batch_size
    ranks = next((n for n in range(size // patches, 0, -1) if size % n == 0), 1)
    recipe = get_recipe(training.recipe)
    with (
        _opened(training) as mixture,
        ViewLoader(
            mixture,
            mixture.ids,
            batch_size=size,
            image_size=training.image_size,
            recipe=recipe,
            seed=training.seed,
            window=training.shuffle_window,
            world_size=ranks,
        ) as loader,
    ):
        epoch, batch = divmod(step - 1, len(loader))
        if training.epochs is not None and epoch >= training.epochs:
            raise ValueError(
                f"--step {step}: {training.name} ends with step {training.epochs * len(loader):,}; give one up to that"
            )
        loader.load_state_dict({"epoch": epoch, "step": batch})
        shown = next(iter(loader))
        order = mixture.epoch_order(mixture.ids, seed=training.seed, epoch=epoch, window=training.shuffle_window)
        ids, passes = order.part(batch, size, rank=0, world_size=ranks)
        assert ids.tolist() == shown.id.tolist(), (ids, shown.id)
        ids, passes = ids[:patches], passes[:patches]
        title = (
            f"{training.name}: step {step:,} (epoch {epoch}, batch {batch + 1:,} of {len(loader):,})\n"
            f"{' + '.join(map(_name, mixture.readers))}, recipe {training.recipe}, seed {training.seed}, {_some(len(ids), size)}"
        )
        parameters = loader.parameters(ids, passes)
        return _sheet(mixture, ids, shown.views[:, :patches], parameters, recipe=recipe, passes=passes, title=title)


def describe_view(parameters: ViewParameters, patch: int, view: int) -> str:
    """What was drawn for a view, in three short lines."""
    top, left, height, width = parameters.box[patch, view]
    steps = [
        f"{OPERATIONS[operation][:6]} {parameters.factors[patch, view, operation]:+.2f}"
        for operation in parameters.order[patch, view]
        if operation >= 0
    ]
    if (parameters.stain[patch, view] != [[1], [0]]).any():
        steps.append("stain")
    if sigma := parameters.sigma[patch, view]:
        steps.append(f"blur {sigma:.1f}")
    marks = [word for word, drawn in (("flip", parameters.flip), ("vertical", parameters.vertical)) if drawn[patch, view]]
    if turns := int(parameters.turns[patch, view]):
        marks.append(f"turn {turns}")
    if parameters.grey[patch, view]:
        marks.append("grey")
    place = " ".join([f"{width} x {height} at {left}, {top}", *marks])
    return f"{place}\n{', '.join(steps[:3])}\n{', '.join(steps[3:])}"


def describe_patch(reader: ShardReader | Mixture, patch: int, passes: int) -> str:
    """Which patch it is, in up to three short lines: its id in its set, of several sets which one, and its class if it has one.

    passes: how many times the set was gone through before.
    """
    readers = reader.readers if isinstance(reader, Mixture) else [reader]
    number = 0
    while patch >= len(readers[number]):
        patch -= len(readers[number])
        number += 1
    own, label = readers[number], int(readers[number].labels[patch])
    lines = [f"patch {patch}"]
    if len(readers) > 1:
        lines = [f"patch {patch}, pass {passes}", f"set {number + 1}, {_name(own)}"]
    if label >= 0:
        lines.append(f"class {label}, {class_names(own.folder)[label]}")  # the number too: the font has no letters but Latin ones
    return "\n".join(lines)


def _sheet(reader, ids, views_VBCSS, parameters, *, recipe, passes=None, columns=1, title="", cell=_CELL):
    views_VBHWC = view_pixels(views_VBCSS, recipe)
    enlarged = max(1, cell // views_VBHWC.shape[2])
    views_VBHWC = views_VBHWC.repeat(enlarged, axis=2).repeat(enlarged, axis=3)
    side = views_VBHWC.shape[2]
    cell, row_height = max(side, cell) + _GAP, side + _GAP + _CAPTION
    width = cell * (1 + recipe.views) + _GAP
    above = _TITLE * bool(title)
    font, title_font = ImageFont.load_default(size=10), ImageFont.load_default(size=12)
    title_width = max(int(title_font.getlength(line)) + 2 * _GAP for line in title.split("\n"))
    size = (max(width * columns, title_width), above + row_height * -(-len(ids) // columns) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_GAP, _GAP // 2), title, "black", title_font, spacing=1)
    for i, (patch, encoded) in enumerate(zip(ids.tolist(), reader.read(ids), strict=True)):
        left, top = _GAP + width * (i % columns), above + _GAP + row_height * (i // columns)
        whole = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy()).resize((side, side))
        captions = [describe_patch(reader, patch, 0 if passes is None else int(passes[i]))]
        captions += [describe_view(parameters, i, view) for view in range(recipe.views)]
        for image, caption in zip([whole, *map(Image.fromarray, views_VBHWC[:, i])], captions, strict=True):
            sheet.paste(image, (left, top))
            lines = "\n".join(_fitting(line, font, cell - _GAP) for line in caption.split("\n"))
            draw.multiline_text((left, top + side + 1), lines, "black", font, spacing=1)
            left += cell
    return sheet


def _fitting(line: str, font, width: int) -> str:
    """The line, cut short where it would run into the next cell's."""
    shown = line
    while font.getlength(shown) > width:
        line = line[:-1]
        shown = f"{line}..."
    return shown


def view_pixels(views_VBCSS: torch.Tensor, recipe: Recipe) -> np.ndarray:
    """(V, B, S, S, 3) uint8 of normalised views."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (views_VBCSS * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def _name(reader: ShardReader) -> str:
    return Path(reader.remote.url if reader.remote else reader.folder.absolute()).name


def _some(shown: int, of: int) -> str:
    return f"the first {shown} of {of:,} patches" if shown < of else f"all {of} patches"


# What is shown


@contextlib.contextmanager
def _opened(training: Training) -> Iterator[Mixture]:
    """The sets, and of each the patches that are selected; of a single set, a mixture reads what the set alone would give."""
    with contextlib.ExitStack() as stack:
        parts = []
        for shards, weight, expected in training.sets:
            reader = stack.enter_context(contextlib.closing(ShardReader(shards)))
            if expected is not None and fingerprint(reader.folder) != expected:
                raise ValueError(
                    f"{shards}: {training.name} was trained on another content of this set, whose fingerprint began with"
                    f" {expected[:8]}; put that back to see its patches"
                )
            parts.append(Part(reader, select(reader.manifest, **training.selection), weight))
        yield Mixture(parts)


def read_training(run: str | Path) -> Training:
    """What a run's run.json says of its training.

    Raises ValueError where there is no record, where it holds no training, and where its recipe is another one now.
    """
    path = f"{run}/run.json"
    try:
        record = json.loads(RemoteFolder(str(run)).read("run.json", 0, _MOST) if is_url(run) else Path(path).read_bytes())
        if "input" not in record:
            raise ValueError(f"{path} does not say what the run read, as an older version wrote it: give --data and its settings")
        if "batch_size" not in record["input"]:
            raise ValueError(f"{path}: this run took no training steps, its backbone stayed as it was; give a run that trained")
        return _training(str(run), record)
    except (FileNotFoundError, NotADirectoryError, NotThere):
        raise ValueError(f"{path}: no such file; give the folder of a run that train/ made") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: this file is damaged; copy it again, or give --data and the run's settings") from error


def _training(name: str, record: dict[str, Any]) -> Training:
    found = record["input"]
    if change := _change_of_recipe(found["recipe"], found["recipe_fields"]):
        raise ValueError(
            f"{name}: its recipe {found['recipe']!r} {change}; use the code that made it, of commit {record['commit'][:10]}"
        )
    return Training(
        name=name,
        sets=[ShownSet(each["shards"], each["weight"], each["fingerprint"]) for each in found["sets"]],
        epochs=record["stage"]["config"]["epochs"],
        **{name: found[name] for name in ("selection", "recipe", "image_size", "batch_size", "shuffle_window", "seed")},
    )


def _change_of_recipe(name: str, then: dict[str, Any]) -> str | None:
    """What happened to the recipe since its fields were these."""
    if name not in RECIPES:
        return "is gone"
    # Through JSON, as the record went: it has no tuples. An operation that came later is off by default, as it was then.
    now, default = (json.loads(json.dumps(describe_recipe(recipe))) for recipe in (RECIPES[name], Recipe()))
    then = default | then
    different = [field for field in then if then[field] != now.get(field)]
    return f"was another one when it ran ({', '.join(different)})" if different else None


def _recorded(config: PreviewConfig, run: str) -> Training:
    """The training of --run. A flag beside it may say what the record says, and nothing else."""
    training = read_training(run)
    for name in ("recipe", "split", "fraction", "image_size", "batch_size", "shuffle_window", "seed"):
        given = getattr(config, name)
        recorded = training.selection.get(name) if name in ("split", "fraction") else getattr(training, name)
        if given is not None and given != recorded:
            raise ValueError(f"--{name.replace('_', '-')} {given}: {run} was trained with {recorded}; leave the flag out")
    return training


def _described(config: PreviewConfig, data: str) -> Training:
    """The training that the flags describe, by default as train/pretrain.py's."""
    seed = _or(config.seed, 42)
    return Training(
        name=data,
        sets=[ShownSet(data, 1.0, None)],
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
    """The sheet of a set's patches, of no step."""
    for flag, given in (("--batch-size", config.batch_size), ("--shuffle-window", config.shuffle_window)):
        if given is not None:
            raise ValueError(f"{flag} {given} decides which patches come together at a step: give --step too, or leave it out")
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
            cell=_CELL,
            title=f"{data}: {_some(len(shown), len(ids))}\nepoch {epoch}, recipe {recipe}, seed {seed}",
        )


def main(config: PreviewConfig) -> None:
    if config.patches < 1:
        raise ValueError(f"--patches {config.patches}: show at least one")
    if config.step is not None and config.epoch is not None:
        raise ValueError(f"--epoch {config.epoch}: step {config.step} lies in an epoch of its own; give --step or --epoch")
    if config.run is not None and config.data is None:
        if config.step is None:
            raise ValueError("--run shows what a run saw at a step: give --step too, as in its metrics.jsonl")
        sheet = step_sheet(_recorded(config, config.run), config.step, patches=config.patches)
    elif config.data is not None and config.run is None:
        if config.step is None:
            sheet = _first_patches(config, config.data)
        else:
            sheet = step_sheet(_described(config, config.data), config.step, patches=config.patches)
    else:
        raise ValueError("give --data, a shard set, or --run, the folder of a run, and not both")
    sheet.save(config.out)
    print(Path(config.out))


if __name__ == "__main__":
    sys.exit(run_script(main, PreviewConfig, prog="preview.py", description="A sheet of patches as training sees them."))
