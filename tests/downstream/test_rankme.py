"""RankMe against its formula, written out with numpy, and against features of known rank."""

import math
from typing import Any

import numpy as np
import pytest

from mpp.downstream.rankme import LARGEST, RANK, collapse, figures, rankme
from mpp.downstream.verdict import of_pretraining


def drawn(n: int, d: int, rank: int) -> np.ndarray:
    """Features of this rank whose directions are all as strong."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (n, d))
    return (left @ right.T).astype(np.float32)


def test_it_is_the_formula_of_the_paper() -> None:
    features = np.random.default_rng(1).normal(size=(60, 24)).astype(np.float32) + 2  # not centred
    sigma = np.sqrt(np.linalg.eigvalsh(features.T.astype(np.float64) @ features))
    p = sigma / np.abs(sigma).sum() + 1e-7
    expected = math.exp(-sum(each * math.log(each) for each in p))
    assert rankme(features) == pytest.approx(expected, rel=1e-5)
    centred = rankme(features - features.mean(axis=0))
    assert abs(centred - expected) > 1


@pytest.mark.parametrize(("n", "d", "rank"), [(50, 32, 1), (50, 32, 7), (50, 32, 32), (20, 32, 20)])
def test_it_is_the_rank_where_all_directions_are_as_strong(n: int, d: int, rank: int) -> None:
    found = figures(drawn(n, d, rank))
    assert found == {RANK: pytest.approx(rank, rel=1e-4), LARGEST: min(n, d)}


def test_features_that_are_all_the_same_and_none_that_are_not_finite() -> None:
    assert rankme(np.full((30, 16), 0.3, np.float32)) == pytest.approx(1, abs=1e-3)
    assert rankme(np.zeros((30, 16), np.float32)) == 1
    assert math.isnan(rankme(np.full((30, 16), np.inf, np.float32)))


def rows(*ranks: float, largest: int = 192) -> list[dict[str, Any]]:
    measured = [{"step": step, "images": step, RANK: rank, LARGEST: largest} for step, rank in enumerate(ranks)]
    return [*measured, {"step": 9, "images": 9, "loss": 1.0}]


@pytest.mark.parametrize(
    ("found", "collapsed"),
    [
        (rows(14.0, 1.2), True),
        (rows(14.0, 1.2, math.nan), True),
        (rows(14.0, 1.2, 6.0), False),
        (rows(14.0, 2.1), False),
        (rows(2.2, 1.9), False),  # images that are much alike
        (rows(1.0), False),  # measured once
        (rows(3.0, 1.0, largest=4), False),  # of four images
        (rows(), False),
    ],
)
def test_a_collapse_is_told_in_words(found: list[dict[str, Any]], collapsed: bool) -> None:
    text = collapse(found)
    assert (
        (f"fallen from 14.0 to {found[1][RANK]:.1f} of {found[1][LARGEST]} possible" in text) if collapsed else not text
    )
    assert (text in of_pretraining(found, "accuracy").sentences) == collapsed
