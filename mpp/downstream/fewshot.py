"""Few-shot linear regression on frozen features, once at the end or repeatedly while pretraining runs.

    labelled images (labelled.py) -> K shots per class, drawn per seed, and test images -> their features
    -> [L2 by cross-validation on the shots] -> least squares (ridge.py) -> accuracy on the test features

What is drawn depends on labels and seeds alone, so only images that are needed are ever read.

Source: arXiv 2010.11929, section 4.1 "Metrics" and table 5; big_vision, evaluators/fewshot_lsr.py, whose draws these
are, index for index.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64, UInt8

from mpp.data.sources.base import Source, SourceError, count
from mpp.downstream import ridge
from mpp.downstream.estimates import Estimate, estimate
from mpp.downstream.groups import shared_groups, strata_of
from mpp.downstream.labelled import Labelled, by_class
from mpp.downstream.multi_label import mean_average_precision
from mpp.system.progress import Progress
from mpp.training.duration import parse_duration

Extract = Callable[[Source, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(source, indices (n,)) -> features (m, d), their indices in the source (m,): m < n where images do not decode."""

DEFAULT_L2 = 2.0**10  # the paper's
L2_GRID = tuple(2.0**power for power in range(-10, 20))
"""What cross-validation chooses from: 30 values, far to both sides of the paper's."""

_TEST_SEED = 1729  # which images are tested never changes, so that figures of different runs compare
_MAX_EVALUATIONS = 20
_LEAST_TRAINING = 50  # images trained on for each evaluated one: 2% of the run
_FOLDS = 5

L2 = float | Literal["cv"]
"""One strength for all draws, or "cv": each draw's own, by cross-validation on its shots."""


@dataclass(frozen=True)
class Readout:
    """Which features of which encoder a result is of."""

    init: str
    layer: int = -1
    """Counted from the end: -1 is the last."""
    pool: str = "mean"
    """mean, token or mean+token."""
    depth: int = field(default=0, compare=False)
    """Number of layers of the encoder; readouts are equal whatever it is."""

    @property
    def name(self) -> str:
        """Such as "runs/first (mean)" or, of another layer than the last, "runs/first (mean, layer -2)"."""
        return f"{self.init} ({self.way})"

    @property
    def way(self) -> str:
        """Pooling and layer, such as "mean" or "mean, layer -2"."""
        return self.pool if self.layer == -1 else f"{self.pool}, layer {self.layer}"


def draw_shots(
    labels: Int[np.ndarray, " n"], shots: int, seed: int, num_classes: int, sets: UInt8[np.ndarray, "s K"] | None = None
) -> Int64[np.ndarray, " picked"]:
    """Draws indices of at most `shots` images per class, class by class, as the original evaluator does.

    Fewer shots with the same seed are a subset. Labels outside 0 to num_classes - 1 are never picked. Of `sets` that
    the labels number it draws so many images with each class, and of those with none; an image may serve several.
    """
    rng = np.random.default_rng(seed)
    if sets is not None:
        with_none, used = np.column_stack([sets, ~sets.any(axis=1)]), np.flatnonzero(labels >= 0)
        members = (used[with_none[labels[used], number] > 0] for number in range(with_none.shape[1]))
        return np.unique(np.concatenate([rng.permutation(images)[:shots] for images in members]))
    return np.concatenate([rng.permutation(members)[:shots] for members in by_class(labels, num_classes)])


def stratified_folds(labels: Int[np.ndarray, " n"], folds: int) -> Int64[np.ndarray, " n"]:
    """Gives the fold of each image, 0 to folds - 1; -1 for one that is alone in its class: it is for learning only.

    Folds differ by at most one image, in each class as in total. With two folds or more none has all images of a class.
    Labels are 0 or more.
    """
    rng = np.random.default_rng(0)
    groups = [rng.permutation(members) for members in by_class(labels, int(labels.max(initial=-1)) + 1)]
    # Dealt like cards, and the next class goes on where the last one ended: small classes do not all fill fold 0.
    dealt = np.concatenate([members for members in groups if len(members) > 1] or [np.empty(0, dtype=np.int64)])
    fold = np.full(len(labels), -1)
    fold[dealt] = np.arange(len(dealt)) % folds
    return fold


