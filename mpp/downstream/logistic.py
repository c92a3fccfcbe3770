"""Multinomial logistic regression on frozen features: the maths of the linear probe.

    min over W, b:  mean cross-entropy of softmax(Z W + b) + l2 / 2 |W|^2,   Z = standardised features

By L-BFGS in float64 with the gradient written out, over blocks of rows, so that memory does not grow with the images.
It moves V, W = P V, with P such that the second derivative in V is near the identity: features that rise and fall
together make the problem in W so oblong that L-BFGS takes many times the steps. The minimum is the same. scikit-learn's
LogisticRegression has no such P: on 3,000 x 192 features of 20 classes, l2 2^-20, it took 170 s on two cores and ended
short of the minimum after 1,000 steps, where this takes 5 s; and it holds all logits at once, 10 GB for ImageNet.

The products are NumPy's and torch has one thread meanwhile: beside busy cores, as loader workers are, its threads wait
for each other at each of the many small steps.

Letters: n images, d features, K classes, m test images, s classes with training images.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mpp.downstream.ridge import STD_OFFSET, Truth
from mpp.system.process import one_thread

_ROWS = 2**24  # numbers in one block: 128 MB
_IN_MEMORY = 2**28  # standardised numbers in memory: 2 GB; of more, each block is made anew in each pass
_MOST_STEPS = 1000
_TOLERANCE = 1e-6  # it ends where no component of the gradient is larger

Block = tuple[Float64[np.ndarray, "rows d"], Tensor]
"""Features, and classes or sets of them."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression on frozen features."""

    mean: Float64[np.ndarray, " d"]
    """Mean of the training features."""
    std: Float64[np.ndarray, " d"]
    """Their biased standard deviation + 1e-5; infinite where they are all the same, so that nothing comes of it."""
    weights: Float64[np.ndarray, "d K"]
    bias: Float64[np.ndarray, " K"]
    """-inf for a class without training images."""

    def logits(self, features: Float[np.ndarray, "m d"]) -> Float64[np.ndarray, "m K"]:
        """Gives unnormalised log-probabilities; -inf for a class without training images."""
        return (features - self.mean) / self.std @ self.weights + self.bias


def fit_linear(
    features: Float[np.ndarray, "n d"],
    labels: Truth,
    num_classes: int,
    l2: float,
    start: LinearProbe | None = None,
) -> LinearProbe:
    """Fits by full-batch L-BFGS in float64, always the same for the same input.

    Features are finite, labels of two classes or more. The minimum is that of scikit-learn's LogisticRegression(
    C=1 / (n * l2)) on the standardised features: a mean of the losses here, a sum there, so that one `l2` means the
    same for a part of the data as for all of it.

    Args:
        labels: 0 to num_classes - 1; a class without images is never predicted. Or sets of labels: each class is then
            fitted against the rest, as by scikit-learn's OneVsRestClassifier.
        l2: above 0; 2**-20 is next to none. The bias is not penalised.
        start: a solution to start from, such as that of the next stronger `l2`.
    """
    several = labels.ndim == 2
    present = np.flatnonzero(labels.any(axis=0)) if several else np.unique(labels)
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64) + STD_OFFSET
    std[features.min(axis=0) == features.max(axis=0)] = np.inf

    solution = torch.zeros(features.shape[1] + 1, len(present), dtype=torch.float64)
    if start is not None:
        known = np.where(np.isfinite(start.bias), start.bias, 0.0)
        solution.copy_(torch.from_numpy(np.vstack([start.weights, known])[:, present]))
    targets = labels[:, present] if several else np.searchsorted(present, labels)
    blocks = _blocks(features, targets, mean, std, len(present))
    _minimise(solution, blocks, l2)
    weights, bias = np.zeros((features.shape[1], num_classes)), np.full(num_classes, -np.inf)
    weights[:, present], bias[present] = solution[:-1].numpy(), solution[-1].numpy()
    return LinearProbe(mean, std, weights, bias)


