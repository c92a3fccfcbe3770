"""RankMe, an effective rank of features: how many directions they use, followed in a pretraining without any labels.

What it is good for: features that collapse, so that images hardly differ in them, have a low one. What it is not: a
measure of their use. An untrained encoder's can be higher than a trained one's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

RANK, LARGEST = "features/effective_rank", "features/largest_rank"
"""Names in metrics.jsonl: of the rank, and of the largest that so many images and dimensions can have."""
IMAGES_A_DIMENSION = 2
_EPSILON = 1e-7
_FEW = 2  # directions; no share of the largest rank, for in its first steps a sound run has 3 to 4, however wide


def rankme(features: Float[np.ndarray, "n d"]) -> float:
    """RankMe of features Z, about 1 to min(n, d): exp(-sum_k p_k log p_k), p_k = sigma_k / sum_j sigma_j + 1e-7.

    The min(n, d) singular values sigma are those of Z as it is, in float64. Z is not centred (unlike in the study's
    effective rank, of `mpp.report.features`): features that are all the same have rank 1, where centring would leave
    the rounding of a run's bf16 to be measured. NaN for features that are not finite.

    Source: Garrido et al., "RankMe" (ICML 2023, arXiv 2210.02885), equation 1.
    """
    if not np.isfinite(features).all():
        return math.nan
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    if not values.any():
        return 1.0
    p = values / values.sum() + _EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


def figures(features: Float[np.ndarray, "n d"]) -> dict[str, float]:
    """What to log of features."""
    return {RANK: rankme(features), LARGEST: min(features.shape)}


def ranks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """The finite ranks in rows of metrics.jsonl, and the largest possible."""
    return [(row[RANK], row[LARGEST]) for row in rows if math.isfinite(row.get(RANK, math.nan))]


def collapse(rows: Sequence[Mapping[str, Any]]) -> str:
    """Says by the rows of a run that its features have collapsed; empty where they have not, or it is not known.

    They have where the last rank is below 2, a tenth of the largest possible, and half the first.
    """
    found = ranks(rows)
    if not found:
        return ""
    (first, _), (last, largest) = found[0], found[-1]
    if last >= min(_FEW, largest / 10, first / 2):
        return ""
    return (
        f"The features have collapsed: their effective rank has fallen from {first:.1f} to {last:.1f} of {largest:,} "
        "possible, so images hardly differ in them; try a third of --optim.lr, and a longer --schedule.warmup."
    )
