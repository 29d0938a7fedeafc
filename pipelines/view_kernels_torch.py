"""The augmentation kernels for a whole batch in torch, for a GPU: DALI crops and resizes, and the rest of a view is made here.

The same operations as `view_kernels_numba`, from the same parameter rows.
"""

import numpy as np
import torch

from pipelines.recipes import DARKEST, kernel_size
from pipelines.view_kernels_numba import BRIGHTNESS, CONTRAST, LUMA_BLUE, LUMA_GREEN, LUMA_RED, SATURATION, Column, blur_weights


def box_sizes(rows_BR: np.ndarray) -> np.ndarray:
    """(B, 2) float32: height and width of each box, in pixels of its image."""
    return rows_BR[:, Column.HEIGHT : Column.WIDTH + 1]


def resize_margin(sizes_B2: np.ndarray, image_size: int) -> np.ndarray:
    """(B, 2) int32: how far beyond a box of such height and width an antialiased resize reads, in pixels, plus one."""
    return np.ceil(np.maximum(sizes_B2 / image_size, 1)).astype(np.int32) + 1


def inside_weights(sizes_B2: np.ndarray, image_size: int, device: torch.device) -> list[torch.Tensor]:
    """For rows and for columns, (B, S) float32: the share of each new pixel's weights that lies inside the box, above 0, up to 1.

    A resize of the box with zeros around it, divided by both, gives torchvision's pixels.
    """
    sizes_2B1 = torch.from_numpy(np.ascontiguousarray(sizes_B2.T)).to(device, non_blocking=True)[:, :, None]
    scale = sizes_2B1 / image_size
    width = scale.clamp(min=1)
    centre_2BS = scale * (torch.arange(image_size, device=device) + 0.5)
    first_2BS = (centre_2BS - width).floor()
    inside_2BS, all_2BS = torch.zeros_like(centre_2BS), torch.zeros_like(centre_2BS)
    # Added one by one: torch may split a sum over a dimension by its length, which depends on the other patches of the batch.
    for k in range(2 * int(resize_margin(sizes_B2, image_size).max()) + 1):
        pixel_2BS = first_2BS + k
        weight_2BS = (1 - (pixel_2BS + 0.5 - centre_2BS).abs() / width).clamp_(min=0)
        all_2BS += weight_2BS
        inside_2BS += torch.where((pixel_2BS >= 0) & (pixel_2BS < sizes_2B1), weight_2BS, 0)
    return list(inside_2BS / all_2BS)


def resized_view_batch(images_BHWC: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Views of cropped and resized images: (B, H, W, 3) uint8, or float32 from 0 to 255, and rows (B, COLUMNS) -> (B, 3, H, W)
    float32.

    The host knows which images take which operation, and constants are numbers rather than tensors, so nothing waits for the
    device. Transposed images must be square.
    """
    device = images_BHWC.device
    rows_BR = torch.from_numpy(rows).to(device, non_blocking=True)
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) * (1 / 255)
    x_BCHW = _flip_and_turn(x_BCHW, rows, rows_BR)
    if (rows[:, Column.STAINED] > 0).any():
        x_BCHW = torch.where(_column(rows_BR, Column.STAINED) > 0, _change_stains(x_BCHW, rows_BR), x_BCHW)
    for position in range(4):
        for operation in range(4):
            chosen = np.flatnonzero(rows[:, Column.ORDER + position] == operation)
            if len(chosen) == 0:
                continue
            index = torch.from_numpy(chosen).to(device, non_blocking=True)
            x_BCHW[index] = _jitter(x_BCHW[index], operation, _column(rows_BR[index], Column.FACTOR + operation))
    x_BCHW = torch.where(_column(rows_BR, Column.GREY) > 0, _luma(x_BCHW), x_BCHW)
    normalise = rows_BR[:, Column.SCALE : Column.MIRROR_ROWS].view(-1, 2, 3, 1, 1)
    x_BCHW = x_BCHW * normalise[:, 0] + normalise[:, 1]
    chosen = np.flatnonzero(rows[:, Column.SIGMA] > 0)
    if len(chosen):
        index = torch.from_numpy(chosen).to(device, non_blocking=True)
        x_BCHW[index] = _blur_batch(x_BCHW[index], rows[chosen])
    return x_BCHW


def _column(rows_nR, column):
    return rows_nR[:, column].view(-1, 1, 1, 1)


def _flip_and_turn(x_BCHW, rows, rows_BR):
    for column, dim in ((Column.MIRROR_ROWS, 2), (Column.MIRROR_COLUMNS, 3)):
        if (rows[:, column] > 0).any():
            x_BCHW = torch.where(_column(rows_BR, column) > 0, x_BCHW.flip(dim), x_BCHW)
    if (rows[:, Column.TRANSPOSE] > 0).any():
        x_BCHW = torch.where(_column(rows_BR, Column.TRANSPOSE) > 0, x_BCHW.transpose(2, 3), x_BCHW)
    return x_BCHW


def _change_stains(x_BCHW, rows_BR):
    light_BCHW = x_BCHW.clamp(min=DARKEST).log2()
    # Not a matrix product: a GPU may round its factors to ten bits (TF32).
    mixed_BCHW = rows_BR[:, Column.STAIN_OFFSET : Column.TOP].view(-1, 3, 1, 1)
    for channel, weights_BC in enumerate(rows_BR[:, Column.STAIN_MATRIX : Column.STAIN_OFFSET].view(-1, 3, 3).unbind(1)):
        mixed_BCHW = mixed_BCHW + light_BCHW[:, channel : channel + 1] * weights_BC.view(-1, 3, 1, 1)
    return mixed_BCHW.exp2().clamp(max=1)


def _blur_batch(x_nCHW, rows):
    """Adds tap after tap over the whole batch: a convolution may choose its order of summation by the batch size."""
    side = min(x_nCHW.shape[2:])
    radius = max(kernel_size(side, int(percent)) for percent in rows[:, Column.KERNEL]) // 2
    if radius == 0:
        return x_nCHW
    weights = np.zeros((len(rows), radius + 1), np.float32)
    for weights_of_one, row in zip(weights, rows, strict=True):
        found = blur_weights(float(row[Column.SIGMA]), kernel_size(side, int(row[Column.KERNEL])) // 2)
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
    return float(LUMA_RED) * r + float(LUMA_GREEN) * g + float(LUMA_BLUE) * b


def _jitter(x_nCHW, operation, factor_n111):
    if operation == BRIGHTNESS:
        return (x_nCHW * factor_n111).clamp_(0, 1)
    if operation in (CONTRAST, SATURATION):
        grey = _luma(x_nCHW)
        if operation == CONTRAST:
            # In float64: torch splits the sum by the number of images, on which a view must not depend.
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
