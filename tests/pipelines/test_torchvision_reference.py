"""The reference itself: decoding upright and in RGB, the drawn box, the flip."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.recipes import RGB_FROM_HED, GaussianBlur, Recipe, get_recipe
from pipelines.torchvision_reference import decode, reference_view, reference_views, restain
from pipelines.views import ViewParameters, draw_views

PLAIN = Recipe(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def encoded(image: Image.Image, **settings) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return np.frombuffer(file.getvalue(), np.uint8)


def noise(height, width) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def parameters(box, **drawn) -> ViewParameters:
    """What an unchanging recipe draws, but for the box and what is given: by field, of the only view of the only patch."""
    still = draw_views(np.zeros(1, np.int64), seed=0, epoch=0, recipe=PLAIN, sizes=np.array([[9, 9]]))
    given = {name: np.array(value, getattr(still, name).dtype)[None, None] for name, value in {"box": box, **drawn}.items()}
    return dataclasses.replace(still, **given)


def test_decode_is_in_rgb_and_upright():
    pixels = noise(4, 6)
    assert torch.equal(decode(encoded(Image.fromarray(pixels))), torch.from_numpy(pixels).permute(2, 0, 1))
    grey = Image.fromarray(pixels[..., 0])
    assert torch.equal(decode(encoded(grey)), torch.from_numpy(pixels[..., 0]).expand(3, -1, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned = decode(encoded(Image.fromarray(pixels), exif=exif))
    np.testing.assert_array_equal(turned.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


def test_view_is_the_box_of_the_image():
    """A box of the view's own size is cut out without any resampling."""
    pixels = noise(20, 30)
    drawn = parameters((3, 11, 8, 8))
    view = reference_view(torch.from_numpy(pixels).permute(2, 0, 1), drawn, 0, 0, recipe=PLAIN, image_size=8)
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy() * 255, pixels[3:11, 11:19], atol=1e-4)
    drawn = parameters((3, 11, 8, 8), flip=True)
    view = reference_view(torch.from_numpy(pixels).permute(2, 0, 1), drawn, 0, 0, recipe=PLAIN, image_size=8)
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy() * 255, pixels[3:11, 11:19][:, ::-1], atol=1e-4)


def test_normalisation_is_by_channel():
    recipe = Recipe(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    pixels = noise(5, 5)
    views = reference_views([encoded(Image.fromarray(pixels))], parameters((0, 0, 5, 5)), recipe=recipe, image_size=5)
    assert views.shape == (1, 1, 3, 5, 5)
    wanted = (pixels / 255 - np.array(recipe.mean)) / np.array(recipe.std)
    np.testing.assert_allclose(views[0, 0].permute(1, 2, 0).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize(("flip", "vertical"), [(False, False), (True, False), (False, True), (True, True)])
def test_flips_come_before_turns(flip, vertical, turns):
    pixels = noise(6, 6)
    drawn = parameters((0, 0, 6, 6), flip=flip, vertical=vertical, turns=turns)
    view = reference_view(torch.from_numpy(pixels).permute(2, 0, 1), drawn, 0, 0, recipe=PLAIN, image_size=6)
    wanted = np.rot90(pixels[:: -1 if vertical else 1, :: -1 if flip else 1], turns)  # counter-clockwise
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy() * 255, wanted, atol=1e-4)


def test_stains_by_their_definition():
    """Light through known amounts of the three stains comes out as light through the changed amounts."""
    amounts = np.random.default_rng(0).uniform(0, 0.4, (5, 7, 3))
    factor, summand = np.array([1.2, 0.8, 1.1]), np.array([0.05, 0.0, 0.1])
    light, wanted = (10 ** -(a @ np.array(RGB_FROM_HED)) for a in (amounts, amounts * factor + summand))
    x = torch.from_numpy(light).permute(2, 0, 1)
    found = restain(x, torch.from_numpy(factor), torch.from_numpy(summand))
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), wanted, atol=1e-12)


def test_rounding_between_the_operations_is_within_a_few_levels():
    """In uint8, as torchvision treats images: every operation takes it."""
    recipe = dataclasses.replace(get_recipe("pathology"), grey=0.5, blur=GaussianBlur(probability=1.0), views=1)
    image = torch.from_numpy(noise(32, 32)).permute(2, 0, 1)
    drawn = draw_views(np.arange(12), seed=1, epoch=0, recipe=recipe, sizes=np.full((12, 2), 32))
    for patch in range(12):
        exact, rounded = (
            reference_view(image, drawn, patch, 0, recipe=recipe, image_size=32, dtype=dtype)
            for dtype in (torch.float32, torch.uint8)
        )
        difference = (exact - rounded).abs() * torch.tensor(recipe.std).view(3, 1, 1) * 255
        assert 0 < difference.mean() < 3
