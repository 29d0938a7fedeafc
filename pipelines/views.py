"""The random part of a view: a pure function of (seed, epoch, patch id, view number), drawn on the host in one sweep.

Every operation owns fixed slots of a view's row of uniform numbers, so an operation that is added or switched off leaves
the draws of the others as they were.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from pipelines.recipes import Recipe
from sharding.draws import uniforms

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop

# Slots of a view's uniform numbers. Append only.
_AREA, _RATIO = slice(0, 10), slice(10, 20)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _GREY = 20, 21, 22, 23, 24, 25
_FACTORS = slice(26, 30)
_SLOTS = 30

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int8)


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn, one row per patch and view: B patches, V views.

    box: (B, V, 4) int32, pixels of the stored image: top, left, height, width; flip: (B, V) bool, mirror left and right.
    order: (B, V, 4) int8, indices into OPERATIONS in the order of application, all -1 where no jitter is applied.
    factors: (B, V, 4) float32, by OPERATIONS (hue: share of the circle); grey: (B, V) bool.
    """

    box: np.ndarray
    flip: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray


def draw_views(ids: np.ndarray, *, seed: int, epoch: int, recipe: Recipe, sizes: np.ndarray) -> ViewParameters:
    """Draw the parameters of all views of some patches.

    ids: (B,) patch ids; sizes: (B, 2) int, each image's height and width in pixels (from the manifest): a crop box is
    whole pixels of its image, as torchvision's is. Row i depends on ids[i] and sizes[i] alone.
    """
    ids, sizes = np.asarray(ids), np.asarray(sizes)
    per_view = [_draw_view(ids, view, seed=seed, epoch=epoch, recipe=recipe, sizes=sizes) for view in range(recipe.views)]
    return ViewParameters(*(np.stack(parts, axis=1) for parts in zip(*per_view, strict=True)))


def _draw_view(ids, view, *, seed, epoch, recipe, sizes):
    n = len(ids)
    if recipe.is_random:
        u = uniforms(ids, _SLOTS, seed=seed, stream="view", epoch=epoch, view=view)
    else:
        u = np.zeros((n, _SLOTS))
    if recipe.crop is not None:
        box = _random_box(u, recipe.crop, sizes)
    else:
        box = _fixed_box(sizes, keep_aspect=recipe.keep_aspect)
    flip = u[:, _FLIP] < recipe.flip
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
    return box, flip, order, factors, grey


def _random_box(u, crop, sizes):
    """torchvision's RandomResizedCrop.get_params, for all patches at once: the first of ten boxes that fits, else centred."""
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
