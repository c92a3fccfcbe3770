"""From a classifier's logits of the test images to what a user reads: accuracies, a table, two CSV files.

    logits (n, K) -> the best five classes of each image -> accuracy, per class and over all; confusions

Letters: n test images, K classes that can be predicted, C of them and those that cannot, k the best that are stored.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from mpp.data.sources.base import Source, count
from mpp.data.sources.names import printable
from mpp.system.files import write_csv

_TOP = 5
_ROWS = 4096  # images at a time: 30 MB of float64 for 1,000 classes
_WIDTH = 32  # of a class name in a terminal


@dataclass(frozen=True, eq=False)
class Scores:
    """The best classes of every test image, and what follows from them."""

    classes: tuple[str, ...]
    """Names of the K classes that can be predicted and, after them, of those that only test images have."""
    num_predicted: int
    """K."""
    labels: Int64[np.ndarray, " n"]
    """0 to C - 1."""
    indices: Int64[np.ndarray, " n"]
    """Of the images in their source."""
    top: Int64[np.ndarray, "n k"]
    """The classes predicted, the most probable first; k = min(5, K)."""
    probability: Float64[np.ndarray, "n k"]
    """Of each of them, 0 to 1."""

    @property
    def top1(self) -> float:
        """Share of the images classified correctly, 0 to 1."""
        return float((self.top[:, 0] == self.labels).mean())

    @property
    def top5(self) -> float | None:
        """Share of the images whose class is among the best five; None where there are no more than five."""
        if self.num_predicted <= _TOP:
            return None
        return float((self.top == self.labels[:, None]).any(axis=1).mean())

    @property
    def balanced(self) -> float:
        """Mean of the accuracies of the classes with test images, each class counting once."""
        images = self.images
        return float((self._right / np.maximum(images, 1))[images > 0].mean())

    @property
    def confusion(self) -> Int64[np.ndarray, "C K"]:
        """Images of each class (row) by predicted class (column)."""
        cells = np.zeros((len(self.classes), self.num_predicted), dtype=np.int64)
        np.add.at(cells, (self.labels, self.top[:, 0]), 1)
        return cells

    @property
    def images(self) -> Int64[np.ndarray, " C"]:
        """Test images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))

    @property
    def _right(self) -> Int64[np.ndarray, " C"]:
        return np.bincount(self.labels[self.top[:, 0] == self.labels], minlength=len(self.classes))

    def table(self, limit: int = 20) -> str:
        """Accuracy by class for a terminal, the worst first; at most `limit` of them."""
        images, right = self.images, self._right
        tested = np.flatnonzero(images)
        order = tested[np.lexsort((-images[tested], right[tested] / images[tested]))]
        confused = self._confused()
        rows = [("class", "images", "accuracy", "most often taken for")]
        for c in order[:limit].tolist():
            other, times = confused[c]
            taken = f"{short_name(self.classes[other])} ({times:,})" if times else ""
            rows.append((short_name(self.classes[c]), f"{images[c]:,}", f"{right[c] / images[c]:.1%}", taken))
        return class_table(rows, "<>><", len(order), len(images) - len(tested))

    def write(self, folder: Path, source: Source, train_labels: Int[np.ndarray, " m"]) -> None:
        """Writes classes.csv, a row per class, and predictions.csv, a row per tested image of `source`. Raises OSError.

        `train_labels` are those of the training images, -1 for images that are none.
        """
        write_csv(folder / "classes.csv", self._class_rows(train_labels))
        write_csv(folder / "predictions.csv", self._image_rows(source))

    def _class_rows(self, train_labels: np.ndarray) -> Iterable[Sequence[Any]]:
        yield "class", "train_images", "test_images", "correct", "accuracy", "precision", "most_confused_with"
        images, right, confused = self.images, self._right, self._confused()
        predicted = np.bincount(self.top[:, 0], minlength=len(self.classes))
        trained = np.bincount(train_labels[train_labels >= 0], minlength=len(self.classes))
        for c, name in enumerate(self.classes):
            other, times = confused[c]
            shares = (f"{right[c] / whole[c]:.6f}" if whole[c] else "" for whole in (images, predicted))
            yield name, trained[c], images[c], right[c], *shares, self.classes[other] if times else ""

    def _image_rows(self, source: Source) -> Iterable[Sequence[Any]]:
        yield "index", "path", "label", "predicted", "correct", "probability", "top5"
        for row, index in enumerate(self.indices.tolist()):
            label, top = self.classes[self.labels[row]], [self.classes[c] for c in self.top[row].tolist()]
            right = int(self.top[row, 0] == self.labels[row])
            # Names may hold any separator, so the five of them are a JSON list.
            five = json.dumps(top, ensure_ascii=False)
            yield index, source.location(index), label, top[0], right, f"{self.probability[row, 0]:.6f}", five

    def _confused(self) -> list[tuple[int, int]]:
        """Gives, for each class, the wrong class it is most often taken for, and how often; 0 times where never."""
        wrong = self.confusion
        np.fill_diagonal(wrong, 0)
        return list(zip(wrong.argmax(axis=1).tolist(), wrong.max(axis=1).tolist(), strict=True))


def score(
    logits: Float[np.ndarray, "n K"],
    labels: Int[np.ndarray, " n"],
    indices: Int[np.ndarray, " n"],
    classes: Sequence[str],
    foreign: Sequence[str] = (),
) -> Scores:
    """Ranks the classes of every test image; `labels` from K on are of `foreign`, classes that only test images have.

    `indices` are those of the images in their source.
    """
    names = (*classes, *foreign)
    parts = [_best(logits[start : start + _ROWS]) for start in range(0, len(logits), _ROWS)]
    top, probability = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Scores(names, len(classes), labels.astype(np.int64), indices.astype(np.int64), top, probability)


def _best(logits: Float[np.ndarray, "n K"]) -> tuple[Int64[np.ndarray, "n k"], Float64[np.ndarray, "n k"]]:
    """Gives the best classes and their probabilities; of equals the lower number first, as argmax has it."""
    left = logits.astype(np.float64)
    likelihood = np.exp(left - left.max(axis=1, keepdims=True))
    top = np.empty((len(left), min(_TOP, left.shape[1])), dtype=np.int64)
    for column in top.T:  # five passes are faster than a sort of 1,000 classes
        column[:] = left.argmax(axis=1)
        left[np.arange(len(left)), column] = -np.inf
    return top, np.take_along_axis(likelihood, top, axis=1) / likelihood.sum(axis=1, keepdims=True)


def class_table(rows: Sequence[Sequence[str]], align: str, tested: int, untested: int) -> str:
    """Aligns rows of classes, the head first, for a terminal, and says how many classes they leave out.

    `align` has < or > for each column; `tested` counts the classes with test images, `untested` those without.
    """
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, align, wide, strict=True)] for row in rows]
    lines = ["  ".join(row).rstrip() for row in cells]
    if tested >= len(rows):
        lines.append(f"... and {tested - len(rows) + 1:,} more in classes.csv")
    if untested:
        lines.append(f"{count(untested, 'class')} without test images")
    return "\n".join(lines)


def short_name(name: str) -> str:
    """Shortens a class name to one line of bounded width, whatever it holds."""
    line = printable(" ".join(name.split()))
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."
