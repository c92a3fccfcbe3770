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
    colours = patch_colours(tokens, (2, 3))
    assert colours.dtype == np.uint8
    np.testing.assert_allclose(colours, expected, atol=0.51)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_features_that_are_all_the_same_are_grey_and_one_point(constant: float, scale: float) -> None:
    tokens = np.full((2, 6, 5), constant * scale, np.float32)
    assert (patch_colours(tokens, (2, 3)) == 128).all()
    points, share = principal_components(tokens[0], 2)
    assert (points == 0).all()
    assert (share == 0).all()


def test_features_along_one_line_have_one_component() -> None:
    """The others are rounding, which must not be blown up to colours."""
    direction = np.random.default_rng(1).normal(size=8)
    tokens = (np.linspace(-1, 3, 12)[:, None] * direction).astype(np.float32).reshape(2, 6, 8)
    colours = patch_colours(tokens, (3, 2)).reshape(12, 3)
    assert (np.abs(np.diff(colours[:, 0].astype(int))) > 10).all()
    assert (colours[:, 1:] == 128).all()
    points, share = principal_components(tokens.reshape(12, 8), 2)
    assert (points[:, 1] == 0).all()
    assert share == pytest.approx([1, 0])


@pytest.mark.parametrize("dim", [1, 2])
def test_fewer_dimensions_than_components_leave_the_others_empty(dim: int) -> None:
    tokens = spread(8, dim).reshape(2, 4, dim)
    colours = patch_colours(tokens, (2, 2))
    assert len(np.unique(colours[..., dim - 1])) > 4
    assert (colours[..., dim:] == 128).all()
    points, share = principal_components(tokens.reshape(8, dim), 2)
    assert share.sum() == pytest.approx(1)
    assert (points[:, dim:] == 0).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_one_or_two_images_are_enough(rows: int) -> None:
    points, share = principal_components(spread(rows, 5), 2)
    assert points.shape == (rows, 2)
    assert share.tolist() == pytest.approx([rows - 1, 0])
    np.testing.assert_allclose(points[0] + points[-1], 0, atol=1e-6)
    assert patch_colours(spread(rows, 5)[:, None], (1, 1)).shape == (rows, 1, 1, 3)


def test_neighbours_are_those_of_scikit_learn() -> None:
    given = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32) + 0.5
    queries = np.array([5, 0, 63])
    _, expected = NearestNeighbors(n_neighbors=8, metric="cosine").fit(given).kneighbors(given[queries])
    np.testing.assert_array_equal(expected[:, 0], queries)
    np.testing.assert_array_equal(neighbours(given, queries, 7), expected[:, 1:])


def test_a_twin_is_the_nearest_but_never_the_query_itself() -> None:
    given = np.array([[1, 0], [1, 1], [3, 3], [0, 0], [-1, 0]], np.float64)
    # Four others at most, the lower of equal ones first.
    assert neighbours(given, np.array([1, 3]), 10).tolist() == [[2, 0, 3, 4], [0, 1, 2, 4]]
    assert neighbours(np.ones((1, 4), np.float32), np.array([0]), 3).shape == (1, 0)
