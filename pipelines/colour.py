"""The exact colour step: jitter in the drawn order with clipping after each operation, grey, normalisation.

Equal to torchvision's float operations (torchvision.transforms.v2.functional): contrast blends with the image's grey
mean, hue turns in HSV. DALI's own colour operators do neither (it centres contrast on 128 and turns hue in YIQ), so this
one is ours: a Numba function that DALI calls inside its graph on the CPU, and the same steps in torch for a GPU.

Both take one parameter row per image, made by `colour_rows`.
"""

import numpy as np
import torch
from numba import njit

from pipelines.recipes import Recipe
from pipelines.views import ViewParameters

# A row: four operation indices in their order (-1: none), four factors by OPERATIONS, grey (0 or 1),
# then scale and offset per channel of the normalisation (x * scale + offset, x in [0, 1]).
ROW = 15
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# ITU-R BT.601 luma, with torchvision's digits
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ONE, _ZERO, _FOUR, _SIX = np.float32(1), np.float32(0), np.float32(4), np.float32(6)
_TO_UNIT = np.float32(1 / 255)


def colour_rows(parameters: ViewParameters, recipe: Recipe) -> np.ndarray:
    """(B, V, 15) float32: what the colour step needs to know about each view."""
    rows = np.empty((*parameters.flip.shape, ROW), np.float32)
    rows[..., 0:4] = parameters.order
    rows[..., 4:8] = parameters.factors
    rows[..., 8] = parameters.grey
    rows[..., 9:12] = 1 / np.asarray(recipe.std)
    rows[..., 12:15] = -np.asarray(recipe.mean) / np.asarray(recipe.std)
    return rows


# One simple loop per operation over a row of pixels in three small buffers: LLVM vectorises each of them. A loop over
# pixels with the operations inside was ten times slower.


@njit(cache=True)
def _load(image, y, r, g, b):
    for x in range(r.size):
        r[x] = image[y, x, 0] * _TO_UNIT
        g[x] = image[y, x, 1] * _TO_UNIT
        b[x] = image[y, x, 2] * _TO_UNIT


@njit(cache=True)
def _scale(channel, factor):
    for x in range(channel.size):
        channel[x] = min(max(channel[x] * factor, _ZERO), _ONE)


@njit(cache=True)
def _blend(channel, factor, offset):
    for x in range(channel.size):
        channel[x] = min(max(channel[x] * factor + offset, _ZERO), _ONE)


@njit(cache=True)
def _saturate(r, g, b, factor):
    rest = _ONE - factor
    for x in range(r.size):
        grey = (_RED * r[x] + _GREEN * g[x] + _BLUE * b[x]) * rest
        r[x] = min(max(r[x] * factor + grey, _ZERO), _ONE)
        g[x] = min(max(g[x] * factor + grey, _ZERO), _ONE)
        b[x] = min(max(b[x] * factor + grey, _ZERO), _ONE)


@njit(cache=True)
def _turn(r, g, b, share):
    """Hue: through HSV, without branches; a pixel without chroma has hue 0 and stays as it is."""
    for x in range(r.size):
        high = max(r[x], max(g[x], b[x]))
        chroma = high - min(r[x], min(g[x], b[x]))
        divisor = chroma if chroma > _ZERO else _ONE
        sector_r = (g[x] - b[x]) / divisor
        sector_g = np.float32(2) + (b[x] - r[x]) / divisor
        sector_b = _FOUR + (r[x] - g[x]) / divisor
        sector = sector_r if high == r[x] else (sector_g if high == g[x] else sector_b)
        hue = sector / _SIX + share
        sector = (hue - np.floor(hue)) * _SIX
        k = sector + np.float32(5)
        k -= _SIX * np.floor(k / _SIX)
        r[x] = high - chroma * min(max(min(k, _FOUR - k), _ZERO), _ONE)
        k = sector + np.float32(3)
        k -= _SIX * np.floor(k / _SIX)
        g[x] = high - chroma * min(max(min(k, _FOUR - k), _ZERO), _ONE)
        k = sector + _ONE
        k -= _SIX * np.floor(k / _SIX)
        b[x] = high - chroma * min(max(min(k, _FOUR - k), _ZERO), _ONE)


@njit(cache=True)
def _apply(operation, r, g, b, row, mean):
    if operation == _BRIGHTNESS:
        _scale(r, row[4])
        _scale(g, row[4])
        _scale(b, row[4])
    elif operation == _CONTRAST:
        offset = (_ONE - row[5]) * mean
        _blend(r, row[5], offset)
        _blend(g, row[5], offset)
        _blend(b, row[5], offset)
    elif operation == _SATURATION:
        _saturate(r, g, b, row[6])
    elif operation == _HUE:
        _turn(r, g, b, row[7])


