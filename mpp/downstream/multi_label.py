"""Several labels an image, or none: average precision, and what a user reads of a classifier that gives them.

    logits (n, K) -> a probability for each class of its own -> average precision by class, their mean; two CSV files

Letters: n images, K classes.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, UInt8

from mpp.data.sources.base import LabelSets, Source, SourceError
from mpp.downstream.estimates import estimate
from mpp.downstream.scoring import class_table, short_name
from mpp.system.files import write_csv

_SURE = 0.5  # a class of a higher probability counts as given


def average_precisions(scores: Float[np.ndarray, "n K"], truth: UInt8[np.ndarray, "n K"]) -> Float64[np.ndarray, " K"]:
    """Gives the average precision of each class, NaN for one that no image has; as scikit-learn's function."""
    return np.array([_average_precision(*of_class) for of_class in zip(scores.T, truth.T, strict=True)])


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        return float("nan")
    order, ends = _thresholds(scores)
    right = np.cumsum(truth[order], dtype=np.int64)[ends]
    return float((np.diff(right, prepend=0) / right[-1] * right / (ends + 1)).sum())


def _thresholds(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of falling scores, and in it the last place of each score: equal ones are one threshold."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    return order, np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(order) - 1)


def precision_by_image(scores: Float[np.ndarray, "n K"], truth: UInt8[np.ndarray, "n K"]) -> Float64[np.ndarray, " n"]:
    """Gives the jackknife's pseudo-values of the mean average precision: n m - (n - 1) m_i, with m_i that of all
    images but i.

    They are to the mean average precision what right and wrong are to accuracy: their mean estimates it, their spread
    is that of the images. The mean is a little lower than m, which few images of a class flatter.

    Source: M. H. Quenouille, "Notes on bias in estimation", 1956; J. W. Tukey, "Bias and confidence in not quite large
    samples", 1958.
    """
    n = len(truth)
    found = [
        n * _average_precision(*of_class) - (n - 1) * _leaving_each_out(*of_class)
        for of_class in zip(scores.T, truth.T, strict=True)
        if of_class[1].any()
    ]
    return np.mean(found, axis=0) if found else np.zeros(n)


def _leaving_each_out(scores: np.ndarray, truth: np.ndarray) -> Float64[np.ndarray, " n"]:
    """Gives the average precision of a class without each of the images in turn, in a single pass."""
    order, ends = _thresholds(scores)
    has, group = truth[order].astype(np.float64), np.searchsorted(ends, np.arange(len(order)))
    starts = np.append(0, ends[:-1] + 1)[group]
    images, right = ends[group] + 1.0, np.cumsum(has)[ends][group]  # from the highest score down to this one
    others = np.maximum(images - 1, 1)

    def lower(values: np.ndarray) -> np.ndarray:
        """Their sums over the images whose score is not above each one's."""
        return np.cumsum(values[::-1])[::-1][starts]

    precision, total = has * right / images, right[-1]
    above = precision.sum() - lower(precision)  # these do not notice that the image is gone
    without = (above + lower(has * right / others)) / total
    if total > 1:  # a single image of a class says nothing of others
        own = (right - 1) / others
        with_class = (above + lower(has * own) - own) / (total - 1)
    else:
        with_class = precision.sum()
    left = np.empty(len(order))
    left[order] = np.where(has > 0, with_class, without)
    return left


def mean_average_precision(scores: Float[np.ndarray, "n K"], truth: UInt8[np.ndarray, "n K"]) -> float:
    """Gives the mean over the classes that some image has; 0 where none has any."""
    return _mean(average_precisions(scores, truth))


def _mean(found: Float64[np.ndarray, " K"]) -> float:
    return float(found[~np.isnan(found)].mean()) if not np.isnan(found).all() else 0.0


@dataclass(frozen=True, eq=False)
class MultiLabelScores:
    """The probability of each class in every test image, and what follows from them."""

    classes: tuple[str, ...]
    indices: Int64[np.ndarray, " n"]
    """Of the images in their source."""
    truth: UInt8[np.ndarray, "n K"]
    """1 where the image has the class."""
    probability: Float64[np.ndarray, "n K"]

    @cached_property
    def average_precision(self) -> Float64[np.ndarray, " K"]:
        """By class, 0 to 1; NaN without test images."""
        return average_precisions(self.probability, self.truth)

    @property
    def mean_ap(self) -> float:
        """Mean of the average precisions of the classes with test images."""
        return _mean(self.average_precision)

    @property
    def chance(self) -> float:
        """`mean_ap` of giving every image each class's share of the images."""
        return float(self.truth.mean(axis=0)[self.truth.any(axis=0)].mean()) if self.truth.any() else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `mean_ap` for the test images as a sample of others: the jackknife's, widened to hold it.

        With some dozens of images of a class it holds the truth in about 90 % of the cases.
        """
        found = estimate(precision_by_image(self.probability, self.truth).tolist(), "test images")
        half = found.half or 0.0
        return max(min(found.mean - half, self.mean_ap), 0.0), min(max(found.mean + half, self.mean_ap), 1.0)

    @property
    def given(self) -> Bool[np.ndarray, "n K"]:
        """Classes whose probability is above one half."""
        return self.probability > _SURE

    @property
    def exact(self) -> float:
        """Share of the images of which all classes are given, and no other."""
        return float((self.given == self.truth).all(axis=1).mean())

    @property
    def recall(self) -> float:
        """Mean over the classes of the share of their images to which they are given."""
        images = self.truth.sum(axis=0)
        found = (self.given & (self.truth > 0)).sum(axis=0)
        return float((found / np.maximum(images, 1))[images > 0].mean()) if images.any() else 0.0

    def table(self, limit: int = 20) -> str:
        """Average precision by class for a terminal, the worst first; at most `limit` of them."""
        images, precision = self.truth.sum(axis=0), self.average_precision
        tested = np.flatnonzero(images)
        order = tested[np.argsort(precision[tested], kind="stable")]
        rows = [("class", "images", "AP", "chance")]
        for c in order[:limit].tolist():
            share = images[c] / len(self.truth)
            rows.append((short_name(self.classes[c]), f"{images[c]:,}", f"{precision[c]:.1%}", f"{share:.1%}"))
        return class_table(rows, "<>>>", len(order), len(images) - len(tested))

    def write(self, folder: Path, source: Source, trained: UInt8[np.ndarray, "m K"]) -> None:
        """Writes classes.csv, a row per class, and predictions.csv, a row per tested image of `source`. Raises OSError.

        `trained` are the classes of the training images.
        """
        write_csv(folder / "classes.csv", self._class_rows(trained))
        write_csv(folder / "predictions.csv", self._image_rows(source))

    def _class_rows(self, trained: np.ndarray) -> Iterable[Sequence[Any]]:
        yield "class", "train_images", "test_images", "average_precision", "chance", "precision", "recall"
        given, right = self.given.sum(axis=0), (self.given & (self.truth > 0)).sum(axis=0)
        images = self.truth.sum(axis=0)
        for c, name in enumerate(self.classes):
            shares = (f"{right[c] / whole[c]:.6f}" if whole[c] else "" for whole in (given, images))
            precision = f"{self.average_precision[c]:.6f}" if images[c] else ""
            chance = f"{images[c] / len(self.truth):.6f}" if images[c] else ""
            yield name, int(trained[:, c].sum()), images[c], precision, chance, *shares

    def _image_rows(self, source: Source) -> Iterable[Sequence[Any]]:
        yield "index", "path", *self.classes, *(f"probability of {name}" for name in self.classes)
        for index, truth, probability in zip(self.indices.tolist(), self.truth, self.probability, strict=True):
            yield index, source.location(index), *truth.tolist(), *(f"{p:.6f}" for p in probability)


def read_precision(path: Path) -> dict[str, float]:
    """Reads predictions.csv: `precision_by_image` by the image's index; none where it is missing or no such file."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            _, *rows = ((row[0], row[2:]) for row in csv.reader(file))  # by place: a class may be called "index"
        cells = np.array([cells for _, cells in rows], dtype=np.float64)
        truth, probability = np.hsplit(cells, 2)
    except (OSError, csv.Error, ValueError, IndexError):
        return {}
    values = precision_by_image(probability, truth.astype(np.uint8)).tolist()
    return dict(zip((index for index, _ in rows), values, strict=True))


def join_sets(
    sets: UInt8[np.ndarray, "s K"], classes: tuple[str, ...], source: Source
) -> tuple[Int64[np.ndarray, " m"], UInt8[np.ndarray, "t K"]]:
    """Numbers the sets of another source, of these classes alone, after `sets`; one label an image is a set of one.

    Raises SourceError where it has no labels.
    """
    found, labels = source.label_sets(), source.labels()
    if found is None:
        if labels is None:
            raise SourceError(
                f"{source.name} has no labels ({source.describe()}); give it the columns of the other images"
            )
        found = LabelSets(labels, np.eye(len(source.classes or ()), dtype=np.uint8))
    column = {name: number for number, name in enumerate(source.classes or ())}
    lacking = np.zeros(len(found.table), dtype=np.uint8)
    table = np.column_stack([found.table[:, column[name]] if name in column else lacking for name in classes])
    return np.where(found.number >= 0, found.number + len(sets), -1), np.vstack([sets, table])


def score(
    logits: Float[np.ndarray, "n K"], truth: UInt8[np.ndarray, "n K"], indices: np.ndarray, classes: Sequence[str]
) -> MultiLabelScores:
    """Scores the logits of the test images, whose `indices` are those in their source."""
    probability = 1 / (1 + np.exp(-logits.astype(np.float64).clip(-500, 500)))
    return MultiLabelScores(tuple(classes), indices.astype(np.int64), truth, probability)
