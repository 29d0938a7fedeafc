"""The colour step, Numba's and torch's, against torchvision's float operations. One level is 1/255 of the range."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from pipelines.recipes import RECIPES, GaussianBlur, RandomCrop, Recipe, StainJitter, simclr
from pipelines.torchvision_reference import reference_view
from pipelines.view_kernels_numba import parameter_rows, resized_view_step, view_step
from pipelines.view_kernels_torch import resized_view_batch
from pipelines.views import OPERATIONS, ViewParameters, draw_views

SIDE = 24
PLAIN = Recipe(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
LEVELS = 0.01  # the largest difference allowed
NONE = (-1, -1, -1, -1)


def _images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    stain = np.exp(-np.stack([0.2 + 0.9 * x * y, 0.5 + 0.9 * x, 0.3 + 0.5 * y], axis=2))
    greys = rng.integers(0, 256, (SIDE, SIDE, 1)).repeat(3, axis=2)
    corners = np.array(list(itertools.product((0, 255), repeat=3)))[rng.integers(0, 8, (SIDE, SIDE))]
    return {
        "noise": rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8),
        "tissue": np.rint(255 * stain).astype(np.uint8),
        "almost grey": np.clip(greys + rng.integers(0, 2, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8),
        "grey": greys.astype(np.uint8),
        "saturated": corners.astype(np.uint8),
        "black": np.zeros((SIDE, SIDE, 3), np.uint8),
        "white": np.full((SIDE, SIDE, 3), 255, np.uint8),
        "flat": np.full((SIDE, SIDE, 3), (200, 90, 160), np.uint8),
    }


IMAGES = _images()
STACK = np.stack(list(IMAGES.values()))


def parameters(cases) -> ViewParameters:
    """Whole images that stay where they are; cases: (order, factors, grey) for each."""
    orders, factors, greys = zip(*cases, strict=True)
    return whole_images(
        len(cases),
        order=np.array(orders, np.int8),
        factors=np.array(factors, np.float32),
        grey=np.array(greys, bool),
    )


def whole_images(n, side=SIDE, **drawn) -> ViewParameters:
    """What an unchanging recipe draws for so many images, but for the fields that are given."""
    still = draw_views(np.arange(n), seed=0, epoch=0, recipe=PLAIN, sizes=np.full((n, 2), side))
    return dataclasses.replace(still, **{name: value[:, None] for name, value in drawn.items()})


def expected(images_BHWC, drawn, recipe, side=None) -> np.ndarray:
    side = side or images_BHWC.shape[1]
    chw = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()
    return np.stack([reference_view(chw[i], drawn, i, 0, recipe=recipe, image_size=side).numpy() for i in range(len(chw))])


def numba_step(images_BHWC, drawn, recipe) -> np.ndarray:
    rows, out = parameter_rows(drawn, recipe)[:, 0], np.full(images_BHWC.transpose(0, 3, 1, 2).shape, np.nan, np.float32)
    for i, image in enumerate(images_BHWC):
        resized_view_step(out[i], image, rows[i])
    return out


def numba_views(images_BHWC, drawn, recipe, side=None) -> np.ndarray:
    side = side or images_BHWC.shape[1]
    rows, out = parameter_rows(drawn, recipe), np.full((len(images_BHWC), 1, 3, side, side), np.nan, np.float32)
    for i, image in enumerate(images_BHWC):
        view_step(out[i, 0], image, rows[i, 0])
    return out[:, 0]


def torch_step(images_BHWC, drawn, recipe) -> np.ndarray:
    return resized_view_batch(torch.from_numpy(images_BHWC), parameter_rows(drawn, recipe)[:, 0]).numpy()


def levels(found, wanted, recipe) -> float:
    return float((np.abs(found - wanted) * 255 * np.array(recipe.std).reshape(3, 1, 1)).max())


def assert_equal_to_torchvision(step, images_BHWC, cases, recipe=PLAIN):
    drawn = parameters(cases)
    found, wanted = step(images_BHWC, drawn, recipe), expected(images_BHWC, drawn, recipe)
    for image, case, ours, theirs in zip(range(len(cases)), cases, found, wanted, strict=True):
        difference = levels(ours, theirs, recipe)
        assert difference <= LEVELS, (image, case, difference)


both_steps = pytest.mark.parametrize("step", [numba_step, numba_views, torch_step])


def every_image(*cases):
    """Each image with each case."""
    chosen = list(itertools.product(range(len(STACK)), cases))
    return STACK[[image for image, _ in chosen]], [case for _, case in chosen]


@both_steps
@pytest.mark.parametrize("operation", range(4), ids=OPERATIONS)
def test_each_operation_alone(step, operation):
    values = (-0.5, -0.2, -0.03, 0.0, 0.1, 1 / 3, 0.5) if operation == 3 else (0.0, 0.2, 0.9, 1.0, 1.3, 1.8, 5.0)
    order = (operation, -1, -1, -1)
    images, cases = every_image(*((order, tuple(value if k == operation else 0.4 for k in range(4)), False) for value in values))
    assert_equal_to_torchvision(step, images, cases)


@both_steps
def test_every_order(step):
    factors = [(1.4, 0.5, 1.7, 0.15), (0.6, 1.6, 0.3, -0.2)]
    images, cases = every_image(*((order, f, False) for order in itertools.permutations(range(4)) for f in factors))
    assert_equal_to_torchvision(step, images, cases)


@both_steps
def test_extremes_in_every_order(step):
    """Clipping between the operations, images that lose all their chroma on the way, and a full turn of hue."""
    factors = [(0.0, 1.0, 1.0, 0.1), (1.8, 1.8, 1.8, 0.5), (0.2, 1.8, 0.0, -0.5), (3.0, 0.0, 5.0, 0.2)]
    images, cases = every_image(*((order, f, False) for order in list(itertools.permutations(range(4)))[::5] for f in factors))
    assert_equal_to_torchvision(step, images, cases)


@both_steps
def test_grey_with_and_without_jitter(step):
    images, cases = every_image((NONE, (0.0, 0.0, 0.0, 0.0), True), ((2, 0, 3, 1), (1.2, 0.7, 1.5, 0.1), True))
    assert_equal_to_torchvision(step, images, cases)


@both_steps
def test_no_operation_is_normalisation_alone(step):
    recipe = simclr()
    images, cases = every_image((NONE, (0.0, 0.0, 0.0, 0.0), False))
    found = step(images, parameters(cases), recipe)
    wanted = F.normalize(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, list(recipe.mean), list(recipe.std))
    assert levels(found, wanted.numpy(), recipe) < 0.001


@both_steps
def test_drawn_parameters_with_normalisation(step):
    """A batch in which images take different operations, as the loader makes it."""
    recipe, n = dataclasses.replace(simclr(), views=1, crop=None, flip=0.0), 160
    drawn = draw_views(np.arange(n), seed=3, epoch=0, recipe=recipe, sizes=np.full((n, 2), SIDE))
    cases = list(zip(drawn.order[:, 0], drawn.factors[:, 0], drawn.grey[:, 0], strict=True))
    assert_equal_to_torchvision(step, np.random.default_rng(1).integers(0, 256, (n, SIDE, SIDE, 3), np.uint8), cases, recipe)


@both_steps
def test_images_of_a_batch_do_not_touch_each_other(step):
    """Contrast's mean is an image's own, and the input stays as it was."""
    case = ((1, 2, 0, 3), (0.8, 0.4, 1.5, 0.1), False)
    images = STACK.copy()
    together = step(images, parameters([case] * len(images)), PLAIN)
    np.testing.assert_array_equal(images, STACK)
    for i in range(len(images)):
        alone = step(images[i : i + 1], parameters([case]), PLAIN)
        np.testing.assert_allclose(together[i], alone[0], atol=2e-7)


def test_numba_step_takes_images_that_are_not_square():
    image = np.random.default_rng(2).integers(0, 256, (5, 17, 3), np.uint8)
    drawn = parameters([((1, 3, 0, 2), (1.3, 0.6, 1.4, -0.1), False)])
    out = np.full((3, 5, 17), np.nan, np.float32)
    resized_view_step(out, image, parameter_rows(drawn, PLAIN)[0, 0])
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    x = F.adjust_saturation(F.adjust_brightness(F.adjust_hue(F.adjust_contrast(x, 0.6), -0.1), 1.3), 1.4)
    assert levels(out, x.numpy(), PLAIN) <= LEVELS


# Flips and turns


@both_steps
def test_every_flip_with_every_turn(step):
    """Bit for bit those of torch, at sides that are and are not whole blocks of the exchange of rows and columns."""
    kinds = list(itertools.product((False, True), (False, True), range(4)))
    flip, vertical, turns = (np.array(values) for values in zip(*kinds, strict=True))
    for side in (1, 2, 16, 24, 37):
        images = np.random.default_rng(side).integers(0, 256, (len(kinds), side, side, 3), np.uint8)
        drawn = whole_images(len(kinds), side, flip=flip, vertical=vertical, turns=turns)
        found = step(images, drawn, PLAIN)
        for image, one, (mirrored, upside_down, quarters) in zip(images, found, kinds, strict=True):
            x = torch.from_numpy(image).permute(2, 0, 1)
            x = F.horizontal_flip(x) if mirrored else x
            x = torch.rot90(F.vertical_flip(x) if upside_down else x, quarters, dims=(1, 2))
            np.testing.assert_allclose(one * 255, x.numpy(), atol=1e-4)


# Stains


@both_steps
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.2])
def test_stains_against_float64(step, strength):
    """All images, noise and black and white among them, with many draws: within 0.05 of a level of the formula in float64."""
    recipe = dataclasses.replace(PLAIN, stain=StainJitter(strength))
    images = np.repeat(STACK, 20, axis=0)
    n = len(images)
    drawn = draw_views(np.arange(n), seed=8, epoch=0, recipe=recipe, sizes=np.full((n, 2), SIDE))
    found = step(images, drawn, recipe)
    wanted = stained(images, drawn.stain[:, 0])
    assert np.abs(found - wanted).max() * 255 < 0.05
    assert found.min() >= 0 and found.max() <= 1 + 1e-6


def stained(images_BHWC, stain):
    """Ruifrok & Johnston's stains in NumPy, from the formula."""
    to_rgb = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    density = -np.log10(np.maximum(images_BHWC / 255, 1 / 255))
    hed = density @ np.linalg.inv(to_rgb) * stain[:, 0, None, None].astype(float) + stain[:, 1, None, None].astype(float)
    return np.clip(10 ** -(hed @ to_rgb), 0, 1).transpose(0, 3, 1, 2)


