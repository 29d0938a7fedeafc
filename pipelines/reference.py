"""The reference: the same views by Pillow and torchvision, from the same draws. Slow, plain, and what parity is held to."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.recipes import Recipe
from pipelines.views import OPERATIONS, ViewParameters

_ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def decode(encoded: np.ndarray) -> torch.Tensor:
    """(3, H, W) uint8 of an encoded image, upright and in RGB."""
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return F.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


def reference_view(
    image_CHW: torch.Tensor, parameters: ViewParameters, patch: int, view: int, *, recipe: Recipe, image_size: int
) -> torch.Tensor:
    """One view of one patch by torchvision: (3, S, S) float32. Resized in uint8 (as DALI does), colours in float."""
    top, left, height, width = (int(v) for v in parameters.box[patch, view])
    size = [image_size, image_size]
    x = F.resized_crop(image_CHW, top, left, height, width, size, InterpolationMode.BILINEAR, antialias=True)
    if parameters.flip[patch, view]:
        x = F.horizontal_flip(x)
    x = F.to_dtype(x, torch.float32, scale=True)
    for operation in parameters.order[patch, view]:
        if operation >= 0:
            x = _ADJUST[OPERATIONS[operation]](x, float(parameters.factors[patch, view, operation]))
    if parameters.grey[patch, view]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    return F.normalize(x, list(recipe.mean), list(recipe.std))


def reference_views(encoded: list[np.ndarray], parameters: ViewParameters, *, recipe: Recipe, image_size: int) -> torch.Tensor:
    """All views of a batch: (V, B, 3, S, S) float32."""
    images = [decode(data) for data in encoded]
    views = [
        [reference_view(image, parameters, i, view, recipe=recipe, image_size=image_size) for i, image in enumerate(images)]
        for view in range(recipe.views)
    ]
    return torch.stack([torch.stack(batch) for batch in views])
