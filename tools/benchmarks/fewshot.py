"""python tools/bench.py fewshot: least squares for many values of L2 against scikit-learn's Ridge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from benchmarks.settings import FewshotBench
from mpp.downstream import ridge
from mpp.errors import RunError, UserError
from mpp.training.timing import hardware, ratios, spread, timed

_AGREE = 1e-6  # logits are around -1 to 1; beyond that the sides have not solved the same problem
_SIDES = ("solve for every L2", "a weight matrix for each L2", "accuracy for each L2")


@dataclass(frozen=True)
class _Problem:
    """Both sides' input. What scikit-learn needs besides, it finds prepared: none of that is in its time."""

    features: Float64[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]
    test: Float64[np.ndarray, "m d"]
    test_labels: Int64[np.ndarray, " m"]
    x_nw: Float64[np.ndarray, "n w"]
    """Whitened, with the constant feature; the bias is its weight, so that Ridge must fit no intercept."""
    y_nk: Float64[np.ndarray, "n K"]
    """Targets of 1 and -1."""
    test_x: Float64[np.ndarray, "m w"]
    l2: tuple[float, ...]


def fewshot(config: FewshotBench) -> int:
    """Measures, prints medians with their spread, and compares the predictions; returns the exit code.

    Three comparisons, each against the same loop of Ridge(alpha=l2).fit in float64:

    1. Solving: one `ridge.fit`, after which predictions with any L2 cost one product.
    2. The same with the weights of all L2 written out.
    3. To the end: the accuracy on the test images for each L2.

    Raises:
        UserError: scikit-learn is not installed.
        RunError: the two sides predict differently, so that their times do not compare.
    """
    reference = _scikit_learn()
    print(f"{hardware()}, {_blas()}")
    print(
        f"{config.classes:,} classes x {config.shots} shots, {config.dim} features, {config.num_l2} values of L2, "
        f"{config.num_test:,} test images; median (least to most) of {config.repeats}\n"
    )
    _measure(_problem(FewshotBench(classes=10, shots=2, dim=16, num_l2=2)), reference)
    problem = _problem(config)
    seconds, predicted = zip(*(_measure(problem, reference) for _ in range(config.repeats)), strict=True)
    print(f"{'':28} {'mpp':>28} {'scikit-learn':>28} {'ratio':>26}")
    for name, of_side in zip(_SIDES, zip(*seconds, strict=True), strict=True):
        ours, theirs = zip(*of_side, strict=True)
        ratio = spread(ratios(theirs, ours), " x")
        print(f"{name:28} {spread(ours, ' s'):>28} {spread(theirs, ' s'):>28} {ratio:>26}")
    print(f"\n{_agreement(problem, predicted[-1])}")
    return 0


def _measure(problem: _Problem, reference: type[Any]) -> tuple[list[tuple[float, float]], list[np.ndarray]]:
    """Runs both sides once: for each of `_SIDES` our seconds and theirs, and the reference's logits for each L2."""
    solved, fit = timed(lambda: ridge.fit(problem.features, problem.labels, problem.y_nk.shape[1]))
    _, written_out = timed(lambda: [solved.left / (solved.eigenvalues + l2) @ solved.right for l2 in problem.l2])
    _, scored = timed(lambda: solved.accuracy(problem.test, problem.test_labels, problem.l2))
    fitting = predicting = 0.0
    predicted: list[np.ndarray] = []
    for l2 in problem.l2:
        model = reference(alpha=l2, fit_intercept=False)
        fitting += timed(lambda model=model: model.fit(problem.x_nw, problem.y_nk))[1]
        logits, seconds = timed(lambda model=model: model.predict(problem.test_x))
        predicting += seconds
        predicting += timed(lambda logits=logits: (logits.argmax(axis=1) == problem.test_labels).mean())[1]
        predicted.append(logits)
    return [(fit, fitting), (fit + written_out, fitting), (fit + scored, fitting + predicting)], predicted


def _agreement(problem: _Problem, predicted: Sequence[np.ndarray]) -> str:
    """Compares the predictions of both sides for every L2. Raises RunError where they differ."""
    solved = ridge.fit(problem.features, problem.labels, problem.y_nk.shape[1])
    largest, others = 0.0, 0
    for ours, theirs in zip(solved.logits(problem.test, problem.l2), predicted, strict=True):
        largest = max(largest, float(np.abs(ours - theirs).max()))
        others += np.count_nonzero(ours.argmax(axis=1) != theirs.argmax(axis=1))
    total = len(problem.test) * len(problem.l2)
    found = f"{others:,} of {total:,} predictions differ, the logits by at most {largest:.1e}"
    if others or largest > _AGREE:
        raise RunError(f"the two sides do not agree, so their times do not compare: {found}")
    return f"Both predict the same: {found}."


def _problem(config: FewshotBench) -> _Problem:
    """Random class centres and noise around them, so that accuracy is neither 0 nor 1."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(config.classes, config.dim))
    labels = np.repeat(np.arange(config.classes), config.shots)
    test_labels = rng.integers(0, config.classes, config.num_test)
    features, test = (centres[of] + 3 * rng.normal(size=(len(of), config.dim)) for of in (labels, test_labels))
    mean, std = features.mean(axis=0), features.std(axis=0) + ridge.STD_OFFSET
    x_nw, test_x = (
        np.hstack([(part - mean) / std, np.full((len(part), 1), ridge.BIAS_CONSTANT)]) for part in (features, test)
    )
    l2 = tuple(2.0 ** (10 + i - 2 * config.num_l2 // 3) for i in range(config.num_l2))  # 30: 2**-10 to 2**19
    return _Problem(features, labels, test, test_labels, x_nw, 2 * np.eye(config.classes)[labels] - 1, test_x, l2)


def _scikit_learn() -> type[Any]:
    try:
        from sklearn.linear_model import Ridge
    except ModuleNotFoundError:
        raise UserError("the reference of this measurement is scikit-learn: pip install scikit-learn") from None
    return Ridge


def _blas() -> str:
    """What scikit-learn computes with."""
    import sklearn
    from threadpoolctl import threadpool_info  # a requirement of scikit-learn

    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    return f"scikit-learn {sklearn.__version__}, {threads} threads for BLAS"
