"""The reference itself: decoding upright and in RGB, the drawn box, the flip."""

import io

import numpy as np
import torch
from PIL import Image

from pipelines.recipes import Recipe
from pipelines.reference import decode, reference_view, reference_views
from pipelines.views import ViewParameters

PLAIN = Recipe(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def encoded(image: Image.Image, **settings) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return np.frombuffer(file.getvalue(), np.uint8)


def noise(height, width) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def parameters(box, flip=False) -> ViewParameters:
    none = np.full((1, 1, 4), -1, np.int8)
    return ViewParameters(np.array([[box]], np.int32), np.array([[flip]]), none, none.astype(np.float32), np.array([[False]]))


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
