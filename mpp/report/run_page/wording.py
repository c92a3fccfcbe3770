"""How figures are written on a page."""

import math
from collections.abc import Sequence

from mpp.downstream.estimates import Estimate
from mpp.downstream.settings import FinetuneConfig
from mpp.pretraining.settings import PretrainConfig

NONE = "-"
"""In the place of a figure that there is none of."""
UNTRAINED = "random initialisation"
"""What an untrained encoder is called."""


def percent(share: float | None, digits: int = 1) -> str:
    """0.412 as "41.2 %"."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def around(mean: float | None, spread: float | None) -> str:
    """A mean and a standard deviation, both 0 to 1: "41.2 ± 1.3 %"; without the spread where there is none.

    Of a single draw older runs wrote a spread of 0, which would claim a certainty that was not measured.
    """
    if mean is None or not spread or not math.isfinite(mean + spread):
        return percent(mean)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def accuracy_text(of: Estimate | None) -> str:
    """Mean and standard deviation in percent, "34.2 ± 0.4"; of one measurement that alone."""
    return NONE if of is None else f"{100 * of.mean:.1f}" + ("" if of.spread is None else f" ± {100 * of.spread:.1f}")


def gain_text(of: Estimate | None) -> str:
    """Mean gain in points, with the half-width of its 95 % interval: "+6.1 ± 0.8"; of one measurement that alone."""
    return NONE if of is None else points(of.mean) + ("" if of.half is None else f" ± {100 * of.half:.1f}")


def points(gain: float | None) -> str:
    """A difference of two shares in percentage points: "+12.3"."""
    return NONE if gain is None or not math.isfinite(gain) else f"{100 * gain:+.1f}".replace("-", "\u2212")


def figure(value: float | None) -> str:
    """Four digits that count."""
    return (
        NONE if value is None or not math.isfinite(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    )


def score_text(score: str, value: float | None) -> str:
    """An accuracy in percent, a mean squared error as it is."""
    return percent(value) if score == "accuracy" else figure(value)


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def listed(values: Sequence[object], most: int = 5) -> str:
    """The first ones, separated by commas, and how many more there are."""
    first = ", ".join(map(str, values[:most]))
    return first if len(values) <= most else f"{first} and {len(values) - most:,} more"


def beginning(config: PretrainConfig | FinetuneConfig) -> str:
    """What the untrained encoder of a run is called, or the one that it went on from."""
    return "its init" if isinstance(config, PretrainConfig) and config.init else UNTRAINED
