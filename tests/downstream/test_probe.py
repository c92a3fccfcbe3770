"""Probes against scikit-learn, written-out formulas and cases by hand."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mpp.downstream import logistic, probe
from mpp.downstream.logistic import fit_linear
from mpp.downstream.probe import knn_votes, sweep_knn, sweep_linear

KS = (10, 20, 100, 200)


def blobs(seed: int, n: int, classes: int, d: int = 10, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Features of uneven scale that overlap between classes, and labels; the classes' centres never change."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    labels = rng.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    centres, scale = fixed.normal(size=(classes, d)), np.exp(fixed.normal(size=d))
    return (centres[labels] + noise * rng.normal(size=(n, d))) * scale + 5 * scale, labels


def probabilities(probe: logistic.LinearProbe, features: np.ndarray) -> np.ndarray:
    return torch.from_numpy(probe.logits(features)).softmax(dim=1).numpy()


def knn_predict(
    features: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int, temperature: float = 0.07
) -> np.ndarray:
    votes = list(knn_votes(features, labels, test, classes, [k], temperature))
    return np.concatenate(votes, axis=1)[0].argmax(axis=1)


def objective(probe: logistic.LinearProbe, features: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """Mean cross-entropy + l2 / 2 |W|^2, by PyTorch."""
    logits = torch.from_numpy(probe.logits(features))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    return float(loss) + l2 / 2 * float((probe.weights**2).sum())


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("l2", [2.0**-14, 2.0**-6, 2.0])
def test_linear_probe_is_that_of_scikit_learn(classes: int, l2: float) -> None:
    (features, labels), (test, _) = blobs(0, 200, classes), blobs(1, 50, classes)
    probe = fit_linear(features, labels, classes, l2)
    mean, std = features.mean(0), features.std(0) + 1e-5
    # Of two classes scikit-learn has one weight vector w, where softmax has w / 2 and -w / 2: half the penalty.
    strength = (2 if classes == 2 else 1) / (len(labels) * l2)
    reference = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000)
    reference.fit((features - mean) / std, labels)
    want = reference.predict_proba((test - mean) / std)
    np.testing.assert_allclose(probabilities(probe, test), want, atol=1e-4)


def test_linear_probe_is_the_same_again_from_elsewhere_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(3, 120, 5)
    solved, again = fit_linear(features, labels, 5, 1e-3), fit_linear(features, labels, 5, 1e-3)
    np.testing.assert_array_equal(again.weights, solved.weights)
    warm = fit_linear(features, labels, 5, 1e-3, start=fit_linear(features, labels, 5, 1.0))
    np.testing.assert_allclose(probabilities(warm, features), probabilities(solved, features), atol=1e-4)
    for limit in (0, 2**20):
        monkeypatch.setattr(logistic, "_ROWS", 70)  # seven rows
        monkeypatch.setattr(logistic, "_IN_MEMORY", limit)
        blocks = fit_linear(features, labels, 5, 1e-3)
        np.testing.assert_allclose(probabilities(blocks, features), probabilities(solved, features), atol=1e-5)


@pytest.mark.parametrize("images", [50, 400], ids=["fewer images than features", "more"])
def test_features_that_rise_and_fall_together_take_few_steps(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    mixed = rng.normal(size=(images, 60)) * np.logspace(0, -4, 60) @ rng.normal(size=(60, 60))
    labels = rng.integers(0, 4, images)
    monkeypatch.setattr(logistic, "_MOST_STEPS", 200)
    solved = fit_linear(mixed, labels, 4, 2.0**-14)
    ours = objective(solved, mixed, labels, 2.0**-14)
    reference = LogisticRegression(C=2.0**14 / images, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    reference.fit((mixed - solved.mean) / solved.std, labels)
    other = logistic.LinearProbe(solved.mean, solved.std, reference.coef_.T, reference.intercept_)
    assert ours == pytest.approx(objective(other, mixed, labels, 2.0**-14), rel=1e-6)


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = blobs(6, 90, 3)
    solved = fit_linear(features, 2 * labels, 6, 0.1)
    assert set(solved.logits(features).argmax(axis=1).tolist()) <= {0, 2, 4}
    np.testing.assert_array_equal(probabilities(solved, features)[:, [1, 3, 5]], 0.0)
    without = fit_linear(features, labels, 3, 0.1)
    np.testing.assert_allclose(probabilities(solved, features)[:, ::2], probabilities(without, features), atol=1e-12)
    assert np.isfinite(fit_linear(features, 2 * labels, 6, 0.01, start=solved).weights).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_dimension_without_variance_counts_for_nothing(dtype: type) -> None:
    features, labels = blobs(7, 60, 3)
    features = features.astype(dtype)
    dead = np.insert(features, 4, dtype(0.1), axis=1)
    solved, without = fit_linear(dead, labels, 3, 0.1), fit_linear(features, labels, 3, 0.1)
    elsewhere = np.insert(features, 4, dtype(30.0), axis=1)
    np.testing.assert_allclose(solved.logits(elsewhere), without.logits(features), atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20, 150])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float) -> None:
    (features, labels), (test, _) = blobs(8, 150, 6, noise=3.0), blobs(9, 80, 6, noise=3.0)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(features, labels)
    expected = reference.predict(test).astype(int)
    np.testing.assert_array_equal(knn_predict(features, labels, test, 6, k, temperature), expected)
    (several,) = knn_votes(features, labels, test, 6, [1, k, 60], temperature)
    np.testing.assert_array_equal(several[1].argmax(axis=1), expected)
    monkeypatch.setattr(probe, "_BLOCK", 150 * 7)
    blocks = list(knn_votes(features, labels, test, 6, [k], temperature))
    assert [block.shape[1] for block in blocks] == [7] * 11 + [3]
    votes = np.concatenate(blocks, axis=1)[0].clip(min=0)
    np.testing.assert_allclose(votes / votes.sum(1, keepdims=True), reference.predict_proba(test), rtol=1e-4, atol=1e-9)


def test_knn_ties_go_to_the_lowest_index() -> None:
    rng = np.random.default_rng(12)
    features, test = np.repeat(rng.normal(size=(5, 33)), 20, axis=0), rng.normal(size=(300, 33)) @ np.eye(33)
    labels = np.tile(np.arange(20), 5)  # of 20 equal images the k lowest are of classes 0 to k - 1
    assert (knn_predict(features, labels, test, 20, 1) == 0).all()
    (votes,) = knn_votes(features, labels, test, 20, [3])
    assert (np.isfinite(votes[0]) == (np.arange(20) < 3)).all()


def test_knn_by_hand_and_at_any_temperature() -> None:
    features, labels = np.array([[1.0, 0.0], [0.0, 3.0], [0.0, 2.0]]), np.array([2, 0, 0])
    # Cosines: 0.857 once, 0.514 twice. Sharp: the nearest. Flat: two against one. exp(857) would be infinite.
    for temperature, expected in ((0.07, 2), (1.0, 0), (1e-3, 2)):
        assert knn_predict(features, labels, np.array([[1.0, 0.6]]), 3, 3, temperature).tolist() == [expected]
    assert knn_predict(features, labels, np.zeros((1, 2)), 3, 3).tolist() == [0]  # similar to none, so all vote alike


@pytest.mark.parametrize("val", [None, blobs(15, 60, 8, noise=2.0)], ids=["a tenth", "validation images"])
@pytest.mark.parametrize("sweep", [sweep_linear, partial(sweep_knn, ks=KS)])
def test_sweeps_choose_on_others_and_score_with_everything(sweep: Any, val: Any) -> None:
    (features, labels), (test, test_labels) = blobs(13, 400, 8, noise=2.0), blobs(14, 150, 8, noise=2.0)
    result = sweep((features, labels), (test, test_labels), 8, val=val)
    learned, held = ((features, labels), val) if val else probe.cut_tenth((features, labels), None)
    assert (len(learned[1]), len(held[1])) == ((400, 60) if val else (360, 40))
    table = dict(result.table)
    assert result.chosen == next(value for value, share in result.table if share == max(table.values()))
    if sweep is sweep_linear:
        assert [value for value, _ in result.table] == sorted(probe.L2_SWEEP, reverse=True)
        scores = fit_linear(features, labels, 8, result.chosen).logits(test)
        on_held = fit_linear(*learned, 8, result.chosen).logits(held[0]).argmax(axis=1)
    else:
        assert tuple(value for value, _ in result.table) == KS
        scores = next(knn_votes(features, labels, test, 8, [int(result.chosen)]))[0]
        on_held = knn_predict(*learned, held[0], 8, int(result.chosen))
    assert table[result.chosen] == (on_held == held[1]).mean()
    np.testing.assert_array_equal(result.predicted, scores.argmax(axis=1))
    assert result.top1 == (result.predicted == test_labels).mean()
    first = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hit = (first == test_labels[:, None]) & np.isfinite(np.take_along_axis(scores, first, axis=1))
    assert result.top5 == hit.any(axis=1).mean()


@pytest.mark.parametrize("sweep", [sweep_linear, partial(sweep_knn, ks=KS)])
def test_test_data_decides_nothing_and_classes_that_were_never_trained_are_wrong(sweep: Any) -> None:
    train, (test, test_labels) = blobs(17, 100, 6, noise=0.1), blobs(18, 40, 6, noise=0.1)
    beyond = np.where(np.arange(40) < 10, test_labels + 6, test_labels)
    one, other = sweep(train, (test, beyond), 6), sweep(train, (-test, beyond), 6)
    assert (one.top1, one.top5) == (0.75, 0.75)
    assert (one.chosen, one.table) == (other.chosen, other.table)


def test_top5_does_not_count_classes_without_a_vote() -> None:
    features, labels = np.eye(8), np.arange(8)
    result = sweep_knn((features, labels), (features[:1], np.array([1])), 8, ks=[1])
    assert (result.top1, result.top5, result.chosen, result.table) == (0.0, 0.0, 1, ())


def test_few_images_leave_few_k() -> None:
    features, labels = blobs(19, 16, 2)
    assert [k for k, _ in sweep_knn((features, labels), (features, labels), 2, KS).table] == [10]
    assert [k for k, _ in sweep_knn((features[:6], labels[:6]), (features, labels), 2, KS).table] == [5]


def test_refuses_what_does_not_fit() -> None:
    features, labels = blobs(22, 30, 3)
    one, bad = np.ones_like(labels), features.copy()
    bad[2, 1], bad[9, 1] = np.nan, np.inf
    diverged = r"features of 2 of 30 images are NaN or infinite: has the encoder diverged\?"
    for attempt, message in (
        (lambda: sweep_linear((bad, labels), (features, labels), 3), diverged),
        (lambda: sweep_linear((features, labels), (bad, labels), 3), diverged),
        (lambda: sweep_knn((features, labels), (bad, labels), 3, KS), diverged),
        (lambda: sweep_knn((features, one), (features, labels), 3, KS), r"two classes or more; all 30 are of class 1"),
        (lambda: sweep_knn((features, labels), (features, labels), 3, [31]), r"k must be 1 to 30, the number of train"),
        (lambda: sweep_linear((features[:3], np.arange(3)), (features, labels), 3), r"no class has two images"),
    ):
        with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
            attempt()