def choose_l2(
    features: Float[np.ndarray, "n d"],
    labels: ridge.Truth,
    num_classes: int,
    l2s: Sequence[float] = L2_GRID,
    groups: Int64[np.ndarray, " n"] | None = None,
) -> tuple[float, float] | None:
    """Chooses the L2 with the highest accuracy in stratified cross-validation on the shots; gives both.

    Five folds, or as many as the smallest class with several images has; an image alone in its class is learned from
    in all. Ties, common with few images, go to the strongest value. None where no class has two images. Of `groups`
    each counts as one image does, and lies in one fold.
    """
    strongest_first = sorted(l2s, reverse=True)
    stratum, group = strata_of(labels, groups)
    counts = np.bincount(stratum)
    if not (counts > 1).any():
        return None
    folds = min(_FOLDS, int(counts[counts > 1].min()))
    fold = stratified_folds(stratum, folds)[group]
    if labels.ndim == 2:
        return _choose_l2_by_precision(features, labels, fold, strongest_first)
    right = np.zeros(len(l2s), dtype=np.int64)  # whole images, so that a tie is a tie and not a matter of rounding
    for number in range(folds):
        held_out = fold == number
        solved = ridge.fit(features[~held_out], labels[~held_out], num_classes)
        accuracy = solved.accuracy(features[held_out], labels[held_out], strongest_first)
        right += np.rint(accuracy * np.count_nonzero(held_out)).astype(np.int64)
    best = int(right.argmax())
    return float(strongest_first[best]), float(right[best] / np.count_nonzero(fold >= 0))


def _choose_l2_by_precision(
    features: np.ndarray, truth: UInt8[np.ndarray, "n K"], fold: np.ndarray, l2s: Sequence[float]
) -> tuple[float, float] | None:
    """As `choose_l2` of several labels an image: by mean average precision over all folds' predictions together."""
    logits, tested = [np.zeros(truth.shape) for _ in l2s], fold >= 0
    for number in range(int(fold.max()) + 1):
        solved = ridge.fit(features[fold != number], truth[fold != number], truth.shape[1])
        for of_l2, found in zip(logits, solved.logits(features[fold == number], l2s), strict=True):
            of_l2[fold == number] = found
    precision = [mean_average_precision(of_l2[tested], truth[tested]) for of_l2 in logits]
    best = int(np.argmax(precision))
    return float(l2s[best]), precision[best]


@dataclass(frozen=True, eq=False)
class FewshotResult:
    """Accuracy per seed and number of shots, and what was missing."""

    shots: tuple[int, ...]
    accuracy: Float64[np.ndarray, "seeds shots"]
    """Share of the test images classified correctly, 0 to 1; of several labels an image the mean average precision."""
    short_classes: Mapping[int, int] = field(default_factory=dict)
    """Shots -> number of classes with fewer images than that; 0 for most."""
    dropped: int = 0
    """Images, for training or test, that could not be decoded."""
    l2: Float64[np.ndarray, "seeds shots"] | None = None
    """Strength of the regularisation; None where it is unknown."""
    chosen: Bool[np.ndarray, "seeds shots"] | None = None
    """Where cross-validation chose `l2`; False: one image per class left nothing to choose by, and the default was
    taken. None: one strength was given for all."""
    held_out: Float64[np.ndarray, "seeds shots"] | None = None
    """Accuracy in cross-validation on the shots, with `l2`, to choose a layer and pooling by. NaN where one image per
    class leaves nothing to hold out; None without such a choice."""
    multi_label: bool = False
    """Whether `accuracy` is the mean average precision of several labels an image."""

    @property
    def estimates(self) -> dict[int, Estimate]:
        """By number of shots, over the draws: neither other test images nor another pretraining are in them."""
        over = f"{count(len(self.accuracy), 'draw')} of the shots"
        return {k: estimate(column.tolist(), over) for k, column in zip(self.shots, self.accuracy.T, strict=True)}

    def figures(self) -> dict[str, Any]:
        """What to log: {"fewshot/5shot": mean, "fewshot/5shot_std": spread, "fewshot/5shot_draws": [...], ...}.

        Of one draw neither its spread nor its single figure.
        """
        figures: dict[str, Any] = {}
        for column, (shots, estimated) in enumerate(self.estimates.items()):
            figures[f"fewshot/{shots}shot"] = estimated.mean
            if estimated.spread is not None:
                figures[f"fewshot/{shots}shot_std"] = estimated.spread
                figures[f"fewshot/{shots}shot_draws"] = self.accuracy[:, column].tolist()
        return figures

    def table(self) -> str:
        """Gives a line per number of shots, in percent, and what was missing; L2 has a column where it was chosen."""
        l2 = [self._l2_text(column) for column in range(len(self.shots))]
        width = max(map(len, l2))
        head = f"  {'L2':{width}}" if width else ""
        over = f"over {count(len(self.accuracy), 'draw')} of the shots"
        name = "mAP" if self.multi_label else "accuracy"
        lines = [f"shots  {name:>8}    std  95% interval{head}   ({over})"]
        for (shots, estimated), strength in zip(self.estimates.items(), l2, strict=True):
            spread = "-" if estimated.spread is None else f"{estimated.spread:.1%}"
            interval = "-" if estimated.half is None else f"± {estimated.half:.1%}"
            line = f"{shots:5d}  {estimated.mean:8.1%} {spread:>6}  {interval:>12}"
            line += f"  {strength:{width}}" if width else ""
            short = self.short_classes.get(shots, 0)
            if short:
                line += f"   {short} class{' has' if short == 1 else 'es have'} fewer images"
            lines.append(line.rstrip())
        if self.chosen is not None and not self.chosen.all():
            lines.append("* the default: with one image per class there is nothing to choose L2 by")
        if self.dropped:
            lines.append(f"{count(self.dropped, 'image')} could not be decoded")
        return "\n".join(lines)

    def _l2_text(self, column: int) -> str:
        """The L2 of one number of shots, such as "1024", "0.125 to 64" or, for a default, "1024*"; "" if not chosen."""
        if self.l2 is None or self.chosen is None:
            return ""
        low, high = (f"{value:.6g}" for value in (self.l2[:, column].min(), self.l2[:, column].max()))
        star = "" if self.chosen[:, column].all() else "*"
        return (low if low == high else f"{low} to {high}") + star


