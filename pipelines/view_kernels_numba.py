"""The CPU's augmentation kernels: a decoded image and one row of parameters in, a normalised view out.

Crop and resize, flips and turns, stain jitter, colour jitter in the drawn order, grey, normalisation and blur. Each operation
equals torchvision's on floats (torchvision.transforms.v2.functional) and clips as it does: contrast blends with the image's grey
mean, hue turns in HSV. DALI's own operators do neither (contrast centres on 128, hue turns in YIQ), and its resize repeats border
pixels when it shrinks, which is up to 15 levels off. So DALI calls this Numba function inside its graph.
`view_kernels_torch` does the same on a GPU.

All Numba functions, and the columns of the row that they read, stay in this file, hence its more than 400 lines: Numba's cache on
disk looks at the time stamp of a function's own file alone. It would miss a change in another module that the function calls or
takes a constant from.
"""

import ctypes
import enum
import functools

import numba
import numpy as np
from numba import njit

from pipelines.recipes import DARKEST, RGB_FROM_HED, Recipe
from pipelines.views import ViewParameters


class Column(enum.IntEnum):
    """What the columns of a parameter row hold; the first one, where several belong together."""

    ORDER = 0  # 4: indices into views.OPERATIONS in the order of application, -1 for none
    FACTOR = 4  # 4: by views.OPERATIONS
    GREY = 8  # 0 or 1
    SCALE = 9  # 3: normalisation by channel, x * scale + shift for x in [0, 1]
    SHIFT = 12  # 3
    # Flips and turns: where a view's pixels lie in its image. Mirrors come before the transposition; each is 0 or 1.
    MIRROR_ROWS = 15
    MIRROR_COLUMNS = 16
    TRANSPOSE = 17
    SIGMA = 18  # of the blur, pixels; 0 for none
    KERNEL = 19  # size of the blur's window, percent of the view's side
    STAINED = 20  # 0 or 1
    STAIN_MATRIX = 21  # 9: 3 x 3 by rows, see `_stain_columns`
    STAIN_OFFSET = 30  # 3
    TOP = 33  # the box, pixels of the image
    LEFT = 34
    HEIGHT = 35
    WIDTH = 36


COLUMNS = Column.WIDTH + 1
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# ITU-R BT.601 luma, with torchvision's digits
LUMA_RED, LUMA_GREEN, LUMA_BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ONE, _ZERO, _FOUR, _SIX = np.float32(1), np.float32(0), np.float32(4), np.float32(6)
_TO_UNIT, _DARKEST = np.float32(1 / 255), np.float32(DARKEST)
# Outer taps of the blur whose weights sum to less than this are left out: 1/400 of a level between black and white.
_NEGLIGIBLE = 1e-5


def parameter_rows(parameters: ViewParameters, recipe: Recipe) -> np.ndarray:
    """(B, V, COLUMNS) float32: for each view, what the kernels need to know of it."""
    rows = np.zeros((*parameters.flip.shape, COLUMNS), np.float32)
    rows[..., Column.ORDER : Column.FACTOR] = parameters.order
    rows[..., Column.FACTOR : Column.GREY] = parameters.factors
    rows[..., Column.GREY] = parameters.grey
    rows[..., Column.SCALE : Column.SHIFT] = 1 / np.asarray(recipe.std)
    rows[..., Column.SHIFT : Column.MIRROR_ROWS] = -np.asarray(recipe.mean) / np.asarray(recipe.std)
    # A quarter turn is one mirror and a transposition, half a turn is both mirrors.
    rows[..., Column.MIRROR_ROWS] = parameters.vertical ^ (parameters.turns >= 2)
    rows[..., Column.MIRROR_COLUMNS] = parameters.flip ^ ((parameters.turns == 1) | (parameters.turns == 2))
    rows[..., Column.TRANSPOSE] = parameters.turns % 2
    if recipe.blur is not None:
        rows[..., Column.SIGMA], rows[..., Column.KERNEL] = parameters.sigma, recipe.blur.kernel
    if recipe.stain is not None:
        rows[..., Column.STAINED] = 1
        rows[..., Column.STAIN_MATRIX : Column.TOP] = _stain_columns(parameters.stain)
    rows[..., Column.TOP :] = parameters.box
    return rows


def _stain_columns(stain: np.ndarray) -> np.ndarray:
    """(B, V, 2, 3) factors and summands of three stains -> (B, V, 12): a 3 x 3 matrix A and an offset b, such that log2 of the
    light x becomes log2(x) A + b.

    With M = RGB_FROM_HED, the densities d = -log10(x), a row by channel, become (d inv(M) diag(factor) + summand) M.
    """
    to_rgb = np.array(RGB_FROM_HED)
    matrix = np.linalg.inv(to_rgb) @ (stain[..., 0, :, None] * to_rgb)
    offset = -np.log2(10) * (stain[..., 1, :] @ to_rgb)
    return np.concatenate([matrix.reshape(*stain.shape[:2], 9), offset], axis=-1)


