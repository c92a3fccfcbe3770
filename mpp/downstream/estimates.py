"""Means of repeated measurements, their spread and 95 % interval. Nothing else computes any of these.

Three things vary between measurements, and an interval covers only those that were repeated:

    pretraining   its seed                                     the unit of a study that has several
    fine-tuning   its seed: labelled images, order, new head   within one pretraining
    shots         their draw                                   the same draws for every encoder

    estimate      repeated in one way                          Student's t
    of_groups     fine-tunings within pretrainings             Student's t over the pretrainings' means
    of_table      pretrainings x draws of the shots            Student's t over both at once
    wilson        one classifier, its test images              Wilson's interval of a share

Tests simulate each: a nominal 95 % interval covers the true mean in 93 to 97 % of the cases.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from mpp.data.sources.base import count

_Z = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations
_FEW_ROWS, _FEW_COLUMNS = 3, 5  # fewer than that are few


@dataclass(frozen=True)
class Estimate:
    """A mean over repeated measurements, in their unit."""

    mean: float
    spread: float | None
    """Sample standard deviation of a single measurement; None without repetition."""
    half: float | None
    """Half the width of the 95 % interval of the mean; None without repetition."""
    over: str
    """What was repeated and how often, such as "3 pretrainings and 10 draws of the shots"."""


def estimate(values: Sequence[float], over: str) -> Estimate:
    """Estimates the mean of one or more independent measurements."""
    return of_groups({at: [value] for at, value in enumerate(values)}, over)


def of_groups(groups: Mapping[Any, Sequence[float]], over: str) -> Estimate:
    """Estimates the mean of measurements in groups, such as fine-tunings that start from one pretraining.

    Measurements of one group are not independent, so the interval is over the groups' means. With a single group it
    is over its measurements, and says nothing about how groups differ.
    """
    values = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups.values()])
    units = np.array([np.mean(group) for group in groups.values()]) if len(groups) > 1 else values
    if len(values) < 2:
        return Estimate(float(values[0]), None, None, over)
    error = float(units.std(ddof=1)) / math.sqrt(len(units))
    return Estimate(float(units.mean()), float(values.std(ddof=1)), student_t(len(units) - 1) * error, over)


def of_table(table: Float[np.ndarray, "pretrainings draws"]) -> Estimate:
    """Estimates the mean few-shot accuracy (or gain) of several pretrainings, all with the same draws of the shots.

    Cells of a row or column share an effect, so the variance of the mean is MS_rows / n + max(MS_columns - MS_rest, 0)
    / n, with the mean squares MS of a two-way analysis of variance of n cells. The t is that of Satterthwaite's degrees
    of freedom or, with few rows or columns, where that is too small, Cochran's: both t, weighted by their variances.

    Source: F. E. Satterthwaite, "An approximate distribution of estimates of variance components", 1946; W. G. Cochran
    and G. M. Cox, "Experimental designs", 1950.
    """
    rows, columns = table.shape
    draws = f"{count(columns, 'draw')} of the shots"
    if rows == 1:
        return estimate(table[0].tolist(), draws)
    over = f"{count(rows, 'pretraining')} and {draws}"
    if columns == 1:
        return estimate(table[:, 0].tolist(), over)
    mean = float(table.mean())
    row, column = table.mean(axis=1) - mean, table.mean(axis=0) - mean
    rest = table - mean - row[:, None] - column
    by_row, by_column = columns * float(row @ row) / (rows - 1), rows * float(column @ column) / (columns - 1)
    by_rest = float((rest**2).sum()) / ((rows - 1) * (columns - 1))
    single = by_row / columns + by_column / rows + by_rest * (1 - 1 / rows - 1 / columns)
    added = max(by_column - by_rest, 0.0)
    total = by_row + added
    if not total:
        t = 0.0
    elif rows >= _FEW_ROWS and columns >= _FEW_COLUMNS:
        t = student_t(total**2 / (by_row**2 / (rows - 1) + added**2 / (columns - 1)))
    else:
        t = (student_t(rows - 1) * by_row + student_t(columns - 1) * added) / total
    return Estimate(mean, math.sqrt(single), t * math.sqrt(total / table.size), over)


def wilson(share: float, images: int) -> tuple[float, float]:
    """Gives the 95 % interval of an accuracy, 0 to 1, for the test images (1 or more) as a sample of others.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    scale = 1 + _Z**2 / images
    centre = (share + _Z**2 / (2 * images)) / scale
    half = _Z * math.sqrt(share * (1 - share) / images + _Z**2 / (4 * images**2)) / scale
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)  # whatever rounding does


def over(estimates: Iterable[Estimate | None]) -> str:
    """Names what estimates are over, for the caption of a table or chart: "3 fine-tuning seeds or 3 pretrainings".

    Each once; "10 draws" is left out beside "3 pretrainings and 10 draws". "" where nothing was repeated.
    """
    names = list(dict.fromkeys(of.over for of in estimates if of is not None and of.half is not None))
    return " or ".join(one for one in names if not any(one in other for other in names if other != one))


def student_t(freedom: float) -> float:
    """Gives the t that |T| stays below with probability 95 %, for Student's T of `freedom` degrees, 1 or more."""
    return float(special.stdtrit(freedom, 0.975))
