"""From values of any type and number of channels to uint8 pixels."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mpp.data.decoding.bad_image import BadImage
from mpp.data.settings import DecodeOptions

_BLOCK = 2**22  # values scaled at a time, so that the memory for it stays small


class RawValues(NamedTuple):
    """Values of an image as its file has them, neither scaled to 8 bits nor turned upright."""

    values: np.ndarray  # (H, W) or (H, W, C) of any real type
    alpha: bool = False  # the last channel is opacity
    high: int = 65535  # largest value of an unsigned integer, where it is not the type's own
    inverted: bool = False  # 0 is white
    scaled: bool = False  # uint8 on the scale of the pixels: a stated range does not apply


def to_uint8(raw: RawValues, options: DecodeOptions) -> np.ndarray:
    """Scales, composites where transparent, and makes 1 channel of 3 or 3 of 1: uint8 (H, W, options.channels).

    The result is contiguous and writable. Raises BadImage for other channels, or values without a range of their own.
    """
    values, wanted, opacity = raw.values, options.channels, None
    if values.ndim == 2:
        values = values[:, :, None]
    if raw.alpha and wanted in (1, 3):
        values, opacity = values[:, :, :-1], _eight_bits(values[:, :, -1:], [], 65535)
    channels = values.shape[2]
    if channels != wanted and {channels, wanted} != {1, 3}:
        raise BadImage(
            f"has {channels} channel{'s' * (channels > 1)}, the model takes {wanted} (model.in_chans)", "wrong channels"
        )
    ranges = [] if raw.scaled else list(zip(options.value_range[::2], options.value_range[1::2], strict=True))
    if len(set(ranges)) == 1:
        ranges = ranges[:1]
    if channels == 1 and (len(ranges) > 1 or (opacity is not None and len(options.background) > 1)):
        values = np.repeat(values, wanted, axis=2)
    pixels = _eight_bits(values, ranges, raw.high)
    if raw.inverted:
        pixels = 255 - pixels
    if opacity is not None and opacity.min() < 255:
        pixels = _composited(pixels, opacity, options.background)
    if pixels.shape[2] != wanted:
        pixels = np.repeat(pixels, 3, axis=2) if wanted == 3 else _luma(pixels)
    return np.require(pixels, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def _by_rows(work: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """`work(*arrays)`, computed some rows at a time."""
    rows, step = len(arrays[0]), max(1, _BLOCK // max(array[:1].size for array in arrays))
    first = work(*(array[:step] for array in arrays))
    if rows <= step:
        return first
    result = np.empty((rows, *first.shape[1:]), dtype=np.uint8)
    result[:step] = first
    for top in range(step, rows, step):
        result[top : top + step] = work(*(array[top : top + step] for array in arrays))
    return result


def _eight_bits(values: np.ndarray, ranges: list[tuple[float, float]], high: int) -> np.ndarray:
    """uint8 of the same shape; values outside a stated range are clipped to it."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    tabulated = values.dtype in (np.uint8, np.uint16)
    if values.dtype == np.uint8 and ((not ranges and high >= 255) or ranges == [(0, 255)]):
        return values
    ranges = ranges or [(0, high) if tabulated else _own_range(values)]

    def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
        return _table(low, high, 2 ** (8 * values.itemsize))[values] if tabulated else _by_formula(values, low, high)

    if len(ranges) == 1:
        return scale(values, *ranges[0])
    return np.stack([scale(values[:, :, channel], *pair) for channel, pair in enumerate(ranges)], axis=2)


def _own_range(values: np.ndarray) -> tuple[float, float]:
    """0 to 1 for floating point within it. Raises BadImage for anything else: its range must be stated."""
    if values.dtype.kind not in "fiu":
        raise BadImage(f"values of type {values.dtype}; expected real numbers", "not an image")
    with np.errstate(all="ignore"):
        smallest, largest = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
    if values.dtype.kind == "f" and not (smallest < 0 or largest > 1):
        return 0.0, 1.0
    expected = "floating point is taken as 0 to 1" if values.dtype.kind == "f" else "their range is unknown"
    raise BadImage(
        f"{values.dtype} values from {smallest:g} to {largest:g}; {expected}: state data.value_range", "no range"
    )


@lru_cache(maxsize=64)
def _table(low: float, high: float, size: int) -> np.ndarray:
    return _by_formula(np.arange(size, dtype=np.float64), low, high)


def _by_formula(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of rint(255 (v - low) / (high - low)), clipped; not a number becomes 0."""
    exact = np.float32 if values.dtype in (np.float16, np.float32) else np.float64

    def scale(rows: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            scaled = (rows.astype(exact) - exact(low)) * exact(255 / (high - low))
        np.rint(scaled, out=scaled)
        np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)

    return _by_rows(scale, values)


def _composited(pixels: np.ndarray, opacity: np.ndarray, background: tuple[int, ...]) -> np.ndarray:
    back = np.array(background, dtype=np.uint16)

    def mix(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        share = np.repeat(opacity, pixels.shape[2], axis=2).astype(np.uint16)  # broadcast, it would take twice the time
        total = pixels * share
        total += back * (255 - share)
        total += 127  # at most 255 x 255 + 127, for which the next line is total // 255
        return ((total + 1 + (total >> 8)) >> 8).astype(np.uint8)

    return _by_rows(mix, pixels, opacity)


def _luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma in Pillow's integers, so that arrays and encoded images agree: (H, W, 3) to (H, W, 1)."""
    factors = np.array([19595, 38470, 7471], dtype=np.uint32)
    return _by_rows(
        lambda rows: ((rows.astype(np.uint32) @ factors + 0x8000) >> 16).astype(np.uint8)[:, :, None], image
    )
