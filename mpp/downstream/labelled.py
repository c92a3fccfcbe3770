"""Labelled images for whatever learns from them: what is trained on, what is tested, and what must be said about it.

    labelled = open_labelled("folder:/data/flowers")            # its own test split, or a fifth held out
    labels = take_fraction(labelled.train_labels, len(labelled.classes), "10%", seed=0)
    labelled = with_labels(labelled, labels)
    choosing = hold_out(labelled, 0.1, seed=0)                   # for settings; the real test images are in no split

Every split is an array of labels with -1 for the images outside it, so that no image is read or copied to make one.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int, Int64

from mpp.data.sources.base import Source, SourceError, checked_labels, count, warnings_of
from mpp.data.sources.fingerprint import listing
from mpp.data.sources.names import printable
from mpp.data.sources.opening import open_splits
from mpp.data.sources.overlap import same_places
from mpp.data.sources.patterns import shown
from mpp.downstream.settings import parse_share

_TEST_SEED = 1729  # which images are tested never changes, so that figures of different runs compare
_TEST_SHARE = 1 / 5  # of each class, held out where there is no test split
_FRACTION, _SETTINGS = 1, 2  # what a seed's draws are for, so that no two of them are the same
_IMBALANCE = 2.0  # the largest class over the smallest, from which on it is said
_NAMED = 5  # classes that a note names


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images to learn from and images to test, with one numbering of classes for both."""

    train: Source
    test: Source
    """The training source itself where a part of it was held out."""
    classes: tuple[str, ...]
    """Of the training data: what a head predicts."""
    train_labels: Int64[np.ndarray, " n"]
    """Of every image of `train`, numbered by `classes`; -1: not part of the training pool."""
    test_labels: Int64[np.ndarray, " m"]
    """Of every image of `test`, numbered by `classes`, then by `foreign`; -1: not tested."""
    foreign: tuple[str, ...] = ()
    """Classes that only test images have. They are numbered after `classes` and can never be predicted."""
    notes: tuple[str, ...] = ()
    """One line each: what was held out or left out, classes that lack images, imbalance."""

    def facts(self) -> dict[str, str]:
        """What must be the same for all ranks that read these images, by name (see `dist.agree`)."""
        labels = hashlib.sha256(self.train_labels.tobytes() + self.test_labels.tobytes()).hexdigest()[:12]
        listed = {"training images": listing(self.train), "test images": listing(self.test)}
        return {**listed, "labels with fingerprint": labels}

    @property
    def train_indices(self) -> Int64[np.ndarray, " trained"]:
        """Images of the training pool, ascending."""
        return np.flatnonzero(self.train_labels >= 0)

    @property
    def test_indices(self) -> Int64[np.ndarray, " tested"]:
        """Images that are tested, ascending."""
        return np.flatnonzero(self.test_labels >= 0)


def open_labelled(data: str, test: str = "", download: bool = False, keep: bool = False) -> Labelled:
    """Opens labelled images by the strings of their sources.

    Args:
        data: the training images, and the test images too where `test` is empty: its own test split if it has one,
            else a fifth of each class, held out by a fixed seed.
        test: source of the test images; its test split where it has one.
        download: fetch cifar10 or cifar100 where the folder lacks it.
        keep: keep in the cache what is fetched of remote shards.

    Raises:
        SourceError: a source that does not open, and what `label` refuses.
    """
    splits = open_splits(data, download, keep=keep)
    if test == data and "test" not in splits:
        raise SourceError(
            f"{shown(data)} is named for training and for testing, but has no test split of its own: "
            "name no test source to hold out a fifth of it, or one of other images"
        )
    train = splits["train"]
    if getattr(train, "weights", None):
        raise SourceError(f"{data}: weights say how often images are drawn, which is for pretraining; leave them out")
    if test and test != data:
        others = open_splits(test, download, train.classes or (), keep)
        return label(train, others["test" if "test" in others else "train"])  # a folder of test images is all "train"
    return label(train, splits.get("test"))


