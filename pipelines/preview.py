"""Show patches as training sees them: python pipelines/preview.py --data shards/kidney --out views.png"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipelines.loader import ViewLoader
from pipelines.recipes import Recipe, get_recipe
from pipelines.reference import decode
from pipelines.shards import ShardReader
from pipelines.views import OPERATIONS, ViewParameters
from sharding.command import option, required, run_script
from sharding.selection import select

_GAP, _CAPTION = 8, 38  # pixels; a caption has three lines


@dataclass(frozen=True)
class PreviewConfig:
    """A sheet of patches and their views."""

    data: str = required("folder of the shard set")
    out: str = required("the PNG to write")
    recipe: str = option("simclr", "the recipe whose views are shown")
    split: str | None = option(None, "only patches of this split")
    patches: int = option(8, "how many patches")
    image_size: int = option(160, "side of a view, pixels")
    seed: int = option(42, "the run's seed")
    epoch: int = option(0, "the epoch whose views are shown")


def view_sheet(
    reader: ShardReader, ids: np.ndarray, *, recipe: Recipe, image_size: int, seed: int, epoch: int = 0, columns: int = 1
) -> Image.Image:
    """The patches, each with its views beside it and what was drawn for each below, in the order of ids, row by row."""
    loader = ViewLoader(reader, ids, batch_size=len(ids), image_size=image_size, recipe=recipe, seed=seed, shuffle=False)
    loader.load_state_dict({"epoch": epoch, "step": 0})
    views_VBHWC = _pixels(next(iter(loader)).views, recipe)
    parameters = loader.parameters(ids)
    cell, row_height = image_size + _GAP, image_size + _GAP + _CAPTION
    width = cell * (1 + recipe.views) + _GAP
    sheet = Image.new("RGB", (width * columns, row_height * -(-len(ids) // columns) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, (patch, encoded) in enumerate(zip(ids, reader.read(ids), strict=True)):
        left, top = _GAP + width * (i % columns), _GAP + row_height * (i // columns)
        whole = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy()).resize((image_size, image_size))
        sheet.paste(whole, (left, top))
        draw.text((left, top + image_size + 1), f"patch {patch}", "black", font)
        for view in range(recipe.views):
            left += cell
            sheet.paste(Image.fromarray(views_VBHWC[view, i]), (left, top))
            draw.multiline_text((left, top + image_size + 1), describe_view(parameters, i, view), "black", font, spacing=1)
    return sheet


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


def _pixels(views_VBCSS: torch.Tensor, recipe: Recipe) -> np.ndarray:
    """(V, B, S, S, 3) uint8 of normalised views."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (views_VBCSS * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def main(config: PreviewConfig) -> None:
    if config.patches < 1:
        raise ValueError(f"--patches {config.patches}: show at least one")
    reader = ShardReader(config.data)
    ids = select(reader.manifest, split=config.split)[: config.patches]
    recipe = get_recipe(config.recipe)
    view_sheet(reader, ids, recipe=recipe, image_size=config.image_size, seed=config.seed, epoch=config.epoch).save(config.out)
    print(Path(config.out))


if __name__ == "__main__":
    sys.exit(run_script(main, PreviewConfig, prog="preview.py", description="A sheet of patches as training sees them."))
