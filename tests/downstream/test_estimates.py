"""Intervals: those of SciPy, and that a nominal 95 % covers the truth in 93 to 97 % of simulated cases."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpp.downstream.estimates import Estimate, estimate, of_groups, of_table, over, wilson

_TIMES = 1500


def covers(simulated: Callable[[np.random.Generator], Estimate]) -> float:
    """Share of the intervals that hold the true mean, 0."""
    rng = np.random.default_rng(0)
    found = [simulated(rng) for _ in range(_TIMES)]
    return float(np.mean([of.half is not None and abs(of.mean) <= of.half for of in found]))


def test_repeated_in_one_way_it_is_the_interval_of_scipy() -> None:
    values = np.random.default_rng(0).uniform(0.2, 0.8, size=5)
    found = estimate(values.tolist(), "5 draws")
    assert found.half is not None
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-6)
    assert (found.spread, found.over) == (pytest.approx(values.std(ddof=1)), "5 draws")
    assert estimate([0.5], "1 draw") == Estimate(0.5, None, None, "1 draw")


@pytest.mark.parametrize(("sizes", "within"), [((1, 1), 0.3), ((1,) * 10, 3.0), ((2, 2, 2), 0.3), ((3, 2, 2), 3.0)])
def test_of_fine_tunings_of_several_pretrainings_95_percent_are_95(sizes: tuple[int, ...], within: float) -> None:
    def simulated(rng: np.random.Generator) -> Estimate:
        return of_groups({at: rng.normal(rng.normal(), within, n).tolist() for at, n in enumerate(sizes)}, "")

    assert 0.93 <= covers(simulated) <= 0.97


# Standard deviations of the effects of pretrainings, of draws, and of the rest.
EFFECTS = [(1, 0, 0.3), (0, 1, 0.3), (1, 1, 0.3), (0.3, 2, 1), (0, 0, 1)]
TABLES = [((3, 5), effects, 0.97) for effects in EFFECTS] + [((5, 10), EFFECTS[3], 0.97)]
TABLES += [((2, 3), effects, 0.99) for effects in EFFECTS] + [((2, 10), EFFECTS[2], 0.99), ((3, 3), EFFECTS[2], 0.99)]
TABLES += [((1, 10), EFFECTS[1], 0.97), ((3, 1), EFFECTS[0], 0.97)]


@pytest.mark.parametrize(("size", "effects", "most"), TABLES)
def test_of_pretrainings_and_draws_95_percent_are_95_and_of_few_no_less(
    size: tuple[int, int], effects: tuple[float, float, float], most: float
) -> None:
    of, draw, rest = effects

    def simulated(rng: np.random.Generator) -> Estimate:
        return of_table(rng.normal(0, of, (size[0], 1)) + rng.normal(0, draw, (1, size[1])) + rng.normal(0, rest, size))

    assert 0.93 <= covers(simulated) <= most


@given(n=st.integers(1, 300), share=st.floats(0, 1))
def test_of_test_images_it_is_the_interval_of_scipy(n: int, share: float) -> None:
    right = round(share * n)
    want, (low, high) = stats.binomtest(right, n).proportion_ci(0.95, method="wilson"), wilson(right / n, n)
    assert (low, high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1


def test_of_a_table_by_hand() -> None:
    # Rows of mean 2 and 4, columns 2 and 4, rest of 0: mean squares of 4, 4, 0. Both effects count: 4 + 4 over 4 cells.
    found = of_table(np.array([[1.0, 3.0], [3.0, 5.0]]))
    assert found.mean == 3
    assert found.half == pytest.approx(stats.t.ppf(0.975, 1) * np.sqrt(8 / 4), rel=1e-5)
    assert found.spread == pytest.approx(2)  # variances of 2 and 2
    assert found.over == "2 pretrainings and 2 draws of the shots"
    assert of_table(np.array([[1.0, 3.0]])).over == "2 draws of the shots"
    assert of_table(np.array([[1.0], [3.0]])).over == "2 pretrainings and 1 draw of the shots"
    assert of_table(np.full((2, 2), 0.5)).half == 0


def test_of_groups_the_mean_is_that_of_their_means() -> None:
    found = of_groups({"a": [1.0, 3.0], "b": [4.0]}, "2 pretrainings")
    assert (found.mean, found.half) == (3.0, pytest.approx(stats.t.ppf(0.975, 1)))


def test_what_figures_are_over_is_said_once() -> None:
    draws, both = estimate([1, 2], "10 draws"), estimate([1, 2], "3 pretrainings and 10 draws")
    assert over([draws, None, estimate([1], "1 draw"), draws]) == "10 draws"
    assert over([draws, both]) == "3 pretrainings and 10 draws"
    assert over([draws, estimate([1, 2], "2 seeds")]) == "10 draws or 2 seeds"
    assert over([]) == ""