# Each operation is one simple loop over a row of pixels, which LLVM vectorises. One loop over pixels with all operations inside
# was ten times slower.


@njit(cache=True)
def _to_planes(pixels, r, g, b):
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
def _transpose(plane):
    """Transpose a square plane in place, in blocks that fit the first-level cache."""
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
def _resize_weights(size, new_size):
    """The source pixels of each new pixel: index of the first (new_size,), count (new_size,), weights of sum 1 (new_size, most).

    As torchvision's bilinear resize with antialiasing: a triangle as wide as two old or two new pixels, whichever is more, cut
    off at the image's border.
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
def _resize_row(line, first, number, weights, r, g, b):
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
    """Crop the box, resize it to the size of out, scale it to [0, 1] and mirror it."""
    top, left, box_height, box_width = (
        int(row[Column.TOP]),
        int(row[Column.LEFT]),
        int(row[Column.HEIGHT]),
        int(row[Column.WIDTH]),
    )
    height, width = out.shape[1], out.shape[2]
    flat = image.reshape(image.shape[0], image.shape[1] * 3)
    first_y, number_y, weights_y = _resize_weights(box_height, height)
    first_x, number_x, weights_x = _resize_weights(box_width, width)
    line = np.empty(3 * box_width, np.float32)
    for y in range(height):
        line[:] = _ZERO
        for k in range(number_y[y]):
            pixels = flat[top + first_y[y] + k, 3 * left : 3 * (left + box_width)]
            _add_scaled(line, pixels, weights_y[y, k] * _TO_UNIT)
        at = height - 1 - y if row[Column.MIRROR_ROWS] > 0 else y
        _resize_row(line, first_x, number_x, weights_x, out[0, at], out[1, at], out[2, at])
        if row[Column.MIRROR_COLUMNS] > 0:
            for channel in range(3):
                _reverse(out[channel, at])


# Chebyshev interpolations, lowest power first: log2(1 + t) / t and 2**t for t in [0, 1], both to within 1.2e-6.
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (
    np.float32(c) for c in (1.4426930, -0.72114408, 0.47749636, -0.33837721, 0.21394321, -0.09462681, 0.02001665)
)
_E0, _E1, _E2, _E3, _E4, _E5 = (np.float32(c) for c in (0.99999988, 0.69315451, 0.24014182, 0.05586034, 0.00894959, 0.00189375))


@njit(cache=True)
def _log2(channel):
    """Exponent plus a polynomial of the mantissa: LLVM does not vectorise the library's logarithm."""
    for x in range(channel.size):
        bits = np.float32(max(channel[x], _DARKEST)).view(np.int32)
        t = np.int32((bits & 0x7FFFFF) | 0x3F800000).view(np.float32) - _ONE
        p = ((((((_L6 * t + _L5) * t + _L4) * t + _L3) * t + _L2) * t + _L1) * t + _L0) * t
        channel[x] = np.float32(np.int32(bits >> 23) - 127) + p


@njit(cache=True)
def _exp2(channel):
    """The inverse, for numbers from -126 to 0; those above 0 are clipped to white."""
    for x in range(channel.size):
        power = min(max(channel[x], np.float32(-126)), _ZERO)
        whole = np.floor(power)
        t = power - whole
        p = ((((_E5 * t + _E4) * t + _E3) * t + _E2) * t + _E1) * t + _E0
        channel[x] = min(p * np.int32((np.int32(whole) + 127) << 23).view(np.float32), _ONE)


@njit(cache=True)
def _change_stains(r, g, b, row):
    m, offset = row[Column.STAIN_MATRIX : Column.STAIN_OFFSET], row[Column.STAIN_OFFSET : Column.TOP]
    _log2(r)
    _log2(g)
    _log2(b)
    for x in range(r.size):
        red, green, blue = r[x], g[x], b[x]
        r[x] = red * m[0] + green * m[3] + blue * m[6] + offset[0]
        g[x] = red * m[1] + green * m[4] + blue * m[7] + offset[1]
        b[x] = red * m[2] + green * m[5] + blue * m[8] + offset[2]
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
        grey = (LUMA_RED * r[x] + LUMA_GREEN * g[x] + LUMA_BLUE * b[x]) * rest
        r[x] = min(max(r[x] * factor + grey, _ZERO), _ONE)
        g[x] = min(max(g[x] * factor + grey, _ZERO), _ONE)
        b[x] = min(max(b[x] * factor + grey, _ZERO), _ONE)


@njit(cache=True)
def _turn_hue(r, g, b, share):
    """Turn the hue in HSV by a share of the circle, without branches. A pixel without chroma has hue 0 and does not change."""
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
    if operation == BRIGHTNESS:
        factor = row[Column.FACTOR + BRIGHTNESS]
        _scale(r, factor)
        _scale(g, factor)
        _scale(b, factor)
    elif operation == CONTRAST:
        factor = row[Column.FACTOR + CONTRAST]
        offset = (_ONE - factor) * mean
        _blend(r, factor, offset)
        _blend(g, factor, offset)
        _blend(b, factor, offset)
    elif operation == SATURATION:
        _saturate(r, g, b, row[Column.FACTOR + SATURATION])
    elif operation == HUE:
        _turn_hue(r, g, b, row[Column.FACTOR + HUE])


