"""What cross-validation on the shots chooses, and the table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as ReferenceRidge

from mpp.downstream import ridge
from mpp.downstream.shots import (
    DEFAULT_L2,
    L2_GRID,
    FewshotResult,
    Readout,
    choose_l2,
    choose_readout,
    draw_shots,
    score,
    stratified_folds,
)


def blobs(seed: int, per_class: int, classes: int, d: int = 12, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Features that overlap between classes, and labels in random order; the classes' centres never change."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    centres = np.random.default_rng(99).normal(size=(classes, d))
    return centres[labels] + noise * rng.normal(size=(len(labels), d)), labels


@settings(max_examples=80, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), max_size=60).map(lambda values: np.array(values, dtype=np.int64)),
    folds=st.integers(2, 12),
)
def test_folds_are_even_in_each_class_and_in_total(labels: np.ndarray, folds: int) -> None:
    fold = stratified_folds(labels, folds)
    counts = np.bincount(labels, minlength=7)
    alone = counts[labels] == 1 if len(labels) else np.empty(0, dtype=bool)
    np.testing.assert_array_equal(fold == -1, alone)
    sizes = np.bincount(fold[~alone], minlength=folds)
    assert np.ptp(sizes) <= 1
    for of_class in np.flatnonzero(counts > 1):
        sizes = np.bincount(fold[labels == of_class], minlength=folds)
        assert np.ptp(sizes) <= 1
        assert sizes.max() < counts[of_class]  # something is left to learn from


@pytest.mark.parametrize("noise", [0.5, 1.5, 4.0])
@pytest.mark.parametrize(("per_class", "folds"), [(2, 2), (4, 4), (9, 5)])
def test_chosen_l2_is_that_of_scikit_learn_on_the_same_folds(per_class: int, folds: int, noise: float) -> None:
    features, labels = blobs(0, per_class, 6, noise=noise)
    fold = stratified_folds(labels, folds)
    values = sorted(L2_GRID, reverse=True)
    right = np.zeros(len(values))
    for number in range(folds):
        held = fold == number
        mean, std = features[~held].mean(0), features[~held].std(0) + 1e-5
        x = np.hstack([(features - mean) / std, np.full((len(features), 1), 100.0)])
        for i, l2 in enumerate(values):
            reference = ReferenceRidge(alpha=l2, fit_intercept=False, solver="svd")
            reference.fit(x[~held], 2 * np.eye(6)[labels[~held]] - 1)
            right[i] += (reference.predict(x[held]).argmax(1) == labels[held]).sum()
    expected = values[int(right.argmax())], right.max() / len(labels)
    assert choose_l2(features, labels, 6) == expected


def test_ties_go_to_the_strongest_and_one_image_per_class_leaves_nothing_to_choose_by() -> None:
    features, labels = blobs(2, 6, 3, noise=1e-3)  # right whatever the value
    assert choose_l2(features, labels, 3, l2s=[0.25, 1.0, 0.5]) == (1.0, 1.0)
    features, _ = blobs(5, 2, 4)
    assert choose_l2(features, np.arange(8), 8) is None
    assert choose_l2(features, np.array([0, 0, 1, 2, 3, 4, 5, 6]), 7) is not None


def test_each_draw_chooses_on_its_own_shots_and_never_on_test_images() -> None:
    (features, labels), (test, test_labels) = blobs(7, 12, 5), blobs(8, 30, 5)
    drawn = [[draw_shots(labels, k, seed, 5) for k in (1, 6)] for seed in (0, 1, 2)]
    result = score((1, 6), drawn, (features, labels), (test, test_labels), 5, "cv", choosing=True)
    assert result.l2 is not None
    assert result.held_out is not None
    assert result.chosen is not None
    assert result.chosen.tolist() == [[False, True]] * 3
    assert result.l2[:, 0].tolist() == [DEFAULT_L2] * 3
    for i, seed in enumerate((0, 1, 2)):
        rows = draw_shots(labels, 6, seed, 5)
        assert (result.l2[i, 1], result.held_out[i, 1]) == choose_l2(features[rows], labels[rows], 5)
        solved = ridge.fit(features[rows], labels[rows], 5)
        assert result.accuracy[i, 1] == solved.accuracy(test, test_labels, [result.l2[i, 1]])[0]
    other = score((1, 6), drawn, (features, labels), (-test, test_labels[::-1]), 5, "cv")
    np.testing.assert_array_equal(other.l2, result.l2)
    given = score((1, 6), drawn[:1], (features, labels), (test, test_labels), 5, 4.0)
    assert given.chosen is None
    assert np.array_equal(given.l2, [[4.0, 4.0]])


def test_each_draw_chooses_its_readout_by_what_it_held_out() -> None:
    def of(accuracy: list[list[float]], held_out: list[list[float]]) -> FewshotResult:
        return FewshotResult((1, 5), np.array(accuracy), held_out=np.array(held_out))

    nothing, mean, token = np.nan, Readout("run", -1, "mean"), Readout("run", -2, "token")
    results = {  # the deeper layer is last, as the tool has it; the test images like it best everywhere
        token: of([[0.9, 0.9], [0.9, 0.9]], [[nothing, 0.5], [nothing, 0.8]]),
        mean: of([[0.1, 0.2], [0.3, 0.4]], [[nothing, 0.5], [nothing, 0.7]]),
    }
    result, readouts = choose_readout(results)
    assert result.accuracy.tolist() == [[0.1, 0.2], [0.3, 0.9]]  # of nothing and of equals the last layer
    assert readouts == [[mean, mean], [mean, token]]


def test_table_shows_what_was_chosen() -> None:
    accuracy, l2 = np.array([[0.25, 0.5, 0.75]] * 2), np.array([[1024.0, 0.125, 2.0**19], [1024.0, 64.0, 2.0**19]])
    chosen = np.array([[False, True, True]] * 2)
    result = FewshotResult((1, 5, 25), accuracy, {25: 1}, l2=l2, chosen=chosen)
    assert result.table().splitlines() == [
        "shots  accuracy    std  95% interval  L2            (over 2 draws of the shots)",
        "    1     25.0%   0.0%        ± 0.0%  1024*",
        "    5     50.0%   0.0%        ± 0.0%  0.125 to 64",
        "   25     75.0%   0.0%        ± 0.0%  524288        1 class has fewer images",
        "* the default: with one image per class there is nothing to choose L2 by",
    ]
    assert FewshotResult((5,), accuracy[:1, 1:2], l2=l2[:1, 1:2], chosen=chosen[:1, 1:2]).table().splitlines() == [
        "shots  accuracy    std  95% interval  L2      (over 1 draw of the shots)",
        "    5     50.0%      -             -  0.125",
    ]
    assert "L2" not in FewshotResult((5,), accuracy[:, 1:2], l2=l2[:, 1:2]).table()
