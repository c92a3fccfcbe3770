"""Probes of frozen features: a linear classifier and nearest neighbours, each with its setting chosen on held-out data.

    linear  multinomial logistic regression (logistic.py), its L2 from a grid
    k-NN    votes of the k nearest training images by cosine similarity s, each exp(s / temperature)

Both sweeps hold out a tenth of the training features, by class and by seed, choose on it, and then learn from all of
them. Test features are looked at once, with the setting that was chosen.

Source: k-NN as in facebookresearch/dino, eval_knn.py (arXiv 2104.14294, section 4.1), after arXiv 1805.01978.

Letters: n images, d features, K classes, m test images.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64

from mpp.downstream.logistic import LinearProbe, check_labelled, fit_linear
from mpp.downstream.ridge import check_features
from mpp.downstream.shots import stratified_folds

L2_SWEEP = tuple(2.0**power for power in range(-20, 6, 2))
K_SWEEP = (10, 20, 100, 200)

V = TypeVar("V", int, float)

_PARTS = 10  # a tenth is held out
_BLOCK = 2**24  # numbers in one block of rows: 128 MB


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Accuracy of a probe on the test features, and how its setting was chosen."""

    setting: str
    """What was chosen: "l2" or "k"."""
    chosen: float
    table: tuple[tuple[float, float], ...]
    """(value, accuracy on the held-out tenth) in the order tried; empty where there was one value only."""
    top1: float
    """Share of the test images classified correctly, 0 to 1."""
    top5: float | None
    """Share whose class is among the first five; None up to five classes, where it says nothing."""
    predicted: Int64[np.ndarray, " m"]
    """Class of each test image."""

    @property
    def held_out(self) -> float | None:
        """Accuracy of what was chosen on the held-out tenth; None where nothing was held out."""
        return max((accuracy for _, accuracy in self.table), default=None)


def sweep_linear(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    num_classes: int,
    *,
    l2s: Sequence[float] = L2_SWEEP,
    seed: int = 0,
) -> ProbeResult:
    """Linear probe with the L2 that does best on a held-out tenth; each fit starts from the next stronger one's.

    Of equals the strongest is taken: the smallest weights that do as well.

    Args:
        test_labels: those beyond num_classes - 1 are classes that were never trained: always wrong.

    Raises:
        ValueError: as `fit_linear`; no class with two images, so that nothing can be held out; no test images.
    """
    check_labelled(train_features, train_labels, num_classes)
    _check_test(test_features, test_labels, train_features.shape[1])
    strongest_first = _values(l2s, "l2s", reverse=True)
    table: list[tuple[float, float]] = []
    probe: LinearProbe | None = None
    if len(strongest_first) > 1:
        held = _hold_out(train_labels, seed)
        for l2 in strongest_first:
            probe = fit_linear(train_features[~held], train_labels[~held], num_classes, l2, start=probe)
            table.append((l2, _top(probe.logits(train_features[held]), train_labels[held], 1)))
    chosen = _best(table) if table else strongest_first[0]
    probe = fit_linear(train_features, train_labels, num_classes, chosen)
    parts = _slices(len(test_features), num_classes)
    scores = (probe.logits(test_features[rows]) for rows in parts)
    return ProbeResult("l2", chosen, tuple(table), *_scored(scores, test_labels, num_classes))


def knn_predict(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    num_classes: int,
    k: int,
    temperature: float = 0.07,
) -> Int64[np.ndarray, " m"]:
    """Class of each test image by the votes of its k nearest training images.

    Of equally near images the first in `train_features` are taken, of equal votes the lowest class.

    Raises:
        ValueError: k outside 1 to n, a temperature that is not positive, or what `fit_linear` refuses.
    """
    votes = knn_votes(train_features, train_labels, test_features, num_classes, [k], temperature)
    parts = [of_block[0].argmax(axis=1) for of_block in votes]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def knn_votes(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> Iterator[Float64[np.ndarray, "ks block K"]]:
    """Sums of exp((similarity - 1) / temperature) over the k nearest for each k, block by block of test images.

    The 1 changes no prediction; it only keeps the sums finite at any temperature. -inf: no neighbour is of the class.

    Raises:
        ValueError: as `knn_predict`.
    """
    check_labelled(train_features, train_labels, num_classes)
    check_features(test_features, width=train_features.shape[1])
    if not ks or min(ks) < 1 or max(ks) > len(train_features):
        raise ValueError(f"k must be 1 to {len(train_features)}, the number of training images, got {list(ks)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    train = _normalised(train_features)
    for rows in _slices(len(test_features), max(len(train_features), num_classes * len(ks))):
        # Rounded, so that copies of an image are equally near: the last bits of a product depend on where its row is.
        similarity = (_normalised(test_features[rows]) @ train.T).astype(np.float32)
        nearest = _nearest(similarity, max(ks))
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) - 1) / temperature)
        votes = np.full((len(ks), len(similarity), num_classes), -np.inf)
        for of_k, k in zip(votes, ks, strict=True):
            row, label = np.arange(len(similarity))[:, None], train_labels[nearest[:, :k]]
            of_k[row, label] = 0.0
            np.add.at(of_k, (row, label), weights[:, :k])
        yield votes


