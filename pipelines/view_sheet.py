"""Contact sheets: patches beside their training views, with the random parameters of each view."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipelines.loader import ViewLoader
from pipelines.mixture import Mixture
from pipelines.recipes import Recipe, get_recipe
from pipelines.shard_reader import ShardReader
from pipelines.torchvision_reference import decode
from pipelines.training_input import TrainingInput, open_sets
from pipelines.views import OPERATIONS, ViewParameters
from sharding.manifest import class_names

_GAP, _CAPTION, _TITLE = 8, 38, 34  # pixels; a caption has three lines, a title two
_SHORT = {"brightness": "bright.", "contrast": "contr.", "saturation": "satur."}  # a caption has room for three
MIN_CELL_WIDTH = 192  # pixels; fits the longest captions


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
    """The patches in the order of ids, row by row, each beside its views, with the drawn parameters as captions.

    title: at most two lines. cell: least width of an image's cell in pixels; small views are enlarged by a whole factor to fill
    it, and captions are cut to it.
    """
    with ViewLoader(reader, ids, batch_size=len(ids), image_size=image_size, recipe=recipe, seed=seed, shuffle=False) as loader:
        loader.load_state_dict({"epoch": epoch, "step": 0})
        views = next(iter(loader)).views
        return _sheet(reader, ids, views, loader.parameters(ids), recipe=recipe, columns=columns, title=title, cell=cell)


def step_sheet(training: TrainingInput, step: int, *, patches: int) -> Image.Image:
    """The first patches of the global batch of a step, counted from 1, with the views that a ViewLoader makes for that step.

    Raises ValueError for a step that does not exist, for a set that has changed since the training, and as ViewLoader does.
    """
    if step < 1:
        raise ValueError(f"--step {step}: steps are counted from 1, as in metrics.jsonl")
    # Rank 0's part is the start of the global batch, so pretending to have many ranks keeps the work small.
    size = training.batch_size
    ranks = next((n for n in range(size // patches, 0, -1) if size % n == 0), 1)
    recipe = get_recipe(training.recipe)
    with (
        open_sets(training) as mixture,
        ViewLoader(
            mixture,
            mixture.ids,
            batch_size=size,
            image_size=training.image_size,
            recipe=recipe,
            seed=training.seed,
            window=training.shuffle_window,
            world_size=ranks,
            replace_damaged=True,
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
        ids, read, passes = ids[:patches], shown.id.numpy()[:patches], passes[:patches]
        damaged = int((ids != read).sum())
        title = (
            f"{training.name}: step {step:,} (epoch {epoch}, batch {batch + 1:,} of {len(loader):,})\n"
            f"{' + '.join(map(_set_name, mixture.readers))}, recipe {training.recipe}, seed {training.seed}, "
            f"{count_of(len(ids), size)}{f', {damaged} damaged and replaced' if damaged else ''}"
        )
        parameters = loader.parameters(ids, passes, read=read)
        return _sheet(mixture, read, shown.views[:, :patches], parameters, recipe=recipe, passes=passes, title=title)


def describe_view(parameters: ViewParameters, patch: int, view: int) -> str:
    """What was drawn for a view, in three short lines."""
    top, left, height, width = parameters.box[patch, view]
    drawn = [(OPERATIONS[i], parameters.factors[patch, view, i]) for i in parameters.order[patch, view] if i >= 0]
    steps = [f"hue {amount:+.2f}" if name == "hue" else f"{_SHORT[name]} x{amount:.2f}" for name, amount in drawn]
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
    """The patch in up to three short lines: its id in its set, the set if there are several, and its class if it has one.

    passes: completed passes over the set.
    """
    readers = reader.readers if isinstance(reader, Mixture) else [reader]
    number = 0
    while patch >= len(readers[number]):
        patch -= len(readers[number])
        number += 1
    own, label = readers[number], int(readers[number].labels[patch])
    lines = [f"patch {patch}"]
    if len(readers) > 1:
        lines = [f"patch {patch}, pass {passes}", f"set {number + 1}, {_set_name(own)}"]
    if label >= 0:
        lines.append(f"class {label}, {class_names(own.folder)[label]}")  # the font has only Latin letters
    return "\n".join(lines)


def _sheet(reader, ids, views_VBCSS, parameters, *, recipe, passes=None, columns=1, title="", cell=MIN_CELL_WIDTH):
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
            lines = "\n".join(_shortened(line, font, cell - _GAP) for line in caption.split("\n"))
            draw.multiline_text((left, top + side + 1), lines, "black", font, spacing=1)
            left += cell
    return sheet


def _shortened(line: str, font, width: int) -> str:
    """The line, shortened to a width in pixels."""
    shown = line
    while font.getlength(shown) > width:
        line = line[:-1]
        shown = f"{line}..."
    return shown


def view_pixels(views_VBCSS: torch.Tensor, recipe: Recipe) -> np.ndarray:
    """(V, B, S, S, 3) uint8 of normalised views."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (views_VBCSS * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def _set_name(reader: ShardReader) -> str:
    return Path(reader.remote.url if reader.remote else reader.folder.absolute()).name


def count_of(shown: int, of: int) -> str:
    return f"the first {shown} of {of:,} patches" if shown < of else f"all {of} patches"