def label(train: Source, test: Source | None = None) -> Labelled:
    """As `open_labelled`, from sources that are open already; without `test`, a fifth of each class is held out.

    Classes are matched by name. A class that one side lacks is said in the notes; test images of a class that the
    training images lack stay in the test, where they can only count as wrong.

    Raises:
        SourceError: no labels, training images of fewer than two classes, nothing to hold out, the same images on
            both sides, or no class in common.
    """
    train_labels, classes = _numbered(train)
    present = np.unique(train_labels[train_labels >= 0])
    if len(present) < 2:
        raise SourceError(
            f"{train.name} has labelled images of one class alone, {_some(_at(classes, present))}: "
            "there must be two at least to tell apart"
        )
    said = _warnings(train, train_labels)
    if test is None:
        held = _draw(train_labels, len(classes), _TEST_SHARE, np.random.default_rng(_TEST_SEED))
        if not held.any():
            raise SourceError(f"no class of {train.name} has two images, one to hold out: name a source of test images")
        said += [f"{train.name} has no test split of its own: a fifth of it, {held.sum():,} images, is held out"]
        return _split(train, classes, train_labels, held, said)
    if same_places(train, test):
        raise SourceError(f"{test.name} holds the very images of {train.name}: name other images for the test")
    test_labels, there = _numbered(test)
    test_labels, foreign = _renumber(test_labels, there, classes)
    if not np.isin(test_labels, present).any():
        raise SourceError(
            f"the classes of {_test_name(train, test)} are none of those of {train.name}: {_some(foreign or there)} "
            f"against {_some(_at(classes, present))}; name the classes of both alike"
        )
    said += _warnings(test, test_labels)
    notes = (*said, *_notes(train_labels, test_labels, classes, foreign))
    return Labelled(train, test, classes, train_labels, test_labels, foreign, notes)


def hold_out(labelled: Labelled, share: float, seed: int) -> Labelled:
    """A part of each class's training images in place of the test images, to choose settings by.

    The real test images are in no split of what comes back. A class of one image stays in training; one of more keeps
    at least one there and gives at least one.

    Args:
        labelled: as opened, or a fraction of it.
        share: of each class, between 0 and 1.
        seed: of the draw.

    Raises:
        SourceError: no class has two training images.
        ValueError: a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share held out must be between 0 and 1, got {share}")
    rng = np.random.default_rng([seed, _SETTINGS])
    held = _draw(labelled.train_labels, len(labelled.classes), share, rng)
    if not held.any():
        raise SourceError(f"no class of {labelled.train.name} has two training images, one to choose settings by")
    said = [f"{held.sum():,} of {len(labelled.train_indices):,} training images are held out to choose settings by"]
    return _split(labelled.train, labelled.classes, labelled.train_labels, held, said)


def with_labels(labelled: Labelled, train_labels: Int64[np.ndarray, " n"]) -> Labelled:
    """The same images with other training labels, a fraction of them, say; the notes are those of what is left."""
    before, after = (
        _notes(labels, labelled.test_labels, labelled.classes, labelled.foreign)
        for labels in (labelled.train_labels, train_labels)
    )
    kept = (note for note in labelled.notes if note not in before)
    return replace(labelled, train_labels=train_labels, notes=(*kept, *after))


def take_fraction(
    labels: Int64[np.ndarray, " n"], num_classes: int, share: str | float, seed: int
) -> Int64[np.ndarray, " n"]:
    """The labels with -1 outside a part of each class: at least one image of each class that has any.

    With the same seed a smaller fraction is part of a larger one: each class is permuted once.

    Raises:
        ValueError: a share that `parse_share` refuses.
    """
    share = parse_share(str(share))
    rng = np.random.default_rng([seed, _FRACTION])
    taken = np.full_like(labels, -1)
    for members in by_class(labels, num_classes):
        kept = rng.permutation(members)[: max(round(share * len(members)), 1)]
        taken[kept] = labels[kept]
    return taken


def by_class(labels: Int[np.ndarray, " n"], num_classes: int) -> list[np.ndarray]:
    """Ascending indices of each class, by one sort: 1,000 passes over ImageNet's labels would take a second."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(num_classes + 1))
    return [order[start:end] for start, end in itertools.pairwise(edges)]


