"""Cropping and resizing very many small images at once: two products with a matrix for each image.

A crop of a few dozen pixels is resized in less time than a function is called, so images of one size go through as one
block. Each axis of each crop is a matrix (out, in) of bicubic weights, zero outside the crop; all there can be, one for
each start and length, are made beforehand.

The weights are whole multiples of 2**-14, so that float32 holds every sum of a product exactly: the result is the
same bits whatever other images are in the block, however the product is computed.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_BITS = 14  # 8 bits of a pixel, 14 of a weight and the overshoot of the kernel stay below float32's 24
_LARGEST = 2**27
"""Bytes that the matrices of one axis may take: images of up to 64 pixels to 64."""


def fits(image_hw: tuple[int, int], target_hw: tuple[int, int]) -> bool:
    """Whether images of this size are small enough for the matrices of all their crops."""
    pairs = zip(image_hw, target_hw, strict=True)
    return all(side * (side + 1) * side * out * 4 <= _LARGEST for side, out in pairs)


def crop_and_resize(
    images: np.ndarray, boxes: np.ndarray, hflip: np.ndarray, vflip: np.ndarray, hw: tuple[int, int]
) -> Tensor:
    """Bicubic with antialiasing, rounded to whole numbers after each axis, as Pillow and `resize` do.

    Args:
        images: uint8 (B, H, W, C).
        boxes: int64 (B, 4): top, left, height, width of each crop, within its image.
        hflip: bool (B,), which are turned left-right afterwards.
        vflip: bool (B,), which are turned upside down.
        hw: height and width of the result.

    Returns:
        uint8 (B, C, h, w).
    """
    batch, height, width, channels = images.shape
    rows = _matrices(height, hw[0])[_number(boxes[:, 0], boxes[:, 2], vflip, height)]
    columns = _transposed(width, hw[1])[_number(boxes[:, 1], boxes[:, 3], hflip, width)]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
    across = _rounded(pixels.view(batch, channels * height, width) @ columns).view(batch, channels, height, hw[1])
    return _rounded(rows[:, None] @ across).to(torch.uint8)


def _rounded(pixels: Tensor) -> Tensor:
    """Whole numbers from 0 to 255, in place."""
    return pixels.clamp_(0, 255).round_()


def _number(start: np.ndarray, length: np.ndarray, flip: np.ndarray, side: int) -> Tensor:
    """Which of the matrices a crop from `start` on is: by length, then by start, and all once more for the flipped."""
    before = (length - 1) * side - (length - 1) * (length - 2) // 2
    return torch.from_numpy(before + start + flip * (side * (side + 1) // 2))


@lru_cache(maxsize=4)
def _matrices(side: int, out: int) -> Tensor:
    """float32 (side (side + 1), out, side): the weights of all crops, and of all crops flipped."""
    parts = []
    for length in range(1, side + 1):
        weights = _weights(length, out)
        for start in range(side - length + 1):
            matrix = np.zeros((out, side))
            matrix[:, start : start + length] = weights
            parts.append(matrix)
    upright = torch.from_numpy(np.stack(parts).astype(np.float32))
    return torch.cat([upright, upright.flip(1)])


@lru_cache(maxsize=4)
def _transposed(side: int, out: int) -> Tensor:
    return _matrices(side, out).transpose(1, 2).contiguous()


def _weights(length: int, out: int) -> np.ndarray:
    """(out, length): Keys' cubic with a = -1/2, stretched where the crop shrinks, in multiples of 2**-14."""
    scale = length / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * scale
    x = np.abs((np.arange(length)[None] + 0.5 - centre) / stretch)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return np.rint(weights / weights.sum(axis=1, keepdims=True) * 2**_BITS) / 2**_BITS
