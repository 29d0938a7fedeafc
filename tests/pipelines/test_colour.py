"""The colour step, Numba's and torch's, against torchvision's float operations. One level is 1/255 of the range."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from pipelines.colour import colour_batch, colour_rows, colour_step
from pipelines.recipes import Recipe, simclr
from pipelines.reference import reference_view
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
    """Whole, unflipped images; cases: (order, factors, grey) for each."""
    orders, factors, greys = zip(*cases, strict=True)
    n = len(cases)
    return ViewParameters(
        box=np.tile(np.array([0, 0, SIDE, SIDE], np.int32), (n, 1, 1)),
        flip=np.zeros((n, 1), bool),
        order=np.array(orders, np.int8)[:, None],
        factors=np.array(factors, np.float32)[:, None],
        grey=np.array(greys, bool)[:, None],
    )


def expected(images_BHWC, drawn, recipe) -> np.ndarray:
    chw = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()
    return np.stack([reference_view(chw[i], drawn, i, 0, recipe=recipe, image_size=SIDE).numpy() for i in range(len(chw))])


def numba_step(images_BHWC, drawn, recipe) -> np.ndarray:
    rows, out = colour_rows(drawn, recipe)[:, 0], np.full((len(images_BHWC), 3, SIDE, SIDE), np.nan, np.float32)
    for i, image in enumerate(images_BHWC):
        colour_step(out[i], image, rows[i])
    return out


def torch_step(images_BHWC, drawn, recipe) -> np.ndarray:
    return colour_batch(torch.from_numpy(images_BHWC), colour_rows(drawn, recipe)[:, 0]).numpy()


def levels(found, wanted, recipe) -> float:
    return float((np.abs(found - wanted) * 255 * np.array(recipe.std).reshape(3, 1, 1)).max())


def assert_equal_to_torchvision(step, images_BHWC, cases, recipe=PLAIN):
    drawn = parameters(cases)
    found, wanted = step(images_BHWC, drawn, recipe), expected(images_BHWC, drawn, recipe)
    for image, case, ours, theirs in zip(range(len(cases)), cases, found, wanted, strict=True):
        difference = levels(ours, theirs, recipe)
        assert difference <= LEVELS, (image, case, difference)


both_steps = pytest.mark.parametrize("step", [numba_step, torch_step])


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
    recipe, n = dataclasses.replace(simclr(), views=1), 160
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
    colour_step(out, image, colour_rows(drawn, PLAIN)[0, 0])
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    x = F.adjust_saturation(F.adjust_brightness(F.adjust_hue(F.adjust_contrast(x, 0.6), -0.1), 1.3), 1.4)
    assert levels(out, x.numpy(), PLAIN) <= LEVELS
