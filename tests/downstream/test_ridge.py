"""The closed form, against the original code's numbers, scikit-learn, a direct solve and cases done by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.downstream import ridge


def problem(seed: int, n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of uneven scale and offset, labels, and ten test rows."""
    rng = np.random.default_rng(seed)
    scale, offset = np.exp(rng.normal(size=d)), 5 * rng.normal(size=d)
    draw = rng.normal(size=(n + 10, d)) * scale + offset
    return draw[:n], rng.integers(0, classes, n), draw[n:]


def augmented(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Whitened by the reference's statistics, with the constant feature: the definition, spelled out."""
    whitened = (features - reference.mean(axis=0)) / (reference.std(axis=0) + 1e-5)
    return np.hstack([whitened, np.full((len(features), 1), 100.0)])


def direct(features: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """(X'X + l2 I)^-1 X'Y by one solve."""
    x = augmented(features, features)
    return np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ (2 * np.eye(classes)[labels] - 1))


def weights(solved: ridge.Ridge, l2: list[float]) -> np.ndarray:
    """(L, w, K): the formula of the module's docstring; the last row multiplies the constant feature."""
    return np.stack([solved.left / (solved.eigenvalues + one) @ solved.right for one in l2])


def logits(solved: ridge.Ridge, features: np.ndarray, l2: list[float]) -> np.ndarray:
    return np.stack(list(solved.logits(features, l2)))


@pytest.mark.parametrize("shots", [1, 5, 10])
def test_matches_the_original_code(shared: Callable[[str], Path], shots: int) -> None:
    with np.load(shared("fixtures/fewshot_lsr.npz"), allow_pickle=False) as fixture:
        picked = fixture[f"seed0/{shots}shot/index"].astype(int)
        features, labels = fixture["pool_features"][picked], fixture["pool_labels"].astype(int)[picked]
        test, test_labels = fixture["test_features"], fixture["test_labels"].astype(int)
        want = {key: fixture[f"seed0/{shots}shot/{key}"] for key in ("mean", "std", "eigs", "acc_f64")}
        want |= {key: fixture[f"seed0/{shots}shot/{key}_f64"] for key in ("weights", "logits")}
        l2 = fixture["l2"].astype(float).tolist()
    solved = ridge.fit(features, labels, 20)
    # Float64 results that were stored as float32: half a unit in the last of 24 bits. The statistics are float32 runs.
    np.testing.assert_allclose(solved.mean, want["mean"][0], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(solved.std, want["std"][0], rtol=1e-6, atol=2e-6)
    # Those of the float32 run are exact to a few ulps of the largest, 100 * 100 * n.
    np.testing.assert_allclose(solved.eigenvalues, want["eigs"], rtol=1e-6, atol=5e-7 * want["eigs"].max())
    np.testing.assert_allclose(weights(solved, l2), want["weights"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(logits(solved, test[:150], l2), want["logits"], rtol=1e-6, atol=1e-7)
    assert solved.accuracy(test, test_labels, l2).astype(np.float32).tolist() == want["acc_f64"].tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 30), d=st.integers(1, 30), classes=st.integers(2, 7))
def test_agrees_with_a_direct_solve(seed: int, n: int, d: int, classes: int) -> None:
    l2 = [2.0**-6, 1.0, 2.0**10, 2.0**19]
    features, labels, test = problem(seed, n, d, classes)
    solved = ridge.fit(features, labels, classes)
    assert solved.eigenvalues.shape == (min(n, d + 1),)
    assert (solved.eigenvalues >= 0).all()
    got = weights(solved, l2)
    np.testing.assert_allclose(got, [direct(features, labels, classes, one) for one in l2], rtol=1e-5, atol=1e-7)
    x = augmented(test, features)  # up to 1e5 where one image makes every dimension dead
    assert (np.abs(logits(solved, test, l2) - x @ got) <= 1e-9 * (np.abs(x) @ np.abs(got))).all()


def test_a_rank_deficient_matrix_has_no_negative_eigenvalues() -> None:
    features, labels, test = problem(9, 4, 40, classes=3)
    solved = ridge.fit(np.tile(features, (6, 1)), np.tile(labels, 6), 3)  # rounding makes some of 20 zeros negative
    assert (solved.eigenvalues >= 0).all()
    assert np.isfinite(logits(solved, test, [1e-12])).all()


@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_dead_dimension_is_as_good_as_absent(n: int, dtype: type) -> None:
    features, labels, test = (part.astype(dtype) for part in problem(4, n, 12, classes=3))
    labels, l2 = labels.astype(int), [2.0**-10]
    dead = np.insert(features, [3, 7], dtype(0.1), axis=1)  # 0.1 and its mean differ by rounding
    without, solved = ridge.fit(features, labels, 3), ridge.fit(dead, labels, 3)
    found = weights(solved, l2)[0]
    assert not found[[3, 8]].any()
    np.testing.assert_allclose(np.delete(found, [3, 8], axis=0), weights(without, l2)[0], rtol=1e-6, atol=1e-9)
    # A test image that differs there is 1e5 standard deviations away and yet counts for nothing.
    alive = np.insert(test, [3, 7], dtype(3.0), axis=1)
    np.testing.assert_allclose(logits(solved, alive, l2), logits(without, test, l2), rtol=1e-5, atol=1e-7)


def test_blocks_of_rows_are_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = problem(5, 50, 10, classes=4)
    solved = ridge.fit(features, labels, 4)
    want = (logits(solved, features, [1.0, 1e3]).argmax(axis=2) == labels).mean(axis=1)
    monkeypatch.setattr(ridge, "_ROWS", 7)
    np.testing.assert_array_equal(solved.accuracy(features, labels, [1.0, 1e3]), want)


def test_refuses_features_that_are_not_finite() -> None:
    features, labels, test = problem(7, 30, 5, classes=3)
    test[:3, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match=r"features of 3 of 10 images are NaN or infinite"):
        ridge.fit(features, labels, 3).logits(test, [1.0])
    features[[1, 8], 0] = np.nan
    with pytest.raises(ValueError, match=r"features of 2 of 30 images are NaN or infinite"):
        ridge.fit(features, labels, 3)
