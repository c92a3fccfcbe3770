"""Formats figures for a page."""

import math
from collections.abc import Sequence

from mpp.downstream.estimates import Estimate

NONE = "-"
"""Stands for a figure that is missing."""
UNTRAINED = "random initialisation"
"""Name of an untrained encoder."""


def percent(share: float | None, digits: int = 1) -> str:
    """0.412 as "41.2 %"."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def mean_text(mean: float | None, spread: float | None) -> str:
    """A mean and a standard deviation, both 0 to 1, as "41.2 ± 1.3 %"; without the spread where there is none.

    Of a single draw older runs wrote a spread of 0, a certainty that was not measured.
    """
    if mean is None or not spread or not math.isfinite(mean + spread):
        return percent(mean)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def accuracy_text(estimate: Estimate | None) -> str:
    """Mean and standard deviation in percent, "34.2 ± 0.4"; of one measurement the mean alone."""
    if estimate is None:
        return NONE
    return f"{100 * estimate.mean:.1f}" + ("" if estimate.spread is None else f" ± {100 * estimate.spread:.1f}")


def gain_text(estimate: Estimate | None) -> str:
    """Mean gain in points, with the half-width of its 95 % interval: "+6.1 ± 0.8"; of one measurement it alone."""
    if estimate is None:
        return NONE
    return points(estimate.mean) + ("" if estimate.half is None else f" ± {100 * estimate.half:.1f}")


def points(gain: float | None) -> str:
    """A difference of two shares in percentage points: "+12.3"."""
    return NONE if gain is None or not math.isfinite(gain) else f"{100 * gain:+.1f}".replace("-", "\u2212")


def figure(value: float | None) -> str:
    """Four significant digits."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def score_text(score: str, value: float | None) -> str:
    """An accuracy in percent, a mean squared error with four digits."""
    return percent(value) if score == "accuracy" else figure(value)


def shots_text(shots: int) -> str:
    """1 as "1 shot", 5 as "5 shots"."""
    return f"{shots} shot{'s' * (shots > 1)}"


def listed(values: Sequence[object], most: int = 5) -> str:
    """The first ones, separated by commas, and how many more there are."""
    first = ", ".join(map(str, values[:most]))
    return first if len(values) <= most else f"{first} and {len(values) - most:,} more"
