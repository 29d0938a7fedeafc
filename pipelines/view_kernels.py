"""The exact step behind the decoder: box and resize, mirror and turn, stains, jitter in the drawn order with clipping after each
operation, grey, normalisation, blur.

Equal to torchvision's float operations (torchvision.transforms.v2.functional): contrast blends with the image's grey
mean, hue turns in HSV. DALI's own colour operators do neither (it centres contrast on 128 and turns hue in YIQ), and where it
makes images smaller its resize repeats the pixels at the border, up to 15 levels off. So this one is ours: a Numba function
that DALI calls inside its graph on the CPU, and for a GPU the same steps behind DALI's resize in torch.

Both take one parameter row per image, made by `colour_rows`. The Numba functions stay in this one file: the compiled code that
Numba keeps on disk does not notice changes in another.
"""

import ctypes
import functools

import numba
import numpy as np
import torch
from numba import njit

from pipelines.recipes import DARKEST, RGB_FROM_HED, Recipe, kernel_size
from pipelines.views import ViewParameters

# A row: four operation indices in their order (-1: none), four factors by OPERATIONS, grey (0 or 1),
# then scale and offset per channel of the normalisation (x * scale + offset, x in [0, 1]),
# then where a view's pixels lie in its image: mirrored in the image's rows, in its columns, rows and columns exchanged (0 or 1),
# then sigma of the blur in pixels (0: none) and its kernel in percent of the view's side,
# then whether it is stained anew (0 or 1), and by which 3 x 3 matrix and offset of log2 of the light (see `_stain_rows`),
# then the box in pixels of the image: top, left, height, width.
ROW = 37
_SIGMA, _KERNEL, _STAINED, _MATRIX, _OFFSET, _BOX = 18, 19, 20, 21, 30, 33
_MIRROR_ROWS, _MIRROR_COLUMNS, _EXCHANGE = 15, 16, 17
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# ITU-R BT.601 luma, with torchvision's digits
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ONE, _ZERO, _FOUR, _SIX = np.float32(1), np.float32(0), np.float32(4), np.float32(6)
_TO_UNIT, _DARKEST = np.float32(1 / 255), np.float32(DARKEST)
# Taps whose weights add up to less than this are left out: a four-hundredth of a level between black and white.
_NEGLIGIBLE = 1e-5


def colour_rows(parameters: ViewParameters, recipe: Recipe) -> np.ndarray:
    """(B, V, 37) float32: what the step needs to know about each view."""
    rows = np.zeros((*parameters.flip.shape, ROW), np.float32)
    rows[..., 0:4] = parameters.order
    rows[..., 4:8] = parameters.factors
    rows[..., 8] = parameters.grey
    rows[..., 9:12] = 1 / np.asarray(recipe.std)
    rows[..., 12:15] = -np.asarray(recipe.mean) / np.asarray(recipe.std)
    # Flips and turns as two mirrors of the image and an exchange of rows and columns behind them: a quarter turn needs one
    # mirror, half a turn both.
    rows[..., _MIRROR_ROWS] = parameters.vertical ^ (parameters.turns >= 2)
    rows[..., _MIRROR_COLUMNS] = parameters.flip ^ ((parameters.turns == 1) | (parameters.turns == 2))
    rows[..., _EXCHANGE] = parameters.turns % 2
    if recipe.blur is not None:
        rows[..., _SIGMA], rows[..., _KERNEL] = parameters.sigma, recipe.blur.kernel
    if recipe.stain is not None:
        rows[..., _STAINED:_BOX] = _stain_rows(parameters.stain)
    rows[..., _BOX:] = parameters.box
    return rows


def _stain_rows(stain: np.ndarray) -> np.ndarray:
    """(B, V, 2, 3) factors and summands of three stains -> (B, V, 13): 1, a 3 x 3 matrix A, an offset b.

    With M = RGB_FROM_HED the densities d (a row, by channel) become (d inv(M) diag(factor) + summand) M = d A - b / log2(10),
    and of the light x, where d = -log10(x), log2(x) becomes log2(x) A + b.
    """
    to_rgb = np.array(RGB_FROM_HED)
    matrix = np.linalg.inv(to_rgb) @ (stain[..., 0, :, None] * to_rgb)
    offset = -np.log2(10) * (stain[..., 1, :] @ to_rgb)
    return np.concatenate([np.ones((*stain.shape[:2], 1)), matrix.reshape(*stain.shape[:2], 9), offset], axis=-1)


