"""Few-shot linear regression on frozen features, once at the end or again and again while pretraining runs.

    labelled images -> K shots per class, drawn per seed -> least squares (ridge.py) -> accuracy on test images

Source: arXiv 2010.11929, section 4.1 "Metrics" and table 5; big_vision, evaluators/fewshot_lsr.py, whose draws these
are, index for index. What is drawn depends on labels and seeds alone, so only images that are needed are ever read.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from mpp.data.source import Source, SourceError, has_split, open_source
from mpp.downstream import ridge
from mpp.downstream.config import FewshotConfig
from mpp.train.schedule import parse_duration

Extract = Callable[[Source, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(source, indices (n,)) -> features (m, d), their indices in the source (m,): m < n where images do not decode."""

_TEST_SEED = 1729  # which images are tested never changes, so that figures of different runs compare
_HELD_OUT = 5  # every fifth image is held out where there is no test split
_MAX_EVALUATIONS = 20
_MAX_COST = 0.02  # of the run


def draw_shots(labels: Int[np.ndarray, " n"], shots: int, seed: int, num_classes: int) -> Int64[np.ndarray, " picked"]:
    """Indices of at most `shots` images per class, class by class, as the original evaluator draws them.

    Fewer shots with the same seed are a subset: each class is permuted once, and its first `shots` are taken.
    Labels outside 0 to num_classes - 1 are never picked.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(members)[:shots] for members in _by_class(labels, num_classes)])


@dataclass(frozen=True, eq=False)
class FewshotResult:
    """Accuracy per seed and number of shots, and what was missing."""

    shots: tuple[int, ...]
    accuracy: Float64[np.ndarray, "seeds shots"]
    """Share of the test images classified correctly, 0 to 1."""
    short_classes: Mapping[int, int] = field(default_factory=dict)
    """Shots -> number of classes with fewer images than that; 0 for most."""
    dropped: int = 0
    """Images, for training or test, that could not be decoded."""

    @property
    def mean(self) -> Float64[np.ndarray, " shots"]:
        """Mean over the seeds."""
        return self.accuracy.mean(axis=0)

    @property
    def spread(self) -> Float64[np.ndarray, " shots"]:
        """Sample standard deviation over the seeds; 0 where there is only one."""
        if len(self.accuracy) < 2:
            return np.zeros(len(self.shots))
        return self.accuracy.std(axis=0, ddof=1)

    def figures(self, prefix: str = "fewshot") -> dict[str, float]:
        """What to log: {"fewshot/5shot": mean, "fewshot/5shot_std": spread, ...}."""
        figures: dict[str, float] = {}
        for shots, mean, spread in zip(self.shots, self.mean, self.spread, strict=True):
            figures |= {f"{prefix}/{shots}shot": float(mean), f"{prefix}/{shots}shot_std": float(spread)}
        return figures

    def table(self) -> str:
        """The result for a terminal: one line per number of shots, in percent, and what was missing."""
        seeds = len(self.accuracy)
        lines = [f"shots  accuracy    std   ({seeds} seed{'s' * (seeds > 1)})"]
        for shots, mean, spread in zip(self.shots, self.mean, self.spread, strict=True):
            line = f"{shots:5d}  {mean:8.1%} {spread:6.1%}"
            short = self.short_classes.get(shots, 0)
            if short:
                line += f"   {short} class{' has' if short == 1 else 'es have'} fewer images"
            lines.append(line)
        if self.dropped:
            lines.append(f"{self.dropped} image{'s' * (self.dropped > 1)} could not be decoded")
        return "\n".join(lines)


def evaluate(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    num_classes: int,
    *,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = 2.0**10,
) -> FewshotResult:
    """Few-shot accuracy from the features of a whole labelled pool.

    Raises:
        ValueError: features that are NaN or infinite, labels or shapes that do not fit (see `ridge.fit`).
    """
    draws = [[draw_shots(train_labels, k, seed, num_classes) for k in shots] for seed in seeds]
    train, test = (train_features, train_labels), (test_features, test_labels)
    accuracy = _score(draws, train, test, num_classes, l2)
    return FewshotResult(tuple(shots), accuracy, _short_classes(train_labels, num_classes, shots))


@dataclass(frozen=True, eq=False)
class Fewshot:
    """A few-shot evaluation that is ready to run: which images it needs, and their labels."""

    train: Source
    test: Source
    train_labels: Int64[np.ndarray, " n"]
    """Of every image of the training source; -1 for those that are no part of the pool."""
    test_labels: Int64[np.ndarray, " m"]
    """Of every image of the test source, numbered as in the training source."""
    num_classes: int
    draws: tuple[tuple[np.ndarray, ...], ...]
    """Per seed and number of shots: indices into the training source."""
    test_indices: Int64[np.ndarray, " tested"]
    shots: tuple[int, ...]
    l2: float

    @classmethod
    def open(cls, config: FewshotConfig, download: bool = False) -> "Fewshot":
        """Opens the labelled sources that the config names, and decides once which images are needed.

        Raises:
            SourceError: a source that does not open, no labels, fewer than two classes, or a test source of others.
        """
        if not config.data:
            raise SourceError("few-shot evaluation needs labelled images: name their source as fewshot.data")
        has_test = has_split(config.data)
        train = open_source(config.data, split="train", download=download)
        if config.test == config.data and not has_test:
            raise SourceError(
                f"fewshot.test is fewshot.data, {config.data}, which has no test split of its own: "
                "leave fewshot.test empty to hold out a fifth of it"
            )
        if config.test:
            split = "test" if has_split(config.test) else "train"  # a folder of test images is all "train"
            return cls.build(config, train, open_source(config.test, split=split, download=download))
        test = open_source(config.data, split="test", download=download) if has_test else None
        return cls.build(config, train, test)

    @classmethod
    def build(cls, config: FewshotConfig, train: Source, test: Source | None = None) -> "Fewshot":
        """As `open`, from sources that are open already. Without `test`, a fifth of each class is held out.

        At most `config.max_test` test images are drawn, uniformly and by a fixed seed, so that they are the same in
        every run; not by class, so that the accuracy estimates that of the whole test split.
        """
        train_labels = _labels_of(train)
        num_classes = len(_class_names(train, train_labels))
        if len(np.unique(train_labels[train_labels >= 0])) < 2:
            raise SourceError(f"few-shot evaluation needs images of at least two classes; {train.name} has fewer")
        if test is None:
            held = _hold_out(train_labels, num_classes)
            if not held.any():
                raise SourceError(f"no class of {train.name} has two images, one to hold out: name a fewshot.test")
            test, test_labels = train, np.where(held, train_labels, -1)
            train_labels = np.where(held, -1, train_labels)
        else:
            test_labels = _renumbered(test, train, train_labels)
        tested = np.random.default_rng(_TEST_SEED).permutation(np.flatnonzero(test_labels >= 0))[: config.max_test]
        draws = tuple(
            tuple(draw_shots(train_labels, k, seed, num_classes) for k in config.shots) for seed in config.seeds
        )
        return cls(train, test, train_labels, test_labels, num_classes, draws, np.sort(tested), config.shots, config.l2)

    @property
    def train_indices(self) -> Int64[np.ndarray, " needed"]:
        """Images of the training source that some seed and number of shots needs, ascending."""
        return np.unique(np.concatenate([picked for of_seed in self.draws for picked in of_seed]))

    @property
    def num_images(self) -> int:
        """Images that one evaluation reads."""
        return len(self.train_indices) + len(self.test_indices)

    def run(self, extract: Extract) -> FewshotResult:
        """Extracts the features of the images needed and evaluates them.

        An image that `extract` leaves out is missing from the shots it was drawn for, and from the test images.

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
        accuracy = _score(draws, train, test, self.num_classes, self.l2)
        short = _short_classes(self.train_labels, self.num_classes, self.shots)
        return FewshotResult(self.shots, accuracy, short, self.num_images - len(train_kept) - len(test_kept))


