"""Few-shot linear regression on frozen features, once at the end or repeatedly while pretraining runs.

    labelled images (labelled.py) -> which are drawn or tested -> their features -> accuracy (shots.py)

What is drawn depends on labels and seeds alone, so only images that are needed are ever read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from mpp.data.sources.base import Source
from mpp.downstream.labelled import Labelled
from mpp.downstream.shots import DEFAULT_L2, L2, FewshotResult, draw_shots, score
from mpp.training.duration import parse_duration

Extract = Callable[[Source, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(source, indices (n,)) -> features (m, d), their indices in the source (m,): m < n where images do not decode."""

_TEST_SEED = 1729  # which images are tested never changes, so that figures of different runs compare
_MAX_EVALUATIONS = 20
_LEAST_TRAINING = 50  # images trained on for each evaluated one: 2% of the run


@dataclass(frozen=True, eq=False)
class Fewshot:
    """A few-shot evaluation that is ready to run: which images it needs, and their labels."""

    labelled: Labelled
    draws: tuple[tuple[np.ndarray, ...], ...]
    """Per seed and number of shots: indices into the training source."""
    test_indices: Int64[np.ndarray, " tested"]
    """Ascending."""
    shots: tuple[int, ...]
    l2: L2

    @classmethod
    def of(
        cls,
        labelled: Labelled,
        shots: tuple[int, ...],
        seeds: tuple[int, ...],
        l2: L2 = DEFAULT_L2,
        max_test: int | None = None,
    ) -> "Fewshot":
        """Decides which of the labelled images are needed.

        At most `max_test` test images are drawn, uniformly and by a fixed seed, so that they are the same in every run;
        not by class, so that the accuracy estimates that of the whole test split.
        """
        tested = np.random.default_rng(_TEST_SEED).permutation(labelled.test_indices)[:max_test]
        classes = len(labelled.classes)
        draws = tuple(tuple(draw_shots(labelled.train_labels, k, seed, classes) for k in shots) for seed in seeds)
        return cls(labelled, draws, np.sort(tested), shots, l2)

    @property
    def train_indices(self) -> Int64[np.ndarray, " needed"]:
        """Images of the training source that some seed and number of shots needs, ascending."""
        return np.unique(np.concatenate([picked for of_seed in self.draws for picked in of_seed]))

    @property
    def num_images(self) -> int:
        """Images that one evaluation reads."""
        return len(self.train_indices) + len(self.test_indices)

    def run(self, extract: Extract, choosing: bool = False) -> FewshotResult:
        """Extracts the features of the images needed and evaluates them; `choosing` as in `shots.score`.

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
        train = train_features, images.train_labels[train_decoded]
        test = test_features, images.test_labels[test_decoded]
        classes = len(images.classes)
        result = score(self.shots, draws, train, test, classes, self.l2, choosing)
        sizes = np.bincount(images.train_labels[images.train_indices], minlength=classes)
        return replace(
            result,
            short_classes={k: int(np.count_nonzero(sizes < k)) for k in self.shots},
            dropped=self.num_images - len(train_decoded) - len(test_decoded),
        )


def evaluations(every: str, total_steps: int, batch_size: int, num_images: int, epoch_images: int | None = None) -> int:
    """Gives the steps between evaluations; 0 for none but those at step 0 and at the end, which always take place.

    `every` is a duration, which may need `epoch_images`, or auto: as many evaluations, the first and the last included,
    as cost less than 2% of the run, at most 20, in even steps. Each of `num_images` images counts as one trained on:
    reading it costs as much, its forward pass a third (on a CPU, with the least squares: 0.4).

    Raises:
        ValueError: an `every` that is no duration, or one in epochs without `epoch_images`.
    """
    if every != "auto":
        duration = parse_duration(every, "fewshot.every")
        if duration.unit == "epochs" and epoch_images is None:
            raise ValueError(f"fewshot.every {every!r} needs the number of images in an epoch")
        return duration.steps(batch_size, epoch_images or 1, total_steps)
    # The most that cost strictly less, in whole numbers: 0.02 * 55 * 750 is more than 825.
    affordable = (total_steps * batch_size - 1) // (_LEAST_TRAINING * max(num_images, 1))
    count = min(affordable, _MAX_EVALUATIONS)
    if count < 3:
        return 0
    period = math.ceil(total_steps / (count - 1))  # step 0, the multiples before the end, the end
    return period if period < total_steps else 0