# Blur


@both_steps
@pytest.mark.parametrize(("side", "percent"), [(1, 100), (2, 100), (4, 100), (5, 100), (19, 10), (24, 50), (24, 100), (96, 10)])
def test_blur_is_torchvisions(step, side, percent):
    """Many widths, kernels as large as the view and larger, and the images without blur in between as they were."""
    recipe = dataclasses.replace(PLAIN, blur=GaussianBlur(kernel=percent))
    sigma = np.array([0.1, 0.0, 0.2, 0.35, 0.5, 0.8, 0.0, 1.1, 1.5, 2.0, 4.0, 20.0], np.float32)
    images = np.random.default_rng(side).integers(0, 256, (len(sigma), side, side, 3), np.uint8)
    drawn = whole_images(len(sigma), side, sigma=sigma)
    assert levels(step(images, drawn, recipe), expected(images, drawn, recipe), recipe) <= LEVELS


# The box and its resize


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 60), st.integers(0, 2**32))
def test_box_and_resize_are_torchvisions(height, width, side, seed):
    """Up and down, by any factors, at the image's border and away from it."""
    recipe = dataclasses.replace(PLAIN, crop=RandomCrop(area=(0.02, 1.0), ratio=(0.2, 5.0)), flip=0.5)
    images = np.random.default_rng(seed).integers(0, 256, (4, height, width, 3), np.uint8)
    drawn = draw_views(np.arange(4), seed=seed, epoch=0, recipe=recipe, sizes=np.full((4, 2), (height, width)))
    assert levels(numba_views(images, drawn, recipe, side), expected(images, drawn, recipe, side), recipe) <= LEVELS


# All together


@both_steps
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_whole_images(step, name):
    everything = Recipe(flip=0.5, turns="random", stain=StainJitter(0.1), jitter=simclr().jitter, grey=0.2, blur=GaussianBlur())
    for recipe in (RECIPES[name], everything):
        recipe = dataclasses.replace(recipe, crop=None, keep_aspect=False, views=1)
        n = 40
        drawn = draw_views(np.arange(n), seed=3, epoch=0, recipe=recipe, sizes=np.full((n, 2), 48))
        images = np.random.default_rng(1).integers(0, 256, (n, 48, 48, 3), np.uint8)
        assert levels(step(images, drawn, recipe), expected(images, drawn, recipe), recipe) <= 0.05


def test_views_of_one_image_are_made_of_it_in_their_order():
    recipe = RECIPES["rotnet"]
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    drawn = draw_views(np.arange(1), seed=1, epoch=0, recipe=recipe, sizes=np.array([[50, 40]]))
    out = np.full((4, 3, 32, 32), np.nan, np.float32)
    for k, row in enumerate(parameter_rows(drawn, recipe)[0]):
        view_step(out[k], image, row)
        np.testing.assert_array_equal(out[k], np.rot90(out[0], k, axes=(1, 2)))