def _draw(labels: np.ndarray, num_classes: int, share: float, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """A share of each class, at least one image of two, and never all."""
    drawn = np.zeros(len(labels), dtype=bool)
    for members in by_class(labels, num_classes):
        number = min(max(round(len(members) * share), 1), len(members) - 1) if len(members) else 0
        drawn[rng.permutation(members)[:number]] = True
    return drawn


def _split(train: Source, classes: tuple[str, ...], labels: np.ndarray, held: np.ndarray, said: list[str]) -> Labelled:
    """One source in two: the images held out are the test images."""
    train_labels, test_labels = np.where(held, -1, labels), np.where(held, labels, -1)
    notes = (*said, *_notes(train_labels, test_labels, classes, ()))
    return Labelled(train, train, classes, train_labels, test_labels, (), notes)


def _numbered(source: Source) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """The labels of a source, -1 where there is none, and the names they number."""
    labels = source.labels()
    if labels is None or not (labels >= 0).any():
        raise SourceError(
            f"{source.name} has no labels ({source.describe()}): give e.g. a folder of one sub-folder per class"
        )
    labels, classes = checked_labels(source.name, np.maximum(labels, -1), len(labels), source.classes)
    assert labels is not None
    assert classes is not None  # some image has a label
    return labels, classes


def _renumber(
    labels: Int64[np.ndarray, " m"], there: tuple[str, ...], here: tuple[str, ...]
) -> tuple[Int64[np.ndarray, " m"], tuple[str, ...]]:
    """Labels that number the names `there`, by the names `here` and then by those that only images `there` have."""
    # Two classes may have one name, as ImageNet's two cranes: the second is then matched with the second.
    position = {key: number for number, key in enumerate(_keys(here))}
    used = set(np.unique(labels[labels >= 0]).tolist())
    foreign = [number for number, key in enumerate(_keys(there)) if key not in position and number in used]
    position |= {_keys(there)[number]: len(here) + i for i, number in enumerate(foreign)}
    numbers = np.array([position.get(key, -1) for key in _keys(there)], dtype=np.int64)
    return np.where(labels >= 0, numbers[labels], -1), tuple(there[number] for number in foreign)


def _keys(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each name with how often it came before."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _test_name(train: Source, test: Source) -> str:
    return f"the test split of {test.name}" if test.name == train.name else test.name


def _warnings(source: Source, labels: np.ndarray) -> list[str]:
    number = int((labels < 0).sum())
    return [
        *warnings_of(source),
        *[f"{count(number, 'image')} of {source.name} without a label left out"] * bool(number),
    ]


def _notes(
    train_labels: np.ndarray, test_labels: np.ndarray, classes: tuple[str, ...], foreign: tuple[str, ...]
) -> list[str]:
    """Classes that one side lacks, and imbalance."""
    names, notes = (*classes, *foreign), []
    trained, tested = (np.bincount(labels[labels >= 0], minlength=len(names)) for labels in (train_labels, test_labels))
    lost = np.flatnonzero((trained == 0) & (tested > 0))
    if len(lost):
        wrong = count(int(tested[lost].sum()), "test image")
        notes.append(
            f"{_lacking(len(lost), 'training')}, so that {wrong} can only count as wrong: {_some(_at(names, lost))}"
        )
    untested = np.flatnonzero((trained > 0) & (tested == 0))
    if len(untested):
        notes.append(f"{_lacking(len(untested), 'test')}: {_some(_at(names, untested))}")
    sizes = trained[trained > 0]
    if sizes.max() >= _IMBALANCE * sizes.min():
        notes.append(
            f"imbalance: {sizes.min():,} to {sizes.max():,} training images a class (median {np.median(sizes):,.0f})"
        )
    return notes


def _lacking(number: int, kind: str) -> str:
    return f"{count(number, 'class')} {'has' if number == 1 else 'have'} no {kind} images"


def _at(names: Sequence[str], numbers: np.ndarray) -> list[str]:
    return [names[int(number)] for number in numbers]


def _some(names: Sequence[str]) -> str:
    one_line = (printable(" ".join(name.split())) for name in names[:_NAMED])
    return ", ".join(one_line) + (", ..." if len(names) > _NAMED else "")