# One simple loop per operation over a row of pixels: LLVM vectorises each of them. A loop over pixels with the operations
# inside was ten times slower.


@njit(cache=True)
def _spread(pixels, r, g, b):
    for x in range(r.size):
        r[x] = pixels[x, 0] * _TO_UNIT
        g[x] = pixels[x, 1] * _TO_UNIT
        b[x] = pixels[x, 2] * _TO_UNIT


@njit(cache=True)
def _reverse(channel):
    for x in range(channel.size // 2):
        other = channel[channel.size - 1 - x]
        channel[channel.size - 1 - x] = channel[x]
        channel[x] = other


@njit(cache=True)
def _exchange(plane):
    """Rows for columns, in place, in blocks that stay in the nearest cache."""
    side = plane.shape[0]
    assert plane.shape[1] == side
    for top in range(0, side, 16):
        for left in range(0, top + 1, 16):
            for y in range(top, min(top + 16, side)):
                for x in range(left, min(left + 16, y)):
                    other = plane[x, y]
                    plane[x, y] = plane[y, x]
                    plane[y, x] = other


@njit(cache=True)
def _triangles(size, new_size):
    """Which pixels a new pixel is made of: (new_size,) first, (new_size,) number, (new_size, most) weights of sum 1.

    torchvision's bilinear resize with antialias: a triangle as wide as two old or two new pixels, whichever is more, cut off at
    the image's border.
    """
    scale = size / new_size
    reach = max(scale, 1.0)
    first, number = np.empty(new_size, np.int64), np.empty(new_size, np.int64)
    weights = np.zeros((new_size, int(2 * reach) + 3), np.float32)
    for i in range(new_size):
        centre = scale * (i + 0.5)
        first[i] = max(int(centre - reach + 0.5), 0)
        number[i] = min(int(centre + reach + 0.5), size) - first[i]
        total = 0.0
        for k in range(number[i]):
            weight = max(1 - abs(first[i] + k + 0.5 - centre) / reach, 0.0)
            weights[i, k] = weight
            total += weight
        for k in range(number[i]):
            weights[i, k] /= total
    return first, number, weights


@njit(cache=True)
def _add_scaled(line, pixels, weight):
    for x in range(line.size):
        line[x] += np.float32(pixels[x]) * weight


@njit(cache=True)
def _gather(line, first, number, weights, r, g, b):
    for x in range(r.size):
        red, green, blue = _ZERO, _ZERO, _ZERO
        at = 3 * first[x]
        for k in range(number[x]):
            weight = weights[x, k]
            red += weight * line[at]
            green += weight * line[at + 1]
            blue += weight * line[at + 2]
            at += 3
        r[x] = red
        g[x] = green
        b[x] = blue


@njit(cache=True)
def _resize(out, image, row):
    """The box of the image as large as out, in [0, 1], mirrored."""
    top, left, box_height, box_width = int(row[33]), int(row[34]), int(row[35]), int(row[36])
    height, width = out.shape[1], out.shape[2]
    flat = image.reshape(image.shape[0], image.shape[1] * 3)
    first_y, number_y, weights_y = _triangles(box_height, height)
    first_x, number_x, weights_x = _triangles(box_width, width)
    line = np.empty(3 * box_width, np.float32)
    for y in range(height):
        line[:] = _ZERO
        for k in range(number_y[y]):
            pixels = flat[top + first_y[y] + k, 3 * left : 3 * (left + box_width)]
            _add_scaled(line, pixels, weights_y[y, k] * _TO_UNIT)
        at = height - 1 - y if row[_MIRROR_ROWS] > 0 else y
        _gather(line, first_x, number_x, weights_x, out[0, at], out[1, at], out[2, at])
        if row[_MIRROR_COLUMNS] > 0:
            for channel in range(3):
                _reverse(out[channel, at])


# Chebyshev interpolations, lowest power first: log2(1 + t) / t and 2**t for t in [0, 1], both to within 1.2e-6.
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (
    np.float32(c) for c in (1.4426930, -0.72114408, 0.47749636, -0.33837721, 0.21394321, -0.09462681, 0.02001665)
)
_E0, _E1, _E2, _E3, _E4, _E5 = (np.float32(c) for c in (0.99999988, 0.69315451, 0.24014182, 0.05586034, 0.00894959, 0.00189375))


@njit(cache=True)
def _log2(channel):
    """Exponent and mantissa apart, and a polynomial for the latter; LLVM does not vectorise the library's logarithm."""
    for x in range(channel.size):
        bits = np.float32(max(channel[x], _DARKEST)).view(np.int32)
        t = np.int32((bits & 0x7FFFFF) | 0x3F800000).view(np.float32) - _ONE
        p = ((((((_L6 * t + _L5) * t + _L4) * t + _L3) * t + _L2) * t + _L1) * t + _L0) * t
        channel[x] = np.float32(np.int32(bits >> 23) - 127) + p


@njit(cache=True)
def _exp2(channel):
    """The same backwards, of numbers from -126 to 0: more than 0 is clipped to white."""
    for x in range(channel.size):
        power = min(max(channel[x], np.float32(-126)), _ZERO)
        whole = np.floor(power)
        t = power - whole
        p = ((((_E5 * t + _E4) * t + _E3) * t + _E2) * t + _E1) * t + _E0
        channel[x] = min(p * np.int32((np.int32(whole) + 127) << 23).view(np.float32), _ONE)


@njit(cache=True)
def _restain(r, g, b, row):
    _log2(r)
    _log2(g)
    _log2(b)
    for x in range(r.size):
        red, green, blue = r[x], g[x], b[x]
        r[x] = red * row[21] + green * row[24] + blue * row[27] + row[30]
        g[x] = red * row[22] + green * row[25] + blue * row[28] + row[31]
        b[x] = red * row[23] + green * row[26] + blue * row[29] + row[32]
    _exp2(r)
    _exp2(g)
    _exp2(b)


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
def _add_grey(greys, r, g, b):
    for x in range(r.size):
        greys[x] += _RED * r[x] + _GREEN * g[x] + _BLUE * b[x]


@njit(cache=True)
def _make_grey(r, g, b):
    for x in range(r.size):
        grey = _RED * r[x] + _GREEN * g[x] + _BLUE * b[x]
        r[x] = grey
        g[x] = grey
        b[x] = grey


@njit(cache=True)
def _normalise(channel, scale, offset):
    for x in range(channel.size):
        channel[x] = channel[x] * scale + offset


@njit(cache=True)
def _kernel(sigma, radius):
    """torchvision's kernel from its centre outwards, without the outer taps that weigh next to nothing."""
    weights = np.empty(radius + 1, np.float32)
    total = 0.0
    for k in range(weights.size):
        weights[k] = np.exp(-0.5 * (k / sigma) ** 2)
        total += weights[k] if k == 0 else 2 * weights[k]
    kept, rest = weights.size, 0.0
    for k in range(weights.size):
        weights[k] /= total
    while kept > 1 and rest + 2 * weights[kept - 1] < _NEGLIGIBLE:
        rest += 2 * weights[kept - 1]
        kept -= 1
    return weights[:kept]


@njit(cache=True)
def _add_pair(line, before, after, weight):
    for x in range(line.size):
        line[x] += weight * (before[x] + after[x])


@njit(cache=True)
def _blur(plane, weights):
    """Blur one channel in place, first along its rows and then across; beyond the border it is reflected."""
    height, width = plane.shape
    radius = weights.size - 1
    padded = np.empty(width + 2 * radius, np.float32)
    for y in range(height):
        line = plane[y]
        for x in range(width):
            padded[radius + x] = line[x]
        for k in range(1, radius + 1):
            padded[radius - k] = line[k]
            padded[radius + width - 1 + k] = line[width - 1 - k]
        _normalise(line, weights[0], _ZERO)
        for k in range(1, radius + 1):
            _add_pair(line, padded[radius - k : radius - k + width], padded[radius + k : radius + k + width], weights[k])
    # Across, a row is wanted as it was by the rows below it: the last ones are kept.
    kept = np.empty((radius + 1, width), np.float32)
    for y in range(height):
        line, copy = plane[y], kept[y % (radius + 1)]
        for x in range(width):
            copy[x] = line[x]
        _normalise(line, weights[0], _ZERO)
        for k in range(1, radius + 1):
            above, below = abs(y - k), y + k
            if below >= height:
                below = 2 * (height - 1) - below
            before = kept[above % (radius + 1)] if above <= y else plane[above]
            after = kept[below % (radius + 1)] if below <= y else plane[below]
            _add_pair(line, before, after, weights[k])


@njit(cache=True)
def view_step(out, image, row):
    """image: (H, W, 3) uint8, row: (37,) float32 of `colour_rows` -> out: (3, S, S) float32, a view of the patch."""
    _resize(out, image, row)
    _finish(out, row)


@functools.cache
def view_step_at():
    """view_step as a C function, compiled once and kept on disk: of the addresses of out, image and row, of S, and of the image's
    height and width. The address of out is an integer, so that it may be reckoned."""
    pointer, integer = numba.types.CPointer, numba.types.int64

    @numba.cfunc(
        numba.types.void(
            pointer(numba.types.float32),
            pointer(numba.types.uint8),
            pointer(numba.types.float32),
            integer,
            integer,
            integer,
        ),
        cache=True,
    )
    def step(out, image, row, side, height, width):
        view_step(
            numba.carray(out, (3, side, side)),
            numba.carray(image, (height, width, 3)),
            numba.carray(row, (ROW,)),
        )

    assert step.address is not None
    at = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)(step.address)
    at.step = step  # type: ignore[attr-defined]  # the compiled code lives as long as this does
    return at