@njit(cache=True)
def _add_grey(greys, r, g, b):
    for x in range(r.size):
        greys[x] += LUMA_RED * r[x] + LUMA_GREEN * g[x] + LUMA_BLUE * b[x]


@njit(cache=True)
def _make_grey(r, g, b):
    for x in range(r.size):
        grey = LUMA_RED * r[x] + LUMA_GREEN * g[x] + LUMA_BLUE * b[x]
        r[x] = grey
        g[x] = grey
        b[x] = grey


@njit(cache=True)
def _normalise(channel, scale, offset):
    for x in range(channel.size):
        channel[x] = channel[x] * scale + offset


@njit(cache=True)
def blur_weights(sigma, radius):
    """torchvision's Gaussian kernel from its centre outwards, (taps,) float32, without outer taps of negligible weight."""
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
    """Blur one channel in place, first along rows and then along columns, with a reflected border."""
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
    # The rows below need each row as it was before this pass, so the last ones are kept.
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
    """image: (H, W, 3) uint8, row: (COLUMNS,) float32 of `parameter_rows` -> out: (3, S, S) float32, a view of the patch."""
    _resize(out, image, row)
    _finish(out, row)


@njit(cache=True)
def _box_fits(row, height, width):
    """Whether the box, which is drawn from the size in the manifest, lies in the image as it was decoded."""
    top, left, box_height, box_width = row[Column.TOP], row[Column.LEFT], row[Column.HEIGHT], row[Column.WIDTH]
    return (
        top >= 0 and left >= 0 and box_height >= 1 and box_width >= 1 and top + box_height <= height and left + box_width <= width
    )


@functools.cache
def view_step_at():
    """view_step as a C function, compiled once and cached on disk. Its arguments: addresses of out, image and row, S, and the
    image's height and width. The address of out is an integer, so that callers can compute with it.

    Returns 1, or 0 for a box that does not lie in the image, without a view: Numba checks no bounds."""
    pointer, integer = numba.types.CPointer, numba.types.int64

    @numba.cfunc(
        integer(
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
        parameters = numba.carray(row, (COLUMNS,))
        if not _box_fits(parameters, height, width):
            return 0
        view_step(numba.carray(out, (3, side, side)), numba.carray(image, (height, width, 3)), parameters)
        return 1

    assert step.address is not None
    at = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)(step.address)
    at.step = step  # type: ignore[attr-defined]  # keeps the compiled code alive
    return at


@njit(cache=True)
def resized_view_step(out, image, row):
    """The same for an image that is cropped and resized: (S, S, 3) uint8, or float32 from 0 to 255 -> out: (3, S, S) float32."""
    for y in range(out.shape[1]):
        at = out.shape[1] - 1 - y if row[Column.MIRROR_ROWS] > 0 else y
        _to_planes(image[y], out[0, at], out[1, at], out[2, at])
        if row[Column.MIRROR_COLUMNS] > 0:
            for channel in range(3):
                _reverse(out[channel, at])
    _finish(out, row)


@njit(cache=True)
def _finish(out, row):
    """Everything after the mirrors, in place."""
    if row[Column.TRANSPOSE] > 0:
        for channel in range(3):
            _transpose(out[channel])
    height, width = out.shape[1], out.shape[2]
    contrast_position = 4
    for k in range(4):
        if int(row[Column.ORDER + k]) == CONTRAST:
            contrast_position = k
    # Contrast needs the grey mean of the whole image after the operations before it, so there are two passes.
    greys = np.zeros(width, np.float32)
    for y in range(height):
        r, g, b = out[0, y], out[1, y], out[2, y]
        if row[Column.STAINED] > 0:
            _change_stains(r, g, b, row)
        for k in range(contrast_position):
            _apply(int(row[Column.ORDER + k]), r, g, b, row, _ZERO)
        if contrast_position < 4:
            _add_grey(greys, r, g, b)
    total = 0.0
    for x in range(width):
        total += greys[x]
    mean = np.float32(total / (height * width))
    for y in range(height):
        r, g, b = out[0, y], out[1, y], out[2, y]
        for k in range(contrast_position, 4):
            _apply(int(row[Column.ORDER + k]), r, g, b, row, mean)
        if row[Column.GREY] > 0:
            _make_grey(r, g, b)
        for c, channel in enumerate((r, g, b)):
            _normalise(channel, row[Column.SCALE + c], row[Column.SHIFT + c])
    if row[Column.SIGMA] > 0:
        weights = blur_weights(np.float64(row[Column.SIGMA]), min(height, width) * int(row[Column.KERNEL]) // 100 // 2)
        if weights.size > 1:
            for channel in range(3):
                _blur(out[channel], weights)
