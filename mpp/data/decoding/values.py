"""From values of any type and number of channels to uint8 pixels."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from mpp.data.decoding.picture import BadImage
from mpp.data.settings import Reading
from mpp.errors import UserError

_AT_ONCE = 2**22  # values that are scaled at the same time


def to_pixels(
    values: np.ndarray, reading: Reading, *, alpha: bool = False, high: int = 65535, inverted: bool = False
) -> np.ndarray:
    """Scaled to 8 bits, composited where transparent, with the channels that are asked for.

    Args:
        values: (H, W) or (H, W, C) of any real type.
        reading: channels, range and background.
        alpha: the last channel is opacity; where 1 or 3 channels are asked for it is used up.
        high: the largest value of uint8 or uint16, without a stated range, where it is not the type's own.
        inverted: 0 is white.

    Returns:
        uint8 (H, W, reading.channels), contiguous and writable.

    Raises:
        BadImage: other channels (only 1 and 3 become each other), or values that have no range of their own.
        UserError: a range or background of another number of numbers.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    wanted, opacity = reading.channels, None
    if alpha and wanted in (1, 3):
        values, opacity = values[:, :, :-1], _eight_bits(values[:, :, -1:], None, 65535)
    held = values.shape[2]
    if held != wanted and {held, wanted} != {1, 3}:
        raise BadImage(
            f"has {held} channel{'s' * (held > 1)}, the model takes {wanted} (model.in_chans)", "wrong channels"
        )
    pairs = _pairs(reading)
    if held == 1 and (len(pairs) > 1 or (opacity is not None and len(reading.background) > 1)):
        values = np.repeat(values, wanted, axis=2)
    pixels = _eight_bits(values, pairs or None, high)
    if inverted:
        pixels = 255 - pixels
    if opacity is not None:
        pixels = _composited(pixels, opacity, reading)
    if pixels.shape[2] != wanted:
        pixels = np.repeat(pixels, 3, axis=2) if wanted == 3 else _luma(pixels)
    return np.require(pixels, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def _pairs(reading: Reading) -> tuple[tuple[float, float], ...]:
    stated = reading.value_range
    if not stated:
        return ()
    pairs = tuple(zip(stated[::2], stated[1::2], strict=False))
    if len(stated) % 2 or len(pairs) not in (1, reading.channels) or any(low == high for low, high in pairs):
        raise UserError(
            f"data.value_range is low high, different, once or for each of the {reading.channels} channels, "
            f"got {list(stated)}"
        )
    if len(pairs) > 1 and len(set(pairs)) == 1:
        return pairs[:1]
    return pairs


def _by_rows(work: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """What `work` makes of arrays, uint8, some rows at a time: what it needs for itself stays small."""
    rows, least = len(arrays[0]), max(array[:1].size for array in arrays)
    step = max(1, _AT_ONCE // least)
    if rows <= step:
        return work(*arrays)
    first = work(*(array[:step] for array in arrays))
    made = np.empty((rows, *first.shape[1:]), dtype=np.uint8)
    made[:step] = first
    for top in range(step, rows, step):
        made[top : top + step] = work(*(array[top : top + step] for array in arrays))
    return made


def _eight_bits(values: np.ndarray, pairs: tuple[tuple[float, float], ...] | None, high: int) -> np.ndarray:
    """uint8 of the same shape. Out of a stated range values are clipped to it."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    small = values.dtype in (np.uint8, np.uint16)
    if pairs is None:
        if values.dtype == np.uint8 and high >= 255:
            return values
        pairs = ((0, high),) if small else (_own_range(values),)
    elif pairs == ((0, 255),) and values.dtype == np.uint8:
        return values
    scale = _by_table if small else _by_formula
    if len(pairs) == 1:
        return scale(values, *pairs[0])
    return np.stack([scale(values[:, :, channel], *pair) for channel, pair in enumerate(pairs)], axis=2)


def _own_range(values: np.ndarray) -> tuple[float, float]:
    """0 to 1 for floating point that lies there; all else has to be stated."""
    if values.dtype.kind not in "fiu":
        raise BadImage(f"values of type {values.dtype}; expected real numbers", "not an image")
    with np.errstate(all="ignore"):
        smallest, largest = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
    if values.dtype.kind != "f" or smallest < 0 or largest > 1:
        expected = "floating point is taken as 0 to 1" if values.dtype.kind == "f" else "their range is unknown"
        raise BadImage(
            f"{values.dtype} values from {smallest:g} to {largest:g}; {expected}: state data.value_range", "no range"
        )
    return 0.0, 1.0


@lru_cache(maxsize=64)
def _table(low: float, high: float, size: int) -> np.ndarray:
    return _by_formula(np.arange(size, dtype=np.float64), low, high)


def _by_table(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return _table(low, high, 256 if values.dtype == np.uint8 else 65536)[values]


def _by_formula(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of rint(255 (v - low) / (high - low)), clipped; not a number becomes 0."""
    return _by_rows(lambda rows: _formula(rows, low, high), values)


def _formula(values: np.ndarray, low: float, high: float) -> np.ndarray:
    exact = np.float32 if values.dtype in (np.float16, np.float32) else np.float64
    with np.errstate(all="ignore"):
        scaled = (values.astype(exact) - exact(low)) * exact(255 / (high - low))
    np.rint(scaled, out=scaled)
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def _composited(pixels: np.ndarray, opacity: np.ndarray, reading: Reading) -> np.ndarray:
    if len(reading.background) not in (1, reading.channels):
        raise UserError(
            f"data.background is one number or one for each of the {reading.channels} channels, "
            f"got {list(reading.background)}"
        )
    if opacity.min() == 255:
        return pixels
    back = np.array(reading.background, dtype=np.uint16)

    def mixed(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        share = np.repeat(opacity, pixels.shape[2], axis=2).astype(np.uint16)  # broadcast, it would take twice the time
        total = pixels * share
        total += back * (255 - share)
        total += 127  # 255 x 255 + 127 at most, for which what follows is total // 255
        return ((total + 1 + (total >> 8)) >> 8).astype(np.uint8)

    return _by_rows(mixed, pixels, opacity)


def _luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma in Pillow's own integers, so that arrays and encoded images agree."""
    factors = np.array([19595, 38470, 7471], dtype=np.uint32)
    return _by_rows(
        lambda rows: ((rows.astype(np.uint32) @ factors + 0x8000) >> 16).astype(np.uint8)[:, :, None], image
    )
