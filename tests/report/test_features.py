"""Components and neighbours against scikit-learn, and input in which there is nothing to find."""

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from mpp.report.features import neighbours, patch_colours, principal_components


def spread(rows: int, dim: int, dtype: type = np.float32) -> np.ndarray:
    """Features whose dimensions matter less and less, turned at random, far from the origin."""
    draw = np.random.default_rng(0)
    turn, _ = np.linalg.qr(draw.normal(size=(dim, dim)))
    return ((draw.normal(size=(rows, dim)) * 0.7 ** np.arange(dim)) @ turn + 5).astype(dtype)


def components(features: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's coordinates and shares of variance, by components whose largest loading is positive."""
    found: Any = PCA(number, svd_solver="full").fit(features.astype(np.float64))
    sign = np.sign([row[np.abs(row).argmax()] for row in found.components_])
    return found.transform(features.astype(np.float64)) * sign, found.explained_variance_ratio_


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "dim"), [(200, 12), (8, 30), (50, 2)])
def test_the_plane_is_that_of_scikit_learn(rows: int, dim: int, dtype: type) -> None:
    given = spread(rows, dim, dtype)
    points, share = principal_components(given, 2)
    expected, expected_share = components(given, 2)
    np.testing.assert_allclose(points, expected, atol=1e-5)
    np.testing.assert_allclose(share, expected_share, rtol=1e-9)


def test_patches_are_coloured_by_three_components_over_all_images_between_percentiles() -> None:
    tokens = spread(4 * 6, 10).reshape(4, 6, 10)
    points, _ = components(tokens.reshape(-1, 10), 3)
    low, high = np.percentile(points, [1, 99], axis=0)
    expected = (255 * (points - low) / (high - low)).clip(0, 255).reshape(4, 2, 3, 3)
    np.testing.assert_allclose(patch_colours(tokens, (2, 3)), expected, atol=0.51)


LINE = np.linspace(-1, 3, 12)[:, None] * np.random.default_rng(1).normal(size=8)


@pytest.mark.parametrize(
    ("features", "number"),
    [
        *((np.full((12, 5), value), 0) for value in (0, 1e-4, 0.1, 100)),  # all the same
        (LINE, 1),  # the other components are rounding, which must not be blown up to colours
        (spread(12, 1), 1),
        (spread(12, 2), 2),
        (spread(1, 5), 0),
        (spread(2, 5), 1),
    ],
)
def test_components_in_which_nothing_differs_are_grey_and_zero(features: np.ndarray, number: int) -> None:
    features = features.astype(np.float32)
    points, share = principal_components(features, 2)
    assert share.sum() == pytest.approx(int(number > 0))
    assert (points[:, number:] == 0).all()
    assert (share[number:] == 0).all()
    colours = patch_colours(features[:, None], (1, 1)).reshape(-1, 3)
    assert (colours[:, number:] == 128).all()
    assert all(len(np.unique(each)) > len(features) / 2 for each in colours[:, :number].T)


def test_neighbours_are_those_of_scikit_learn() -> None:
    given = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32) + 0.5
    queries = np.array([5, 0, 63])
    _, expected = NearestNeighbors(n_neighbors=8, metric="cosine").fit(given).kneighbors(given[queries])
    np.testing.assert_array_equal(neighbours(given, queries, 7), expected[:, 1:])


def test_a_twin_is_the_nearest_but_never_the_query_itself() -> None:
    given = np.array([[1, 0], [1, 1], [3, 3], [0, 0], [-1, 0]], np.float64)
    # Four others at most, the lower of equal ones first.
    assert neighbours(given, np.array([1, 3]), 10).tolist() == [[2, 0, 3, 4], [0, 1, 2, 4]]
