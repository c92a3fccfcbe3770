"""Regularised least squares on frozen features in closed form: the maths of the paper's few-shot evaluation.

    min over W:  |X W - Y|^2 + l2 |W|^2,   Y in {-1, 1}^K,   X = [whitened features, 100]

One eigendecomposition of the smaller Gram matrix, X'X = Q E Q' or XX' = Q E Q', serves every l2:

    W = left diag(1 / (E + l2)) right,   left = Q,   right = Q'X'Y   where n >= d + 1
                                         left = X'Q, right = Q'Y     where n <  d + 1

Source: arXiv 2010.11929, section 4.1 "Metrics"; big_vision, evaluators/fewshot_lsr.py, whose float32 loses digits to
the constant of 100; here everything is float64. NumPy's products proved faster than torch's (X'X of 10,000 x 769 on
two cores: 0.07 s against 0.21 s).

Letters: n images, d features, w = d + 1, K classes, m test images, L strengths, r = min(n, w).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, UInt8

from mpp.downstream.multi_label import mean_average_precision
from mpp.system.process import one_thread

Truth = Int[np.ndarray, " n"] | UInt8[np.ndarray, "n K"]
"""The class of each image, or 1 for each of its classes."""

BIAS_CONSTANT = 100.0  # a large constant feature, so that its weight, the bias, is almost unregularised
STD_OFFSET = 1e-5  # a dimension that is the same in all images divides by this
_ROWS = 4096  # test rows in one matrix product: 30 MB of logits for 1,000 classes


@dataclass(frozen=True)
class Ridge:
    """Least squares, solved up to the choice of l2."""

    mean: Float64[np.ndarray, " d"]
    """Mean of the training features."""
    std: Float64[np.ndarray, " d"]
    """Their biased standard deviation + 1e-5."""
    eigenvalues: Float64[np.ndarray, " r"]
    """Of the smaller Gram matrix, ascending; not below 0."""
    left: Float64[np.ndarray, "w r"]
    right: Float64[np.ndarray, "r K"]

    def logits(self, features: Float[np.ndarray, "m d"], l2: Sequence[float]) -> Iterator[Float64[np.ndarray, "m K"]]:
        """Predicts around -1 (not this class) to 1 (this class), for one l2 after the other, each above 0."""
        check_features(features)
        projected = _whiten(features, self.mean, self.std) @ self.left
        return ((projected * (1.0 / (self.eigenvalues + strength))) @ self.right for strength in l2)

    def accuracy(
        self, features: Float[np.ndarray, "m d"], labels: Truth, l2: Sequence[float]
    ) -> Float64[np.ndarray, " L"]:
        """Gives the share of the test images (1 or more) whose largest logit is their class, for each l2.

        Of sets of labels it gives the mean average precision.
        """
        if labels.ndim == 2:
            return np.array([mean_average_precision(logits, labels) for logits in self.logits(features, l2)])
        right = np.zeros(len(l2))
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            for i, logits in enumerate(self.logits(features[rows], l2)):
                right[i] += np.count_nonzero(logits.argmax(axis=1) == labels[rows])
        return right / len(features)


def fit(features: Float[np.ndarray, "n d"], labels: Truth, num_classes: int) -> Ridge:
    """Solves the least squares of `num_classes` one-against-rest targets for every l2 at once.

    Features are of any float type. A class without images is always predicted as -1. Raises ValueError as
    `check_features`.
    """
    check_features(features)
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64) + STD_OFFSET
    x_nw = _whiten(features, mean, std)
    if x_nw.shape[0] >= x_nw.shape[1]:
        eigenvalues, q = _eigh(x_nw.T @ x_nw)
        left, right = q, q.T @ _times_targets(x_nw, labels, num_classes)
    else:
        eigenvalues, q = _eigh(x_nw @ x_nw.T)
        left, right = x_nw.T @ q, _times_targets(q, labels, num_classes)
    # Constant dimensions weigh exactly 0: a test image that differs there is divided by 1e-5.
    left[:-1][features.min(axis=0) == features.max(axis=0)] = 0.0
    return Ridge(mean, std, eigenvalues.clip(min=0.0), left, right)


def _eigh(gram: Float64[np.ndarray, "r r"]) -> tuple[Float64[np.ndarray, " r"], Float64[np.ndarray, "r r"]]:
    """Gives eigenvalues, ascending, and eigenvectors in columns, on one thread.

    LAPACK's threads wait for each other at every column: beside busy loader workers two of them took 7 s for 769 x 769,
    one 0.1 s. The number of threads can be set in torch, not in NumPy.
    """
    with one_thread():
        eigenvalues, q = torch.linalg.eigh(torch.from_numpy(gram))
    return eigenvalues.numpy(), q.numpy()


def _whiten(
    features: Float[np.ndarray, "n d"], mean: Float64[np.ndarray, " d"], std: Float64[np.ndarray, " d"]
) -> Float64[np.ndarray, "n w"]:
    """Scales to zero mean and unit variance per dimension, and appends the constant feature."""
    x_nw = np.empty((len(features), len(mean) + 1))
    np.subtract(features, mean, out=x_nw[:, :-1])
    x_nw[:, :-1] /= std
    x_nw[:, -1] = BIAS_CONSTANT
    return x_nw


def _times_targets(rows: Float64[np.ndarray, "n k"], labels: Truth, num_classes: int) -> Float64[np.ndarray, "k K"]:
    """Gives rows' Y without forming Y: for +-1 targets twice the sum over the class minus the sum over all."""
    if labels.ndim == 2:
        return rows.T @ (2.0 * labels - 1.0)
    order = np.argsort(labels, kind="stable")
    rows, labels = rows[order], labels[order]
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    starts = np.append(0, ends[:-1])
    sums = np.stack([rows[start:end].sum(axis=0) for start, end in zip(starts, ends, strict=True)])
    return 2.0 * sums.T - rows.sum(axis=0)[:, None]


def check_features(features: Float[np.ndarray, "n d"]) -> None:
    """Raises ValueError unless they are finite."""
    bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
    if bad:
        raise ValueError(f"features of {bad} of {len(features)} images are NaN or infinite: has the encoder diverged?")