def score(
    shots: Sequence[int],
    draws: Sequence[Sequence[Int[np.ndarray, " picked"]]],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    l2: L2,
    choosing: bool = False,
    groups: Int64[np.ndarray, " n"] | None = None,
) -> FewshotResult:
    """Measures the accuracy of each draw, per seed and number of shots; a draw is rows of `train`.

    Args:
        train, test: features (n, d) and labels (n,); those of the test are used only once L2 is settled.
        l2: the strength, or "cv" to choose it from `L2_GRID` for each draw by cross-validation on its shots.
        choosing: whether the result is one to choose from, and therefore has its `held_out`.
        groups: of the training images; cross-validation parts none.

    Raises:
        ValueError: features that are not finite.
    """
    features, labels = train
    accuracy = np.empty((len(draws), len(shots)))
    strength = np.full(accuracy.shape, DEFAULT_L2 if l2 == "cv" else float(l2))
    chosen = np.zeros(accuracy.shape, dtype=bool)
    held_out = np.full(accuracy.shape, np.nan)
    with Progress("few-shot regressions", accuracy.size, "fits") as progress:
        for (i, j), _ in np.ndenumerate(accuracy):
            drawn = features[draws[i][j]], labels[draws[i][j]]
            if l2 == "cv" or choosing:
                of_drawn = None if groups is None else groups[draws[i][j]]
                best = choose_l2(*drawn, num_classes, L2_GRID if l2 == "cv" else [l2], of_drawn)
                if best is not None:
                    (strength[i, j], held_out[i, j]), chosen[i, j] = best, True
            accuracy[i, j] = ridge.fit(*drawn, num_classes).accuracy(*test, [float(strength[i, j])])[0]
            progress.add()
    by_cv, to_choose_by = chosen if l2 == "cv" else None, held_out if choosing else None
    return FewshotResult(tuple(shots), accuracy, {}, 0, strength, by_cv, to_choose_by, labels.ndim == 2)


def choose_readout(results: Mapping[Readout, FewshotResult]) -> tuple[FewshotResult, list[list[Readout]]]:
    """Chooses, for one encoder, the layer and pooling of each draw by cross-validation on its shots, never by the test.

    Of equals, and where one image per class leaves nothing to choose by, the last layer is taken, and there the first
    pooling. Gives the result, and the readout of each of its figures, by seed and number of shots.
    """
    order = sorted(results, key=lambda readout: -readout.layer)  # stable: poolings stay in their order
    held_out, accuracy = (np.stack([getattr(results[of], part) for of in order]) for part in ("held_out", "accuracy"))
    best = np.nan_to_num(held_out, nan=-1.0).argmax(axis=0)
    of_best, of_held = (np.take_along_axis(values, best[None], axis=0)[0] for values in (accuracy, held_out))
    result = replace(results[order[0]], accuracy=of_best, held_out=of_held, l2=None, chosen=None)
    return result, [[order[at] for at in row] for row in best.tolist()]