def evaluations(every: str, total_steps: int, batch_size: int, num_images: int, epoch_images: int | None = None) -> int:
    """Steps between evaluations; 0 for none but those at step 0 and at the end, which always take place.

    auto: as many evaluations, the first and the last included, as cost less than 2% of the run, at most 20, in even
    steps. A forward pass costs a third of a training step's image, so that one evaluation costs num_images / 3.

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
    budget = _MAX_COST * total_steps * batch_size
    affordable = math.ceil(budget / (max(num_images, 1) / 3)) - 1  # the most that cost strictly less
    count = min(affordable, _MAX_EVALUATIONS)
    if count < 3:
        return 0
    period = math.ceil(total_steps / (count - 1))  # step 0, the multiples before the end, the end
    return period if period < total_steps else 0


def _score(
    draws: Sequence[Sequence[np.ndarray]],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    l2: float,
) -> Float64[np.ndarray, "seeds shots"]:
    """Accuracy of each draw, which is rows of `train`; train and test are features and labels."""
    features, labels = train

    def accuracy(rows: np.ndarray) -> float:
        return float(ridge.fit(features[rows], labels[rows], num_classes).accuracy(*test, [l2])[0])

    return np.array([[accuracy(rows) for rows in of_seed] for of_seed in draws])


def _by_class(labels: Int[np.ndarray, " n"], num_classes: int) -> list[np.ndarray]:
    """Ascending indices of each class, by one sort: 1,000 passes over ImageNet's labels would take a second."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(num_classes + 1))
    return [order[start:end] for start, end in itertools.pairwise(edges)]


