"""The reference: the same views with Pillow and torchvision, from the same random numbers. Slow; parity tests compare with it."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.recipes import DARKEST, RGB_FROM_HED, Recipe, kernel_size
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
    image_CHW: torch.Tensor,
    parameters: ViewParameters,
    patch: int,
    view: int,
    *,
    recipe: Recipe,
    image_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One view of one patch by torchvision: (3, S, S) float32.

    dtype: between operations. float32 rounds nothing; torch.uint8 rounds to whole levels after each, as torchvision does.
    """
    top, left, height, width = (int(v) for v in parameters.box[patch, view])
    size = [image_size, image_size]
    x = F.to_dtype(image_CHW, dtype, scale=True)
    x = F.resized_crop(x, top, left, height, width, size, InterpolationMode.BILINEAR, antialias=True)
    if parameters.flip[patch, view]:
        x = F.horizontal_flip(x)
    if parameters.vertical[patch, view]:
        x = F.vertical_flip(x)
    x = torch.rot90(x, int(parameters.turns[patch, view]), dims=(1, 2))
    if recipe.stain is not None:
        x = restain(x, *torch.from_numpy(parameters.stain[patch, view]))
    for operation in parameters.order[patch, view]:
        if operation >= 0:
            x = _ADJUST[OPERATIONS[operation]](x, float(parameters.factors[patch, view, operation]))
    if parameters.grey[patch, view]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if parameters.sigma[patch, view] > 0:
        assert recipe.blur is not None
        taps = kernel_size(image_size, recipe.blur.kernel)
        x = F.gaussian_blur(x, [taps, taps], [float(parameters.sigma[patch, view])])
    return F.normalize(F.to_dtype(x, torch.float32, scale=True), list(recipe.mean), list(recipe.std))


def restain(x_CHW: torch.Tensor, factor_3: torch.Tensor, summand_3: torch.Tensor) -> torch.Tensor:
    """Each stain's optical density times a factor, plus a number (haematoxylin, eosin, DAB): (3, H, W), of x_CHW's dtype.

    Stains are separated by the matrix of Ruifrok & Johnston 2001; torchvision has no such operation.
    """
    rgb_from_hed = torch.tensor(RGB_FROM_HED, dtype=torch.float64)
    light_HWC = F.to_dtype(x_CHW, torch.float64, scale=True).clamp(min=DARKEST).permute(1, 2, 0)
    hed = -light_HWC.log10() @ torch.linalg.inv(rgb_from_hed) * factor_3.double() + summand_3.double()
    stained_HWC = (10 ** -(hed @ rgb_from_hed)).clamp(0, 1)
    return F.to_dtype(stained_HWC.permute(2, 0, 1), x_CHW.dtype, scale=True)


def reference_views(encoded: list[np.ndarray], parameters: ViewParameters, *, recipe: Recipe, image_size: int) -> torch.Tensor:
    """All views of a batch: (V, B, 3, S, S) float32."""
    images = [decode(data) for data in encoded]
    views = [
        [reference_view(image, parameters, i, view, recipe=recipe, image_size=image_size) for i, image in enumerate(images)]
        for view in range(recipe.views)
    ]
    return torch.stack([torch.stack(batch) for batch in views])