class Fewshot:
    """A few-shot evaluation that is ready to run: which of the labelled images it needs.

    At most `max_test` test images are drawn, uniformly and by a fixed seed, so that they are the same in every run;
    not by class, so that the accuracy estimates that of the whole test split. Test images of a group that a shot was
    drawn from are left out: `beside_shots` of them.

    Attributes:
        draws: per seed and number of shots, indices into the training source.
        train_indices, test_indices: all images that are read, ascending; `num_images` of them.
    """

    def __init__(
        self,
        labelled: Labelled,
        shots: tuple[int, ...],
        seeds: tuple[int, ...],
        l2: L2 = DEFAULT_L2,
        max_test: int | None = None,
    ) -> None:
        self.labelled, self.shots = labelled, shots
        self.l2: L2 = l2
        tested = np.random.default_rng(_TEST_SEED).permutation(labelled.test_indices)
        labels, classes = labelled.train_labels, len(labelled.classes)
        self.draws = [[draw_shots(labels, k, seed, classes, labelled.sets) for k in shots] for seed in seeds]
        self.train_indices = np.unique(np.concatenate([picked for of_seed in self.draws for picked in of_seed]))
        apart = np.ones(len(tested), dtype=bool)
        if labelled.train_groups is not None and labelled.test_groups is not None:
            _, beside = shared_groups(labelled.train_groups[self.train_indices], labelled.test_groups)
            apart = ~beside[tested]
        self.beside_shots = int(np.count_nonzero(~apart))
        if not apart.any():
            what = f"the groups of all {len(tested):,} test images of {labelled.test.name} have images among the shots"
            raise SourceError(f"{what}: take fewer shots or seeds, or test images of other groups")
        self.test_indices = np.sort(tested[apart][:max_test])
        self.num_images = len(self.train_indices) + len(self.test_indices)

    def run(self, extract: Extract, choosing: bool = False) -> FewshotResult:
        """Extracts the features of the images needed and evaluates them; `choosing` as in `score`.

        An image that `extract` leaves out is missing from the shots it was drawn for, and from the test images.

        Raises:
            ValueError: no image left to learn from or to test, features that are NaN or infinite.
        """
        images = self.labelled
        train_features, train_decoded = extract(images.train, self.train_indices)
        test_features, test_decoded = extract(images.test, self.test_indices)
        row = np.full(len(images.train_labels), -1)
        row[train_decoded] = np.arange(len(train_decoded))
        draws = [[row[picked][row[picked] >= 0] for picked in of_seed] for of_seed in self.draws]
        if not len(test_decoded) or any(not len(rows) for of_seed in draws for rows in of_seed):
            raise ValueError("few-shot evaluation has no image left: none of those needed could be decoded")
        train = train_features, images.truth(images.train_labels[train_decoded])
        test = test_features, images.truth(images.test_labels[test_decoded])
        groups = None if images.train_groups is None else images.train_groups[train_decoded]
        result = score(self.shots, draws, train, test, len(images.classes), self.l2, choosing, groups)
        short = short_classes(images, self.shots)
        lost = self.num_images - len(train_decoded) - len(test_decoded)
        return replace(result, short_classes=short, dropped=lost)


def short_classes(labelled: Labelled, shots: Sequence[int]) -> dict[int, int]:
    """Shots -> number of classes that have fewer training images than that; those of the test alone do not count."""
    sizes = labelled.sizes(labelled.train_labels)[: len(labelled.classes)]
    return {k: int(np.count_nonzero(sizes < k)) for k in shots}


def evaluations(every: str, total_steps: int, batch_size: int, num_images: int, epoch_images: int) -> int:
    """Gives the steps between evaluations; 0 for none but those at step 0 and at the end, which always take place.

    `every` is a duration or auto: as many evaluations, the first and the last included,
    as cost less than 2% of the run, at most 20, in even steps. Each of `num_images` images counts as one trained on:
    reading it costs as much, its forward pass a third (on a CPU, with the least squares: 0.4).
    """
    if every != "auto":
        return parse_duration(every, "fewshot.every").steps(batch_size, epoch_images, total_steps)
    # The most that cost strictly less, in whole numbers: 0.02 * 55 * 750 is more than 825.
    affordable = (total_steps * batch_size - 1) // (_LEAST_TRAINING * max(num_images, 1))
    count = min(affordable, _MAX_EVALUATIONS)
    if count < 3:
        return 0
    period = math.ceil(total_steps / (count - 1))  # step 0, the multiples before the end, the end
    return period if period < total_steps else 0