def _short_classes(labels: np.ndarray, num_classes: int, shots: Sequence[int]) -> dict[int, int]:
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    return {k: int(np.count_nonzero(counts < k)) for k in shots}


def _hold_out(labels: Int64[np.ndarray, " n"], num_classes: int) -> Bool[np.ndarray, " n"]:
    """A fifth of each class, at least one image of two."""
    rng = np.random.default_rng(_TEST_SEED)
    held = np.zeros(len(labels), dtype=bool)
    for members in _by_class(labels, num_classes):
        share = max(round(len(members) / _HELD_OUT), 1) if len(members) > 1 else 0
        held[rng.permutation(members)[:share]] = True
    return held


def _labels_of(source: Source) -> Int64[np.ndarray, " n"]:
    labels = source.labels()
    if labels is None or not (labels >= 0).any():
        raise SourceError(f"{source.name} has no labels, which few-shot evaluation needs")
    if source.classes is not None and labels.max() >= len(source.classes):
        raise SourceError(f"{source.name} has label {labels.max()}, but only {len(source.classes)} classes")
    return labels


def _class_names(source: Source, labels: np.ndarray) -> tuple[str, ...]:
    return tuple(map(str, range(int(labels.max()) + 1))) if source.classes is None else source.classes


def _renumbered(test: Source, train: Source, train_labels: np.ndarray) -> Int64[np.ndarray, " m"]:
    """The test labels, by class name, in the training source's order; -1 where there is none."""
    labels = _labels_of(test)
    here, there = _class_names(train, train_labels), _class_names(test, labels)
    numbers = tuple(map(str, range(max(len(here), len(there)))))
    if there == numbers[: len(there)] and here == numbers[: len(here)] and len(there) <= len(here):
        return labels  # numbers for names: that the last ones are missing only says that no test image has them
    name = f"the test split of {test.name}" if test.name == train.name else test.name
    for lacking, has, of, names in ((name, there, train.name, here), (train.name, here, name, there)):
        missing = sorted(set(names) - set(has))
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise SourceError(f"{lacking} lacks {len(missing)} of the classes of {of}: {some}")
    position = {one: i for i, one in enumerate(here)}
    return np.where(labels >= 0, np.array([position[one] for one in there])[labels], -1)


def _extract_once(extract: Extract, source: Source, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and indices, ascending; an image that came twice, as ranks that pad may send it, counts once."""
    features, kept = extract(source, wanted)
    if len(features) != len(kept) or not np.isin(kept, wanted).all():
        raise ValueError(f"extract was asked for {len(wanted)} images and returned others ({len(kept)} indices)")
    unique, first = np.unique(kept, return_index=True)
    return features[first], unique
