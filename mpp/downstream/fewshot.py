"""Few-shot linear regression on frozen features, once at the end or again and again while pretraining runs.

    labelled images (labelled.py) -> which are drawn or tested -> their features -> accuracy (shots.py)

What is drawn depends on labels and seeds alone, so only images that are needed are ever read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from mpp.data.sources.base import Source, SourceError
from mpp.downstream.labelled import Labelled, label, open_labelled
from mpp.downstream.settings import FewshotConfig
from mpp.downstream.shots import L2, FewshotResult, draw_shots, score, short_classes
from mpp.training.schedule import parse_duration

Extract = Callable[[Source, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(source, indices (n,)) -> features (m, d), their indices in the source (m,): m < n where images do not decode."""

_TEST_SEED = 1729  # which images are tested never changes, so that figures of different runs compare
_MAX_EVALUATIONS = 20
_LEAST_TRAINING = 50  # images trained on for each evaluated one: 2% of the run


@dataclass(frozen=True, eq=False)
class Fewshot:
    """A few-shot evaluation that is ready to run: which images it needs, and their labels."""

    train: Source
    test: Source
    train_labels: Int64[np.ndarray, " n"]
    """Of every image of the training source; -1 for those that are no part of the pool."""
    test_labels: Int64[np.ndarray, " m"]
    """Of every image of the test source, numbered as in the training source; from num_classes on, classes it lacks."""
    num_classes: int
    draws: tuple[tuple[np.ndarray, ...], ...]
    """Per seed and number of shots: indices into the training source."""
    test_indices: Int64[np.ndarray, " tested"]
    shots: tuple[int, ...]
    l2: float
    notes: tuple[str, ...] = ()
    """What is to be said of the sources: held-out images, classes that one side lacks, imbalance."""

    @classmethod
    def open(cls, config: FewshotConfig, download: bool = False, keep: bool = False) -> "Fewshot":
        """Opens the labelled sources that the config names, and decides once which images are needed.

        `download` and `keep` are those of `open_labelled`.

        Raises:
            SourceError: a source that does not open, and what `labelled.label` refuses.
        """
        if not config.data:
            raise SourceError("few-shot evaluation needs labelled images: name their source as fewshot.data")
        try:
            return cls.of(config, open_labelled(config.data, config.test, download, keep))
        except SourceError as error:
            raise SourceError(f"fewshot.data: {error}") from error

    @classmethod
    def build(cls, config: FewshotConfig, train: Source, test: Source | None = None) -> "Fewshot":
        """As `open`, from sources that are open already. Without `test`, a fifth of each class is held out.

        At most `config.max_test` test images are drawn, uniformly and by a fixed seed, so that they are the same in
        every run; not by class, so that the accuracy estimates that of the whole test split.
        """
        return cls.of(config, label(train, test))

    @classmethod
    def of(cls, config: FewshotConfig, of: Labelled) -> "Fewshot":
        """As `build`, from labelled images whose split is made."""
        tested = np.random.default_rng(_TEST_SEED).permutation(of.test_indices)[: config.max_test]
        draws = tuple(
            tuple(draw_shots(of.train_labels, k, seed, len(of.classes)) for k in config.shots) for seed in config.seeds
        )
        return cls(
            of.train,
            of.test,
            of.train_labels,
            of.test_labels,
            len(of.classes),
            draws,
            np.sort(tested),
            config.shots,
            config.l2,
            of.notes,
        )

    @property
    def train_indices(self) -> Int64[np.ndarray, " needed"]:
        """Images of the training source that some seed and number of shots needs, ascending."""
        return np.unique(np.concatenate([picked for of_seed in self.draws for picked in of_seed]))

    @property
    def num_images(self) -> int:
        """Images that one evaluation reads."""
        return len(self.train_indices) + len(self.test_indices)

    def run(self, extract: Extract, l2: L2 | None = None, choosing: bool = False) -> FewshotResult:
        """Extracts the features of the images needed and evaluates them.

        An image that `extract` leaves out is missing from the shots it was drawn for, and from the test images.

        Args:
            l2: strength of the regularisation, or "cv" to choose it for each draw by cross-validation on its shots.
                None: the config's.
            choosing: as in `shots.score`.

        Raises:
            ValueError: no image left to learn from or to test, features that are NaN or infinite.
        """
        train_features, train_kept = _extract_once(extract, self.train, self.train_indices)
        test_features, test_kept = _extract_once(extract, self.test, self.test_indices)
        row = np.full(len(self.train_labels), -1)
        row[train_kept] = np.arange(len(train_kept))
        draws = [[row[picked][row[picked] >= 0] for picked in of_seed] for of_seed in self.draws]
        if not len(test_kept) or any(not len(rows) for of_seed in draws for rows in of_seed):
            raise ValueError("few-shot evaluation has no image left: none of those needed could be decoded")
        train = train_features, self.train_labels[train_kept]
        test = test_features, self.test_labels[test_kept]
        result = score(self.shots, draws, train, test, self.num_classes, self.l2 if l2 is None else l2, choosing)
        return replace(
            result,
            short_classes=short_classes(self.train_labels, self.num_classes, self.shots),
            dropped=self.num_images - len(train_kept) - len(test_kept),
        )


def evaluations(every: str, total_steps: int, batch_size: int, num_images: int, epoch_images: int | None = None) -> int:
    """Steps between evaluations; 0 for none but those at step 0 and at the end, which always take place.

    auto: as many evaluations, the first and the last included, as cost less than 2% of the run, at most 20, in even
    steps. An evaluated image is counted as one trained on: reading it costs as much, its forward pass a third (measured
    on a CPU, with the solution of the least squares: 0.4).

    Args:
        every: a duration or "auto".
        total_steps: length of the run.
        batch_size: images per step over all devices.
        num_images: images per evaluation.
        epoch_images: images in an epoch, for an `every` in epochs.

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


def _extract_once(extract: Extract, source: Source, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and indices, ascending; an image that came twice, as ranks that pad may send it, counts once."""
    features, kept = extract(source, wanted)
    if len(features) != len(kept) or not np.isin(kept, wanted).all():
        raise ValueError(f"extract was asked for {len(wanted)} images and returned others ({len(kept)} indices)")
    unique, first = np.unique(kept, return_index=True)
    return features[first], unique
