"""The values that images hold before they are scaled to 8 bits, and the range that would suit them."""

import math
import re
from typing import NamedTuple

import numpy as np

from mpp.data.settings import DecodeOptions, flag_numbers

_SIDE = 128  # rows and columns of the grid of values that is kept of an image, for the percentiles
_KEPT = 2**22  # values kept of all images together; past that every second one goes
_MOST_PARTS = 1024  # arrays that they lie in: very small ones take more room than their values
_TAILS = (0.1, 99.9)
_UNUSED = 0.5  # a channel that uses less of its range than this would lose a bit or more
_OUTSIDE = 0.005  # more than the tails that a range from percentiles cuts off
_FORM = re.compile(r"(?:(\d+) x )?(u?int\d+|float\d+|bool)(?: x (\d+))?$")
_DEEP = ("I;16", "I;16B", "I", "F")  # Pillow's modes of one channel and more than 8 bits


class Kind(NamedTuple):
    """Images whose values mean the same."""

    dtype: str
    channels: int


def kind_of_form(form: str) -> Kind | None:
    """The kind of images of a `Picture.form`; None for plain 8-bit grey or colour."""
    if match := _FORM.search(form):
        kind = Kind(match[2], int(match[1] or match[3] or 1))
        return None if kind.dtype in ("uint8", "bool") and kind.channels in (1, 3, 4) else kind
    return Kind("uint16", 1) if form.rpartition(" ")[2] in _DEEP else None


class Spread:
    """Smallest, largest and percentiles per channel, of any number of images.

    The percentiles are of a grid of at most 128 x 128 values an image, and of at most four million in all.
    """

    def __init__(self, channels: int) -> None:
        self.images = self.infinite = 0
        self.smallest, self.largest = np.full(channels, math.nan), np.full(channels, math.nan)
        self._parts: list[np.ndarray] = []
        self._kept, self._stride = 0, 1

    def add(self, values: np.ndarray) -> None:
        """Takes in an image (H, W, C)."""
        sample = values[:: -(-values.shape[0] // _SIDE), :: -(-values.shape[1] // _SIDE)]
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            self.infinite += int(values.size - np.count_nonzero(finite))
            values = np.where(finite, values, np.nan)
        self.images += 1
        self._bound(np.fmin.reduce(values, axis=(0, 1)), np.fmax.reduce(values, axis=(0, 1)))
        self._keep(np.ascontiguousarray(sample).reshape(-1, values.shape[2]))

    def merge(self, other: "Spread") -> None:
        """Takes in the images of another."""
        self.images += other.images
        self.infinite += other.infinite
        self._bound(other.smallest, other.largest)
        for part in other._parts:
            self._keep(part)

    def _bound(self, smallest: np.ndarray, largest: np.ndarray) -> None:
        self.smallest, self.largest = np.fmin(self.smallest, smallest), np.fmax(self.largest, largest)

    def _keep(self, part: np.ndarray) -> None:
        part = part[:: self._stride].copy()  # a view would keep all of the image
        self._parts.append(part)
        self._kept += part.size
        if len(self._parts) > _MOST_PARTS:
            self._parts = [np.concatenate(self._parts)]
        while self._kept > _KEPT:
            self._stride *= 2
            self._parts = [np.concatenate(self._parts)[::2].copy()]
            self._kept = self._parts[0].size

    def percentiles(self) -> tuple[np.ndarray, np.ndarray]:
        """The 0.1 and 99.9 percentiles, float64 (C,) each; not a number where no value is finite."""
        columns = [column[np.isfinite(column)].astype(np.float64) for column in np.concatenate(self._parts).T]
        found = [np.percentile(column, _TAILS) if len(column) else (math.nan, math.nan) for column in columns]
        low, high = np.array(found).T
        return low, high

    def outside(self, pairs: list[tuple[float, float]]) -> float:
        """The share of the values that lie outside their channel's pair, in the channel where it is largest."""
        low, high = np.array(pairs).T
        sample = np.concatenate(self._parts).astype(np.float64)
        return float(((sample < low) | (sample > high)).mean(axis=0).max())


class Proposal(NamedTuple):
    """A range that would suit better than the one in use, and why."""

    why: str
    value_range: tuple[float, ...]

    def flag(self) -> str:
        """As for the command line of a run."""
        return f"--data.value-range {flag_numbers(self.value_range)}"


def propose(kind: Kind, spread: Spread, reading: DecodeOptions) -> Proposal | None:
    """A better range, where the one in use has values outside it or leaves most of itself unused in some channel."""
    if kind.channels != reading.channels and {kind.channels, reading.channels} != {1, 3}:
        return None
    low, high = spread.percentiles()
    if not np.isfinite([*low, *high]).all():
        return None
    why = _why_not_fit(kind, spread, reading, low, high)
    if not why:
        return None
    # Three channels are colours, whose balance a range for each would shift.
    apart = kind.channels == reading.channels and kind.channels != 3 and high.min() < high.max() / 2
    bits = int(spread.largest.max()).bit_length()
    if kind.dtype.startswith("uint") and not apart and high.max() >= 2**bits / 4:
        return Proposal(why, (0, 2**bits - 1))
    pairs = zip(low, high, strict=True) if apart else [(low.min(), high.max())]
    return Proposal(why, tuple(value for pair in pairs for value in _rounded(kind, *pair)))


def _why_not_fit(kind: Kind, spread: Spread, reading: DecodeOptions, low: np.ndarray, high: np.ndarray) -> str:
    """Why the range in use does not suit; empty where it does."""
    stated = list(zip(reading.value_range[::2], reading.value_range[1::2], strict=True))
    # Else the range that decoding takes by itself.
    default = {"uint8": 255.0, "uint16": 65535.0}.get(kind.dtype, 1.0 if kind.dtype.startswith("float") else None)
    if not stated and default is None:
        return f"{kind.dtype} has no range of its own"
    pairs = stated or [(0.0, float(default or 0))]
    if len(pairs) not in (1, kind.channels):
        return ""
    pairs = pairs * (kind.channels // len(pairs))
    if stated and (outside := spread.outside(pairs)) > _OUTSIDE:
        return f"{outside:.1%} of the values lie outside the stated range"
    if not stated and (spread.smallest.min() < pairs[0][0] or spread.largest.max() > pairs[0][1]):
        return "floating point is taken as 0 to 1, and values lie outside"
    used = [
        (min(most, top) - max(least, bottom)) / (top - bottom)
        for least, most, (bottom, top) in zip(low, high, pairs, strict=True)
    ]
    worst = min(range(len(used)), key=used.__getitem__)
    if used[worst] >= _UNUSED:
        return ""
    name = f"channel {worst} uses" if kind.channels > 1 else "the values use"
    return f"{name} {max(0.0, used[worst]):.1%} of {pairs[worst][0]:g} to {pairs[worst][1]:g}"


def _rounded(kind: Kind, low: float, high: float) -> tuple[float, float]:
    if not kind.dtype.startswith("float"):
        low, high = math.floor(low), math.ceil(high)
        return low, max(high, low + 1)
    unit = 10.0 ** (math.floor(math.log10(max(high - low, abs(low), abs(high), 1e-30))) - 3)
    low, high = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
    return float(f"{low:.6g}"), float(f"{max(high, low + unit):.6g}")