def _blocks(
    features: Float[np.ndarray, "n d"],
    labels: Truth,
    mean: Float64[np.ndarray, " d"],
    std: Float64[np.ndarray, " d"],
    num_present: int,
) -> Callable[[], Iterable[Block]]:
    """Returns a function that gives all standardised features, block by block, as often as it is called."""
    rows = max(_ROWS // max(features.shape[1], num_present), 1)

    def make() -> Iterator[Block]:
        for start in range(0, len(features), rows):
            block = slice(start, start + rows)
            yield (features[block] - mean) / std, torch.from_numpy(labels[block])

    if features.size > _IN_MEMORY:
        return make
    made = list(make())
    return lambda: made


def _preconditioner(
    blocks: Callable[[], Iterable[Block]], l2: float, spread: int
) -> tuple[Float64[Tensor, "w w"], Float64[Tensor, "w w"]]:
    """Gives P and its inverse, the root of the second derivative by W and bias where all classes are equally likely.

    There it is Z^T Z / (n s) + l2, of weights that add up to 0 over the classes; the bias stands alone (Z's mean is 0).
    `spread` is s or, of classes each against the rest, whose second derivative is that of p (1 - p), 4.
    """
    product, count = 0.0, 0
    for features, labels in blocks():
        product, count = product + features.T @ features, count + len(labels)
    values, vectors = np.linalg.eigh(product / (count * spread))
    roots = np.sqrt(np.append(values.clip(min=0.0) + l2, 1 / spread))
    basis = np.zeros((len(roots), len(roots)))
    basis[:-1, :-1], basis[-1, -1] = vectors, 1.0
    return torch.from_numpy(basis / roots @ basis.T), torch.from_numpy(basis * roots @ basis.T)


def _minimise(solution: Float64[Tensor, "w s"], blocks: Callable[[], Iterable[Block]], l2: float) -> None:
    """Moves `solution`, whose last row is the bias, to the minimum."""
    gradient = torch.empty_like(solution)
    several = next(iter(blocks()))[1].ndim == 2
    preconditioner, root = _preconditioner(blocks, l2, 4 if several else solution.shape[1])
    moved = root @ solution

    def closure() -> Tensor:
        loss, count = torch.zeros((), dtype=torch.float64), 0
        torch.matmul(preconditioner, moved, out=solution)
        gradient.zero_()
        for features, labels in blocks():
            logits = torch.from_numpy(features @ solution[:-1].numpy()) + solution[-1]
            if several:
                truth = labels.double()
                loss += binary_cross_entropy_with_logits(logits, truth, reduction="sum")
                residual = logits.sigmoid_() - truth
            else:
                log_p = logits.log_softmax(dim=1)
                at = torch.arange(len(labels)), labels
                loss -= log_p[at].sum()
                residual = log_p.exp_()
                residual[at] -= 1.0
            gradient[:-1] += torch.from_numpy(features.T @ residual.numpy())
            gradient[-1] += residual.sum(dim=0)
            count += len(labels)
        gradient.div_(count)
        gradient[:-1] += l2 * solution[:-1]
        moved.grad = preconditioner @ gradient
        return loss / count + l2 / 2 * solution[:-1].square().sum()

    optimiser = torch.optim.LBFGS(
        [moved],
        max_iter=_MOST_STEPS,
        max_eval=2 * _MOST_STEPS,
        # Of V; no component of the gradient by W is then larger than the tolerance.
        tolerance_grad=_TOLERANCE / float(root.abs().sum(dim=1).max()),
        tolerance_change=1e-14,  # the gradient alone shall say when it is enough, but rounding must be able to end it
        line_search_fn="strong_wolfe",
    )
    with one_thread():
        optimiser.step(closure)
    torch.matmul(preconditioner, moved, out=solution)  # the line search may have ended elsewhere than it looked last
