"""The random parameters of views: a pure function of (seed, epoch, patch id, view number), drawn on the host for a whole batch.

Each operation owns fixed slots in a view's row of uniform numbers, so adding an operation or switching it off does not change the
draws of the others.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from pipelines.recipes import Recipe
from sharding.philox import uniforms

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop

# Slots of a view's uniform numbers. Append only.
_AREA, _RATIO = slice(0, 10), slice(10, 20)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _GREY = 20, 21, 22, 23, 24, 25
_FACTORS = slice(26, 30)
_VERTICAL, _TURNS, _BLUR, _SIGMA = 30, 31, 32, 33
_STAIN = slice(34, 40)
_SLOTS = 40
_GEOMETRY = [*range(_FLIP + 1), _VERTICAL, _TURNS]

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int8)


@dataclass(frozen=True)
class ViewParameters:
    """The drawn parameters, one row per patch and view: B patches, V views.

    box: (B, V, 4) int32, pixels of the stored image: top, left, height, width.
    flip: (B, V) bool, mirror left and right; vertical: (B, V) bool, mirror top and bottom.
    turns: (B, V) int8, quarter turns counter-clockwise, 0 to 3, after the flips.
    stain: (B, V, 2, 3) float32, factor and summand of the density of haematoxylin, eosin and DAB; 1 and 0 for no change.
    order: (B, V, 4) int8, indices into OPERATIONS in the order of application, all -1 where no jitter is applied.
    factors: (B, V, 4) float32, by OPERATIONS (hue: share of the circle); grey: (B, V) bool.
    sigma: (B, V) float32, of the blur in pixels of the view, 0 where there is none.
    """

    box: np.ndarray
    flip: np.ndarray
    vertical: np.ndarray
    turns: np.ndarray
    stain: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray


def draw_views(ids: np.ndarray, *, seed: int, epoch: int, recipe: Recipe, sizes: np.ndarray) -> ViewParameters:
    """Draw the parameters of all views of some patches.

    ids: (B,) patch ids; sizes: (B, 2) int, each image's height and width in pixels (from the manifest): a crop box is
    whole pixels of its image, as torchvision's is. Row i depends on ids[i] and sizes[i] alone.
    """
    ids, sizes = np.asarray(ids), np.asarray(sizes)
    per_view = []
    shared = None
    for view in range(recipe.views):
        if recipe.is_random:
            u = uniforms(ids, _SLOTS, seed=seed, stream="view", epoch=epoch, view=view)
        else:
            u = np.zeros((len(ids), _SLOTS))
        if recipe.turns == "by view":
            shared = u[:, _GEOMETRY] if shared is None else shared
            u[:, _GEOMETRY] = shared
        per_view.append(_draw_view(u, view, recipe=recipe, sizes=sizes))
    return ViewParameters(*(np.stack(parts, axis=1) for parts in zip(*per_view, strict=True)))


def _draw_view(u, view, *, recipe, sizes):
    n = len(u)
    if recipe.crop is not None:
        box = _random_box(u, recipe.crop, sizes)
    else:
        box = _fixed_box(sizes, keep_aspect=recipe.keep_aspect)
    flip = u[:, _FLIP] < recipe.flip
    vertical = u[:, _VERTICAL] < recipe.vertical_flip
    if recipe.turns == "random":
        turns = (u[:, _TURNS] * 4).astype(np.int8)
    else:
        turns = np.full(n, view % 4 if recipe.turns == "by view" else 0, np.int8)
    stain = np.tile(np.array([[1.0], [0.0]], np.float32), (n, 1, 3))
    if recipe.stain is not None:
        stain += ((2 * u[:, _STAIN] - 1) * recipe.stain.strength).reshape(n, 2, 3).astype(np.float32)
    grey = u[:, _GREY] < recipe.grey
    order, factors = np.full((n, 4), -1, np.int8), np.zeros((n, 4), np.float32)
    if recipe.jitter is not None:
        jitter = recipe.jitter
        jittered = u[:, _JITTER] < jitter.probability
        order[jittered] = _ORDERS[(u[jittered, _ORDER] * len(_ORDERS)).astype(np.int64)]
        spread = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
        centre = np.array([1.0, 1.0, 1.0, 0.0])
        low = centre - spread
        low[:3] = np.maximum(low[:3], 0)
        factors[:] = low + u[:, _FACTORS] * (centre + spread - low)
    sigma = np.zeros(n, np.float32)
    if recipe.blur is not None:
        low, high = recipe.blur.sigma
        sigma[:] = np.where(u[:, _BLUR] < recipe.blur.probability, low + u[:, _SIGMA] * (high - low), 0)
    return box, flip, vertical, turns, stain, order, factors, grey, sigma


def _random_box(u, crop, sizes):
    """torchvision's RandomResizedCrop.get_params for a batch: the first of ten boxes that fits, else a centred one."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (crop.area[0] + u[:, _AREA] * (crop.area[1] - crop.area[0]))
    low, high = np.log(crop.ratio)
    ratio = np.exp(low + u[:, _RATIO] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    w, h, found = w[rows, first], h[rows, first], fits.any(axis=1)

    width, height = width[:, 0], height[:, 0]
    image_ratio = width / height
    fallback_w = np.where(image_ratio > crop.ratio[1], np.rint(height * crop.ratio[1]), width)
    fallback_h = np.where(image_ratio < crop.ratio[0], np.rint(width / crop.ratio[0]), height)
    w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
    top = np.where(found, np.floor(u[:, _TOP] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(u[:, _LEFT] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def _fixed_box(sizes, *, keep_aspect):
    height, width = sizes[:, 0].astype(np.int32), sizes[:, 1].astype(np.int32)
    if not keep_aspect:
        zeros = np.zeros_like(height)
        return np.stack([zeros, zeros, height, width], axis=1)
    side = np.minimum(height, width)
    return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)