@njit(cache=True)
def _grey_mean(image, row, contrast_at, r, g, b):
    """Mean grey of the image after the operations that come before contrast."""
    total = np.float64(0)
    for y in range(image.shape[0]):
        _load(image, y, r, g, b)
        for k in range(contrast_at):
            _apply(int(row[k]), r, g, b, row, _ZERO)
        line = _ZERO
        for x in range(r.size):
            line += _RED * r[x] + _GREEN * g[x] + _BLUE * b[x]
        total += line
    return np.float32(total / (image.shape[0] * image.shape[1]))


@njit(cache=True)
def colour_step(out, image, row):
    """image: (H, W, 3) uint8, row: (15,) float32 of `colour_rows` -> out: (3, H, W) float32, normalised."""
    height, width = image.shape[0], image.shape[1]
    r, g, b = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    mean = _ZERO
    for k in range(4):
        if int(row[k]) == _CONTRAST:
            mean = _grey_mean(image, row, k, r, g, b)
    for y in range(height):
        _load(image, y, r, g, b)
        for k in range(4):
            _apply(int(row[k]), r, g, b, row, mean)
        if row[8] > 0:
            for x in range(width):
                grey = _RED * r[x] + _GREEN * g[x] + _BLUE * b[x]
                r[x] = grey
                g[x] = grey
                b[x] = grey
        for x in range(width):
            out[0, y, x] = r[x] * row[9] + row[12]
        for x in range(width):
            out[1, y, x] = g[x] * row[10] + row[13]
        for x in range(width):
            out[2, y, x] = b[x] * row[11] + row[14]


def colour_batch(images_BHWC: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """The same step for a batch in torch, for a GPU: (B, H, W, 3) uint8 and (B, 15) rows -> (B, 3, H, W) float32.

    Which images take which operation is known on the host, and constants are numbers and not tensors, so nothing waits for
    the device.
    """
    device = images_BHWC.device
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) * (1 / 255)
    for place in range(4):
        for operation in range(4):
            chosen = np.flatnonzero(rows[:, place] == operation)
            if len(chosen) == 0:
                continue
            index = torch.from_numpy(chosen).to(device, non_blocking=True)
            factor_n111 = torch.from_numpy(rows[chosen, 4 + operation]).to(device, non_blocking=True).view(-1, 1, 1, 1)
            x_BCHW[index] = _operate(x_BCHW[index], operation, factor_n111)
    greyed = torch.from_numpy(rows[:, 8] > 0).to(device, non_blocking=True).view(-1, 1, 1, 1)
    x_BCHW = torch.where(greyed, _luma(x_BCHW), x_BCHW)
    normalise = torch.from_numpy(rows[:, 9:15]).to(device, non_blocking=True).view(-1, 2, 3, 1, 1)
    return x_BCHW * normalise[:, 0] + normalise[:, 1]


def _luma(x_nCHW):
    r, g, b = x_nCHW.split(1, dim=1)
    return float(_RED) * r + float(_GREEN) * g + float(_BLUE) * b


def _operate(x_nCHW, operation, factor_n111):
    if operation == _BRIGHTNESS:
        return (x_nCHW * factor_n111).clamp_(0, 1)
    if operation in (_CONTRAST, _SATURATION):
        grey = _luma(x_nCHW)
        if operation == _CONTRAST:
            # In double: how torch splits the sum depends on the number of images, and a view must not.
            grey = grey.mean(dim=(2, 3), keepdim=True, dtype=torch.float64).float()
        return (x_nCHW * factor_n111 + grey * (1 - factor_n111)).clamp_(0, 1)
    high_n1HW = x_nCHW.amax(1, keepdim=True)
    chroma_n1HW = high_n1HW - x_nCHW.amin(1, keepdim=True)
    divisor = torch.where(chroma_n1HW > 0, chroma_n1HW, 1)
    r, g, b = x_nCHW.split(1, dim=1)
    sector = torch.where(
        high_n1HW == r, (g - b) / divisor, torch.where(high_n1HW == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    )
    sector = torch.remainder(sector / 6 + factor_n111, 1) * 6
    k_nCHW = torch.remainder(torch.cat([sector + 5, sector + 3, sector + 1], dim=1), 6)
    return high_n1HW - chroma_n1HW * torch.minimum(k_nCHW, 4 - k_nCHW).clamp_(0, 1)
