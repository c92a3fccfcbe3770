"""Crops and resizes many small images at once: two matrix products for each image.

A crop of a few dozen pixels is resized in less time than a function is called, so images of one size go through as one
block. Each axis of each crop is a matrix (out, in) of bicubic weights, zero outside the crop: a window of a table that
has the weights of each length once, with zeros on both sides.

The weights are whole multiples of 2**-14, so that float32 holds every sum of a product exactly: the result is the
same bits whatever other images are in the block, however the product is computed.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_BITS = 14  # 8 bits of a pixel, 14 of a weight and the overshoot of the kernel stay below float32's 24
_LARGEST = 2**25  # about 64 pixels to 64; another limit would change the pixels of images between the two
_TABLE = 32  # lengths of a table are a multiple of it, so that images of several sizes share few


def is_small(image_hw: tuple[int, int], target_hw: tuple[int, int]) -> bool:
    """Whether matrix products are the faster way; they grow with each side, as resizing one by one does not."""
    return all(side * (side + 1) * side * out <= _LARGEST for side, out in zip(image_hw, target_hw, strict=True))


def crop_and_resize(
    images: np.ndarray, boxes: np.ndarray, hflip: np.ndarray, vflip: np.ndarray, hw: tuple[int, int]
) -> Tensor:
    """Bicubic with antialiasing, rounded to whole numbers after each axis, as Pillow and `resize` do.

    uint8 (B, H, W, C), boxes int64 (B, 4) of top, left, height, width, and flips bool (B,) to uint8 (B, C, *hw).
    """
    batch, height, width, channels = images.shape
    rows = _matrices(boxes[:, 0], boxes[:, 2], vflip, height, hw[0])
    columns = _matrices(boxes[:, 1], boxes[:, 3], hflip, width, hw[1])
    # Row by row and channel by channel: then either product is one for an image, of all its channels.
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 1, 3, 2))).float()
    across = (pixels.view(batch, height * channels, width) @ columns.transpose(1, 2)).clamp_(0, 255).round_()
    down = (rows @ across.view(batch, height, channels * hw[1])).clamp_(0, 255).round_()
    return down.to(torch.uint8).view(batch, hw[0], channels, hw[1]).transpose(1, 2).contiguous()


def _matrices(start: np.ndarray, length: np.ndarray, flip: np.ndarray, side: int, out: int) -> Tensor:
    """float32 (B, out, side): the weights of each crop, which begins at `start` of an image of `side` pixels."""
    most = -(-side // _TABLE) * _TABLE
    windows = np.lib.stride_tricks.sliding_window_view(_table(most, out), side, axis=3)
    # (flipped or not, length, out, first column, side)
    return torch.from_numpy(windows[flip.astype(np.int64), length - 1, :, most - start])


@lru_cache(maxsize=8)
def _table(most: int, out: int) -> np.ndarray:
    """float32 (2, most, out, 2 most): the weights of crops of 1 to `most` pixels, from column `most` on; flipped.

    They are Keys' cubic with a = -1/2, stretched where the crop shrinks, in multiples of 2**-14.
    """
    table = np.zeros((most, out, 2 * most), dtype=np.float32)
    for length in range(1, most + 1):
        scale = length / out
        centre = (np.arange(out)[:, None] + 0.5) * scale
        x = np.abs((np.arange(length)[None] + 0.5 - centre) / max(scale, 1.0))
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights = np.rint(weights / weights.sum(axis=1, keepdims=True) * 2**_BITS) / 2**_BITS
        table[length - 1, :, most : most + length] = weights
    return np.stack([table, table[:, ::-1]])
