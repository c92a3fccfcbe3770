"""Intervals: those of SciPy, and that a nominal 95 % covers the truth in 93 to 97 % of simulated cases."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mpp.downstream.estimates import Estimate, estimate, of_groups, of_table, over, student_t, wilson

_TIMES = 3000

Simulated = Callable[[np.random.Generator], Estimate]


def covers(simulated: Simulated, truth: float = 0.0) -> float:
    """Share of the intervals that hold the truth."""
    rng = np.random.default_rng(0)
    found = [simulated(rng) for _ in range(_TIMES)]
    return float(np.mean([of.half is not None and abs(of.mean - truth) <= of.half for of in found]))


def table(rng: np.random.Generator, size: tuple[int, int], of: float, draw: float, rest: float) -> np.ndarray:
    """Pretrainings x draws, whose effects have these standard deviations; the true mean is 0."""
    rows, columns = size
    return rng.normal(0, of, (rows, 1)) + rng.normal(0, draw, (1, columns)) + rng.normal(0, rest, size)


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 3, 4.7, 9, 30, 99, 1000])
def test_student_t_is_that_of_scipy(freedom: float) -> None:
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)


def test_repeated_in_one_way_it_is_the_interval_of_scipy() -> None:
    values = np.random.default_rng(0).uniform(0.2, 0.8, size=5)
    found = estimate(values.tolist(), "5 draws")
    assert found.half is not None
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-6)
    assert (found.spread, found.over) == (pytest.approx(values.std(ddof=1)), "5 draws")
    assert estimate([0.5], "1 draw") == Estimate(0.5, None, None, "1 draw")


@pytest.mark.parametrize("number", [2, 3, 10])
def test_of_independent_measurements_95_percent_are_95(number: int) -> None:
    assert 0.93 <= covers(lambda rng: estimate(rng.normal(size=number).tolist(), "")) <= 0.97


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (3, 2, 2)])
@pytest.mark.parametrize("within", [0.3, 3.0])
def test_of_fine_tunings_of_several_pretrainings_95_percent_are_95(sizes: tuple[int, ...], within: float) -> None:
    def simulated(rng: np.random.Generator) -> Estimate:
        return of_groups({at: rng.normal(rng.normal(), within, n).tolist() for at, n in enumerate(sizes)}, "")

    assert 0.93 <= covers(simulated) <= 0.97


EFFECTS = [(1, 0, 0.3), (0, 1, 0.3), (1, 1, 0.3), (0.3, 2, 1), (0, 0, 1)]


@pytest.mark.parametrize("size", [(3, 5), (3, 10), (5, 10)])
@pytest.mark.parametrize("effects", EFFECTS)
def test_of_pretrainings_and_draws_95_percent_are_95(size: tuple[int, int], effects: tuple[float, ...]) -> None:
    assert 0.93 <= covers(lambda rng: of_table(table(rng, size, *effects))) <= 0.97


@pytest.mark.parametrize("size", [(2, 3), (2, 10), (3, 3)])
@pytest.mark.parametrize("effects", EFFECTS)
def test_of_few_pretrainings_or_draws_95_percent_are_no_less(size: tuple[int, int], effects: tuple[float, ...]) -> None:
    assert 0.93 <= covers(lambda rng: of_table(table(rng, size, *effects))) <= 0.99


@pytest.mark.parametrize("size", [(1, 10), (3, 1)])
def test_of_one_row_or_column_95_percent_are_95(size: tuple[int, int]) -> None:
    effects = (0, 1, 0.3) if size[0] == 1 else (1, 0, 0.3)
    assert 0.93 <= covers(lambda rng: of_table(table(rng, size, *effects))) <= 0.97


def test_all_cells_taken_for_independent_would_cover_half() -> None:
    """What this module is there to prevent: 3 pretrainings x 10 draws taken for 30 measurements."""

    def pooled(rng: np.random.Generator) -> Estimate:
        return estimate(table(rng, (3, 10), 1, 0, 0.6).ravel().tolist(), "")

    assert covers(pooled) < 0.6


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("images", [1_000, 10_000])
def test_of_test_images_95_percent_are_95(share: float, images: int) -> None:
    right = np.random.default_rng(0).binomial(images, share, _TIMES)
    ends = [wilson(float(k) / images, images) for k in right]
    assert 0.93 <= np.mean([low <= share <= high for low, high in ends]) <= 0.97


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
    with pytest.raises(ValueError, match="a table of pretrainings x draws"):
        of_table(np.zeros((0, 3)))


def test_of_groups_the_mean_is_that_of_their_means() -> None:
    found = of_groups({"a": [1.0, 3.0], "b": [4.0]}, "2 pretrainings")
    assert (found.mean, found.half) == (3.0, pytest.approx(student_t(1) * 1.0))
    with pytest.raises(ValueError, match="one measurement or more"):
        of_groups({}, "")
    with pytest.raises(ValueError, match="one measurement or more"):
        of_groups({"a": []}, "")


def test_what_figures_are_over_is_said_once() -> None:
    draws, both = estimate([1, 2], "10 draws"), estimate([1, 2], "3 pretrainings and 10 draws")
    assert over([draws, None, estimate([1], "1 draw"), draws]) == "10 draws"
    assert over([draws, both]) == "3 pretrainings and 10 draws"
    assert over([draws, estimate([1, 2], "2 seeds")]) == "10 draws or 2 seeds"
    assert over([]) == ""