def sweep_knn(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    num_classes: int,
    *,
    ks: Sequence[int] = K_SWEEP,
    temperature: float = 0.07,
    seed: int = 0,
) -> ProbeResult:
    """Nearest neighbours with the k that does best on a held-out tenth, the smallest of equals.

    Values of k beyond the training images that are left are not tried; where none remains, all images vote.

    Raises:
        ValueError: as `knn_predict` and `sweep_linear`.
    """
    check_labelled(train_features, train_labels, num_classes)
    _check_test(test_features, test_labels, train_features.shape[1])
    wanted = _values(ks, "ks")
    table: list[tuple[float, float]] = []
    if len(wanted) > 1:
        held = _hold_out(train_labels, seed)
        learned, labels = train_features[~held], train_labels[~held]
        wanted = [k for k in wanted if k <= len(learned)] or [len(learned)]
        votes = list(knn_votes(learned, labels, train_features[held], num_classes, wanted, temperature))
        for of_k, k in zip(np.concatenate(votes, axis=1), wanted, strict=True):
            table.append((k, _top(of_k, train_labels[held], 1)))
    chosen = int(_best(table)) if table else wanted[0]
    votes = knn_votes(train_features, train_labels, test_features, num_classes, [chosen], temperature)
    return ProbeResult("k", chosen, tuple(table), *_scored((of[0] for of in votes), test_labels, num_classes))


def _nearest(similarity: Float32[np.ndarray, "m n"], k: int) -> Int64[np.ndarray, "m k"]:
    """The k most similar columns of each row, best first, the lowest index first among equals.

    A stable sort of whole rows would do; picking the few that reach the k-th value first is far less work.
    """
    least = np.partition(similarity, similarity.shape[1] - k, axis=1)[:, -k]
    nearest = np.empty((len(similarity), k), dtype=np.int64)
    for picked, row, limit in zip(nearest, similarity, least, strict=True):
        near = np.flatnonzero(row >= limit)
        picked[:] = near[np.argsort(-row[near], kind="stable")[:k]]
    return nearest


def _normalised(features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Of length 1; a vector of zeros stays one and is similar to nothing."""
    wide = features.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _slices(rows: int, width: int) -> list[slice]:
    """Blocks of rows that together with `width` stay below `_BLOCK` numbers."""
    step = max(_BLOCK // width, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _hold_out(labels: Int[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, " n"]:
    """A tenth, at least one image, spread evenly over the classes; never the only image of a class."""
    held = stratified_folds(labels, _PARTS, seed) == 0
    if not held.any():
        raise ValueError("no class has two images, one to hold out: give a single value instead of several to choose")
    return held


def _values(values: Sequence[V], name: str, reverse: bool = False) -> list[V]:
    if not values:
        raise ValueError(f"{name} is empty: give one value, or several to choose from")
    return sorted(set(values), reverse=reverse)


def _best(table: Sequence[tuple[float, float]]) -> float:
    """The value with the highest accuracy, the first of equals."""
    return max(table, key=lambda row: row[1])[0]


def _check_test(features: np.ndarray, labels: np.ndarray, width: int) -> None:
    """Complaints before anything is fitted, not after."""
    check_features(features, width)
    if not len(features) or labels.shape != (len(features),):
        raise ValueError(f"testing needs one label per row of features, got {features.shape} and {labels.shape}")


def _scored(
    scores: Iterable[Float64[np.ndarray, "block K"]], labels: Int[np.ndarray, " m"], num_classes: int
) -> tuple[float, float | None, Int64[np.ndarray, " m"]]:
    """Top-1, top-5 and the predictions from scores that come in blocks."""
    right, predicted = np.zeros(2), np.empty(len(labels), dtype=np.int64)
    start = 0
    for of_block in scores:
        rows = slice(start, start + len(of_block))
        right += len(of_block) * np.array([_top(of_block, labels[rows], 1), _top(of_block, labels[rows], 5)])
        predicted[rows] = of_block.argmax(axis=1)
        start = rows.stop
    top1, top5 = (float(share) for share in right / len(labels))
    return top1, top5 if num_classes > 5 else None, predicted


def _top(scores: Float64[np.ndarray, "m K"], labels: Int[np.ndarray, " m"], count: int) -> float:
    """Share of the rows in which fewer than `count` classes come before the label's; of equals the lower is first.

    A class of score -inf was not predicted at all: it never counts, whatever its place.
    """
    known = np.flatnonzero((labels >= 0) & (labels < scores.shape[1]))
    rows, of_label = scores[known], labels[known, None]
    own = np.take_along_axis(rows, of_label, axis=1)
    before = (rows > own) | ((rows == own) & (np.arange(scores.shape[1]) < of_label))
    hit = (before.sum(axis=1) < count) & np.isfinite(own[:, 0])
    return float(np.count_nonzero(hit) / len(labels))
