"""Arrays as pixels: tiles beside each other, heat maps, images darkened where nothing is looked at."""

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn import functional as F

Pixels = UInt8[np.ndarray, "height width channels"]


def heat(values: Float[np.ndarray, "..."], low: float, high: float) -> UInt8[np.ndarray, "... 3"]:
    """Values from `low` to `high` as the colours of viridis, dark to bright; NaN is grey."""
    from matplotlib import colormaps

    scaled = (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12)
    colours = colormaps["viridis"](np.clip(np.nan_to_num(scaled), 0, 1))[..., :3]
    colours[np.isnan(scaled)] = 0.5
    return (255 * colours).round().astype(np.uint8)


def to_range(values: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Black at the smallest value, white at the largest; mid-grey where all are equal."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.full(values.shape, 128, dtype=np.uint8)
    return (255 * (values - low) / (high - low)).round().astype(np.uint8)


def tiled(
    tiles: UInt8[np.ndarray, "n height width 3"], columns: int, gap: int = 1
) -> UInt8[np.ndarray, "rows columns 4"]:
    """Tiles in rows of `columns`, with transparent gaps between them."""
    n, height, width, _ = tiles.shape
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet


def enlarged(picture: Pixels, times: int) -> Pixels:
    """Each pixel `times` x `times`."""
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def lit(
    image: UInt8[np.ndarray, "height width 3"], share: Float[np.ndarray, "rows columns"], dark: float = 0.15
) -> UInt8[np.ndarray, "height width 3"]:
    """The image as bright as each patch's share is of the largest, never darker than `dark` (as figure 6 is drawn)."""
    scaled = torch.from_numpy(np.ascontiguousarray(share, dtype=np.float32))[None, None]
    scaled = scaled / scaled.amax().clamp(min=1e-12)
    smooth = F.interpolate(scaled, size=image.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    return (image * (dark + (1 - dark) * smooth)[..., None]).round().astype(np.uint8)


def framed(
    image: UInt8[np.ndarray, "height width 3"], row: int, column: int, patch: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """The image with a frame around one patch, black within white, so that it shows on any colour."""
    out, thick = image.copy(), max(1, round(min(image.shape[:2]) / 112))
    top, left = row * patch[0], column * patch[1]
    for colour, wide in ((255, 2 * thick), (0, thick)):
        y0, y1 = max(top - wide, 0), min(top + patch[0] + wide, len(image))
        x0, x1 = max(left - wide, 0), min(left + patch[1] + wide, image.shape[1])
        out[y0:y1, x0:x1] = colour
    inside = slice(top, top + patch[0]), slice(left, left + patch[1])
    out[inside] = image[inside]
    return out


def visible(image: UInt8[np.ndarray, "height width 3"], smallest: int = 112) -> UInt8[np.ndarray, "height width 3"]:
    """A small image enlarged by a whole number, so that what is drawn over it shows."""
    return enlarged(image, -(-smallest // max(image.shape[:2])))
