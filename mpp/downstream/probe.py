"""Probes of pooled features: a linear classifier and nearest neighbours, each with its setting chosen on held-out data.

    linear  multinomial logistic regression (logistic.py), its L2 from a grid
    k-NN    votes of the k nearest training images by cosine similarity s, each exp(s / temperature)

Both sweeps hold out a tenth of the training features, by class and by seed, choose on it, and then learn from all of
them. Test features are used once, with the setting that was chosen.

Source: k-NN as in facebookresearch/dino, eval_knn.py (arXiv 2104.14294, section 4.1), after arXiv 1805.01978.

Letters: n images, d features, K classes, m test images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64

from mpp.downstream.fewshot import stratified_folds
from mpp.downstream.groups import strata_of
from mpp.downstream.logistic import LinearProbe, fit_linear
from mpp.downstream.multi_label import mean_average_precision
from mpp.downstream.ridge import Truth, check_features
from mpp.system.progress import Progress

L2_SWEEP = tuple(2.0**power for power in range(-20, 6, 2))

_PARTS = 10  # a tenth is held out
_BLOCK = 2**24  # numbers in one block of rows: 128 MB

Labelled = tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]
"""Features and labels."""
Value = float | tuple[float, ...]
"""Of a setting, or of several."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Accuracy of a probe on the test features, and how its setting was chosen."""

    setting: str
    """What was chosen: "l2", "k" or "lr weight_decay"."""
    chosen: Value
    table: tuple[tuple[Value, float], ...]
    """(value, accuracy on the held-out tenth) in the order tried; empty where there was one value only."""
    top1: float
    """Share of the test images classified correctly, 0 to 1; of several labels an image the mean average precision."""
    top5: float | None
    """Share whose class is among the first five; None up to five classes, where it says nothing."""
    predicted: Int64[np.ndarray, " m"]
    """Class of each test image; of several labels an image the most probable one."""
    multi_label: bool = False
    """Whether the images have several labels each, or none."""

    @property
    def held_out(self) -> float | None:
        """Accuracy of what was chosen on the held-out tenth; None where nothing was held out."""
        return max((accuracy for _, accuracy in self.table), default=None)


def sweep_linear(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    l2s: Sequence[float] = L2_SWEEP,
    val: Labelled | None = None,
    groups: Int64[np.ndarray, " n"] | None = None,
) -> ProbeResult:
    """Fits a linear probe with the L2 that does best on `val`, without it on a held-out tenth of whole `groups`.

    Each fit starts from the next stronger one's.

    Of equals the strongest is taken: the smallest weights that do as well. Test labels from num_classes on are classes
    without training images: always wrong.

    Raises:
        ValueError: features that are not finite; images of one class alone; no class with two images to hold one out.
    """
    _check(train, test)
    strongest_first = sorted(set(l2s), reverse=True)
    table: list[tuple[float, float]] = []
    probe: LinearProbe | None = None
    if len(strongest_first) > 1:
        learned, held_out = (train, val) if val else cut_tenth(train, groups)
        with Progress("fitting probes", len(strongest_first), "fits") as progress:
            for l2 in strongest_first:
                probe = fit_linear(*learned, num_classes, l2, start=probe)
                logits = probe.logits(held_out[0])
                if held_out[1].ndim == 2:
                    table.append((l2, mean_average_precision(logits, held_out[1])))
                else:
                    table.append((l2, count_right(logits, held_out[1], 1) / len(held_out[1])))
                progress.add()
    chosen = max(table, key=itemgetter(1))[0] if table else strongest_first[0]
    probe = fit_linear(*train, num_classes, chosen)
    if test[1].ndim == 2:
        logits = probe.logits(test[0])
        precision = mean_average_precision(logits, test[1])
        return ProbeResult("l2", chosen, tuple(table), precision, None, logits.argmax(axis=1), True)
    rows = _slices(len(test[0]), num_classes)
    return score_blocks("l2", chosen, table, (probe.logits(test[0][part]) for part in rows), test[1], num_classes)


def sweep_knn(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    val: Labelled | None = None,
    groups: Int64[np.ndarray, " n"] | None = None,
) -> ProbeResult:
    """Classifies by nearest neighbours with the k that does best on `val`, without it on a tenth of whole `groups`.

    Of equals the smallest is taken.

    Values of k beyond the training images that are left are not tried; where none remains, all images vote. Raises
    ValueError as `sweep_linear`.
    """
    _check(train, test)
    wanted = sorted(set(ks))
    table: list[tuple[float, float]] = []
    if len(wanted) > 1:
        learned, held_out = (train, val) if val else cut_tenth(train, groups)
        wanted = [k for k in wanted if k <= len(learned[0])] or [len(learned[0])]
        right, start = np.zeros(len(wanted)), 0
        for votes in knn_votes(*learned, held_out[0], num_classes, wanted, temperature):
            labels = held_out[1][start : start + votes.shape[1]]
            right += [count_right(of_k, labels, 1) for of_k in votes]
            start += votes.shape[1]
        table = list(zip(wanted, (right / len(held_out[1])).tolist(), strict=True))
    chosen = int(max(table, key=itemgetter(1))[0]) if table else wanted[0]
    votes = knn_votes(*train, test[0], num_classes, [chosen], temperature)
    return score_blocks("k", chosen, table, (of_k for (of_k,) in votes), test[1], num_classes)