@njit(cache=True)
def colour_step(out, image, row):
    """The same without box and resize: image: (S, S, 3) uint8, or float32 in levels of 255 -> out: (3, S, S) float32."""
    for y in range(out.shape[1]):
        at = out.shape[1] - 1 - y if row[_MIRROR_ROWS] > 0 else y
        _spread(image[y], out[0, at], out[1, at], out[2, at])
        if row[_MIRROR_COLUMNS] > 0:
            for channel in range(3):
                _reverse(out[channel, at])
    _finish(out, row)


@njit(cache=True)
def _finish(out, row):
    """What comes behind the mirrors, in place."""
    if row[_EXCHANGE] > 0:
        for channel in range(3):
            _exchange(out[channel])
    height, width = out.shape[1], out.shape[2]
    contrast_at = 4
    for k in range(4):
        if int(row[k]) == _CONTRAST:
            contrast_at = k
    # Contrast needs the mean grey of the whole image after the operations before it, so there are two sweeps.
    greys = np.zeros(width, np.float32)
    for y in range(height):
        r, g, b = out[0, y], out[1, y], out[2, y]
        if row[_STAINED] > 0:
            _restain(r, g, b, row)
        for k in range(contrast_at):
            _apply(int(row[k]), r, g, b, row, _ZERO)
        if contrast_at < 4:
            _add_grey(greys, r, g, b)
    total = 0.0
    for x in range(width):
        total += greys[x]
    mean = np.float32(total / (height * width))
    for y in range(height):
        r, g, b = out[0, y], out[1, y], out[2, y]
        for k in range(contrast_at, 4):
            _apply(int(row[k]), r, g, b, row, mean)
        if row[8] > 0:
            _make_grey(r, g, b)
        _normalise(r, row[9], row[12])
        _normalise(g, row[10], row[13])
        _normalise(b, row[11], row[14])
    if row[_SIGMA] > 0:
        weights = _kernel(np.float64(row[_SIGMA]), min(height, width) * int(row[_KERNEL]) // 100 // 2)
        if weights.size > 1:
            for channel in range(3):
                _blur(out[channel], weights)


def box_sizes(rows_BR: np.ndarray) -> np.ndarray:
    """(B, 2) float32: height and width of the box, pixels of the image."""
    return rows_BR[:, _BOX + 2 : _BOX + 4]


def reach(sizes_B2: np.ndarray, image_size: int) -> np.ndarray:
    """(B, 2) int32: how many pixels beyond a box of such height and width an antialiased resize may look, and one more."""
    return np.ceil(np.maximum(sizes_B2 / image_size, 1)).astype(np.int32) + 1


def inside_weights(sizes_B2: np.ndarray, image_size: int, device: torch.device) -> list[torch.Tensor]:
    """For rows and for columns, (B, S) float32: the share of each new pixel's weights that lies inside the box, above 0 to 1.

    A resize that adds up zeros beyond the box gives torchvision's pixels when it is divided by both.
    """
    sizes_2B1 = torch.from_numpy(np.ascontiguousarray(sizes_B2.T)).to(device, non_blocking=True)[:, :, None]
    scale = sizes_2B1 / image_size
    width = scale.clamp(min=1)
    centre_2BS = scale * (torch.arange(image_size, device=device) + 0.5)
    first_2BS = (centre_2BS - width).floor()
    inside_2BS, all_2BS = torch.zeros_like(centre_2BS), torch.zeros_like(centre_2BS)
    # One by one: how a sum over a dimension is split may depend on its length, and so on the other patches of the batch.
    for k in range(2 * int(reach(sizes_B2, image_size).max()) + 1):
        pixel_2BS = first_2BS + k
        weight_2BS = (1 - (pixel_2BS + 0.5 - centre_2BS).abs() / width).clamp_(min=0)
        all_2BS += weight_2BS
        inside_2BS += torch.where((pixel_2BS >= 0) & (pixel_2BS < sizes_2B1), weight_2BS, 0)
    return list(inside_2BS / all_2BS)


def colour_batch(images_BHWC: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """The same step for a batch in torch, for a GPU: (B, H, W, 3) uint8 or float32 levels, (B, 37) rows -> (B, 3, H, W) float32.

    Which images take which operation is known on the host, and constants are numbers and not tensors, so nothing waits for
    the device. Where rows and columns are exchanged, H equals W.
    """
    device = images_BHWC.device
    rows_BR = torch.from_numpy(rows).to(device, non_blocking=True)
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) * (1 / 255)
    x_BCHW = _move(x_BCHW, rows, rows_BR)
    if (rows[:, _STAINED] > 0).any():
        x_BCHW = torch.where(_column(rows_BR, _STAINED) > 0, _restain_batch(x_BCHW, rows_BR), x_BCHW)
    for place in range(4):
        for operation in range(4):
            chosen = np.flatnonzero(rows[:, place] == operation)
            if len(chosen) == 0:
                continue
            index = torch.from_numpy(chosen).to(device, non_blocking=True)
            x_BCHW[index] = _operate(x_BCHW[index], operation, _column(rows_BR[index], 4 + operation))
    x_BCHW = torch.where(_column(rows_BR, 8) > 0, _luma(x_BCHW), x_BCHW)
    normalise = rows_BR[:, 9:15].view(-1, 2, 3, 1, 1)
    x_BCHW = x_BCHW * normalise[:, 0] + normalise[:, 1]
    chosen = np.flatnonzero(rows[:, _SIGMA] > 0)
    if len(chosen):
        index = torch.from_numpy(chosen).to(device, non_blocking=True)
        x_BCHW[index] = _blur_batch(x_BCHW[index], rows[chosen])
    return x_BCHW


def _column(rows_nR, column):
    return rows_nR[:, column].view(-1, 1, 1, 1)


def _move(x_BCHW, rows, rows_BR):
    for column, dim in ((_MIRROR_ROWS, 2), (_MIRROR_COLUMNS, 3)):
        if (rows[:, column] > 0).any():
            x_BCHW = torch.where(_column(rows_BR, column) > 0, x_BCHW.flip(dim), x_BCHW)
    if (rows[:, _EXCHANGE] > 0).any():
        x_BCHW = torch.where(_column(rows_BR, _EXCHANGE) > 0, x_BCHW.transpose(2, 3), x_BCHW)
    return x_BCHW


def _restain_batch(x_BCHW, rows_BR):
    light_BCHW = x_BCHW.clamp(min=DARKEST).log2()
    # Not a matrix product: a GPU may be allowed to round its factors to ten bits.
    mixed_BCHW = rows_BR[:, _OFFSET : _OFFSET + 3].view(-1, 3, 1, 1)
    for channel, weights_BC in enumerate(rows_BR[:, _MATRIX:_OFFSET].view(-1, 3, 3).unbind(1)):
        mixed_BCHW = mixed_BCHW + light_BCHW[:, channel : channel + 1] * weights_BC.view(-1, 3, 1, 1)
    return mixed_BCHW.exp2().clamp(max=1)


def _blur_batch(x_nCHW, rows):
    """Taps are added one by one over the whole batch: how a convolution adds them up may depend on the size of the batch."""
    side = min(x_nCHW.shape[2:])
    radius = max(kernel_size(side, int(percent)) for percent in rows[:, _KERNEL]) // 2
    if radius == 0:
        return x_nCHW
    weights = np.zeros((len(rows), radius + 1), np.float32)
    for weights_of_one, row in zip(weights, rows, strict=True):
        found = _kernel(float(row[_SIGMA]), kernel_size(side, int(row[_KERNEL])) // 2)
        weights_of_one[: len(found)] = found
    weights_n1 = torch.from_numpy(weights).to(x_nCHW.device, non_blocking=True)
    for dim, border in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, size = torch.nn.functional.pad(x_nCHW, border, mode="reflect"), x_nCHW.shape[dim]
        x_nCHW = x_nCHW * _column(weights_n1, 0)
        for k in range(1, radius + 1):
            pair = padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size)
            x_nCHW.addcmul_(pair, _column(weights_n1, k))
    return x_nCHW


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