def knn_votes(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> Iterator[Float64[np.ndarray, "ks block K"]]:
    """Sums exp((similarity - 1) / temperature) over the k nearest for each k, block by block of test images.

    Of equally near images the first in `train_features` are taken. The 1 changes no prediction; it keeps the sums
    finite at any temperature. -inf: no neighbour is of the class. Raises ValueError for a k outside 1 to n.
    """
    if min(ks) < 1 or max(ks) > len(train_features):
        raise ValueError(f"k must be 1 to {len(train_features)}, the number of training images, got {list(ks)}")
    train = _normalised(train_features)
    with Progress("finding neighbours", len(test_features)) as progress:
        for rows in _slices(len(test_features), max(len(train_features), num_classes * len(ks))):
            # Rounded, so that copies of an image are equally near: the last bits of a product depend on its row.
            similarity = (_normalised(test_features[rows]) @ train.T).astype(np.float32)
            nearest = _nearest(similarity, max(ks))
            weights = np.exp((np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) - 1) / temperature)
            votes = np.full((len(ks), len(similarity), num_classes), -np.inf)
            for of_k, k in zip(votes, ks, strict=True):
                row, label = np.arange(len(similarity))[:, None], train_labels[nearest[:, :k]]
                of_k[row, label] = 0.0
                np.add.at(of_k, (row, label), weights[:, :k])
            yield votes
            progress.add(len(similarity))


def _nearest(similarity: Float32[np.ndarray, "m n"], k: int) -> Int64[np.ndarray, "m k"]:
    """Finds the k most similar columns of each row, best first, the lowest index first among equals.

    Picking the few that reach the k-th value first is far less work than a stable sort of whole rows.
    """
    least = np.partition(similarity, similarity.shape[1] - k, axis=1)[:, -k]
    nearest = np.empty((len(similarity), k), dtype=np.int64)
    for picked, row, limit in zip(nearest, similarity, least, strict=True):
        near = np.flatnonzero(row >= limit)
        picked[:] = near[np.argsort(-row[near], kind="stable")[:k]]
    return nearest


def _normalised(features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Scales to length 1; a vector of zeros stays one and is similar to nothing."""
    wide = features.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _slices(rows: int, width: int) -> list[slice]:
    """Cuts rows into blocks that together with `width` stay below `_BLOCK` numbers."""
    step = max(_BLOCK // width, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _check(train: Labelled, test: Labelled) -> None:
    """Complains before anything is fitted, not after."""
    check_features(train[0])
    check_features(test[0])
    check_classes(train[1])


def check_classes(labels: Truth) -> None:
    """Raises ValueError for images of one class alone."""
    if labels.ndim == 1 and labels.min() == labels.max():
        raise ValueError(f"a probe needs images of two classes or more; all {len(labels)} are of class {labels[0]}")


def cut_tenth(train: Labelled, groups: np.ndarray | None) -> tuple[Labelled, Labelled]:
    """Cuts off a tenth, at least one image or group, spread evenly over the classes; never the only one of a class."""
    features, labels = train
    stratum, group = strata_of(labels, groups)
    held_out = stratified_folds(stratum, _PARTS)[group] == 0
    if not held_out.any():
        two = "two images" if groups is None else "images of two groups"
        raise ValueError(f"no class has {two}, one to hold out: give a single value instead of several to choose")
    return (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])


def score_blocks(
    setting: str,
    chosen: Value,
    table: Sequence[tuple[Value, float]],
    scores: Iterator[Float64[np.ndarray, "block K"]],
    labels: Int[np.ndarray, " m"],
    num_classes: int,
) -> ProbeResult:
    """Measures the probe by its scores of the test images, which come in blocks."""
    top1, top5, start = 0, 0, 0
    predicted: list[np.ndarray] = []
    for block in scores:
        of_block = labels[start : start + len(block)]
        top1, top5, start = (
            top1 + count_right(block, of_block, 1),
            top5 + count_right(block, of_block, 5),
            start + len(block),
        )
        predicted.append(block.argmax(axis=1))
    shares = top1 / len(labels), top5 / len(labels) if num_classes > 5 else None
    return ProbeResult(setting, chosen, tuple(table), *shares, np.concatenate(predicted))


def count_right(scores: Float64[np.ndarray, "m K"], labels: Int[np.ndarray, " m"], count: int) -> int:
    """Counts the rows in which fewer than `count` classes come before the label's; of equals the lower is first.

    A class of score -inf was not predicted at all: it never counts, whatever its place.
    """
    known = np.flatnonzero((labels >= 0) & (labels < scores.shape[1]))
    rows, of_label = scores[known], labels[known, None]
    own = np.take_along_axis(rows, of_label, axis=1)
    before = (rows > own) | ((rows == own) & (np.arange(scores.shape[1]) < of_label))
    return int(np.count_nonzero((before.sum(axis=1) < count) & np.isfinite(own[:, 0])))
