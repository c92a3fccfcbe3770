"""Labelled images with one numbering of classes: which are trained on, which are tested, and notes on both.

    labelled = open_labelled("folder:/data/flowers")            # its own test split, or a fifth held out
    part = take_fraction(labelled, "10%", seed=0)
    choosing = hold_out(part, 0.1, seed=0)                       # for settings; the real test images are in no split

Every split is an array of labels with -1 for the images outside it: no image is read or copied to make one.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

from mpp.data.sources.base import Source, SourceError, count
from mpp.data.sources.in_memory import checked_labels
from mpp.data.sources.names import printable
from mpp.data.sources.opening import Splits, open_splits
from mpp.data.sources.overlap import same_places
from mpp.data.sources.patterns import shown
from mpp.downstream.groups import check_groups, draw_groups, groups_of, shared_groups
from mpp.downstream.multi_label import join_sets
from mpp.downstream.settings import parse_share

_TEST_SEED = 1729  # which images are tested never changes, so that figures of different runs compare
_TEST_SHARE = 1 / 5  # of each class, held out where there is no test split
_FRACTION, _SETTINGS = 1, 2  # keep the draws of one seed for two purposes apart
_IMBALANCE = 2.0  # the largest class over the smallest, from which on a note says so
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
    source_notes: tuple[str, ...] = ()
    """One line each: what was held out or left out."""
    val: Source | None = None
    """A validation split of the training source, on which settings are chosen."""
    val_labels: Int64[np.ndarray, " v"] | None = None
    """Of every image of `val`, numbered by `classes`; -1: not used, also where the training images lack the class."""
    train_groups: Int64[np.ndarray, " n"] | None = None
    """Of every image of `train`, as of `groups_of`: images of a group are never parted. None: each is by itself."""
    test_groups: Int64[np.ndarray, " m"] | None = None
    """Likewise of `test`; `train_groups` themselves where a part of it was held out."""
    val_groups: Int64[np.ndarray, " v"] | None = None
    """Likewise of `val`."""
    sets: UInt8[np.ndarray, "s K"] | None = None
    """Of images with several labels each, or none: 1 where a set has the class; all labels then number these sets."""

    def sizes(self, labels: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " C"]:
        """Counts the images of each of `classes`, and of `foreign`."""
        return _sizes(labels, len(self.classes) + len(self.foreign), self.sets)

    def truth(self, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"] | UInt8[np.ndarray, "n K"]:
        """Gives what is learned or tested of labels: themselves, or their sets."""
        return labels if self.sets is None else self.sets[labels]

    def facts(self) -> dict[str, str]:
        """What must be the same for all ranks that read these images, by name (see `dist.agree`)."""
        sets = b"" if self.sets is None else self.sets.tobytes()
        labels = hashlib.sha256(self.train_labels.tobytes() + self.test_labels.tobytes() + sets).hexdigest()[:12]
        listed = {"training images": self.train.listing(), "test images": self.test.listing()}
        listed |= {"validation images": self.val.listing()} if self.val else {}
        return {**listed, "labels with fingerprint": labels}

    @property
    def train_indices(self) -> Int64[np.ndarray, " trained"]:
        """Images of the training pool, ascending."""
        return np.flatnonzero(self.train_labels >= 0)

    @property
    def test_indices(self) -> Int64[np.ndarray, " tested"]:
        """Images that are tested, ascending."""
        return np.flatnonzero(self.test_labels >= 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes on the sources, and on the labels: classes that one side lacks, and imbalance."""
        names, notes = (*self.classes, *self.foreign), list(self.source_notes)
        both = self.train_labels, self.test_labels
        trained, tested = map(self.sizes, both)
        for kind, here, there in (("training", trained, tested), ("test", tested, trained)):
            lacking = np.flatnonzero((here == 0) & (there > 0))
            if number := len(lacking):
                lack = f"{count(number, 'class')} {'has' if number == 1 else 'have'} no {kind} images"
                wrong = f", so that {count(int(tested[lacking].sum()), 'test image')} can only count as wrong"
                notes.append(f"{lack}{wrong if kind == 'training' else ''}: {_some(names, lacking)}")
        sizes = trained[trained > 0]
        if sizes.max() >= _IMBALANCE * sizes.min():
            low, high, median = sizes.min(), sizes.max(), np.median(sizes)
            notes.append(f"imbalance: {low:,} to {high:,} training images a class (median {median:,.0f})")
        return tuple(notes)


def open_labelled(data: str, test: str = "", download: bool = False, keep: bool = False, group: str = "") -> Labelled:
    """Opens labelled images by the strings of their sources.

    Test images are those of `test`, its test split where it has one; without `test` the test split of `data`, else a
    fifth of each class, held out by a fixed seed. `download`, `keep` and `group` are those of the data settings.

    Raises:
        SourceError: a source that does not open, or as `label`.
    """
    splits = open_splits(data, download, keep=keep)
    if test == data and "test" not in splits:
        what = f"{shown(data)} is named for training and for testing, but has no test split of its own"
        raise SourceError(f"{what}: name no test source to hold out a fifth of it, or one of other images")
    train = splits["train"]
    if train.weights:
        raise SourceError(f"{data}: weights say how often images are drawn, which is for pretraining; leave them out")
    if test and test != data:
        others = open_splits(test, download, train.classes or (), keep)
        labelled = label(train, others.get("test", others["train"]), group)  # a folder of test images is all "train"
    else:
        labelled = label(train, splits.get("test"), group)
    return _with_validation(labelled, splits, group) if "val" in splits else labelled


def _with_validation(labelled: Labelled, splits: Splits, group: str) -> Labelled:
    """Adds the validation split, or a note why it is not used: nobody need choose anything by it."""
    try:
        val = splits["val"]
        if same_places(labelled.train, val) or same_places(labelled.test, val):
            raise SourceError(f"{val.name} holds the very images of another split there")
        sets = labelled.sets
        if sets is None:
            labels, _ = _renumber(*_numbered(val, several=False), labelled.classes)
            labels = np.where(np.isin(labels, labelled.train_labels), labels, -1)
        else:
            labels, sets = join_sets(sets, labelled.classes, val)
        if not (labels >= 0).any():
            raise SourceError(f"{val.name} has none of the classes of its training split there")
    except SourceError as error:
        note = f"the validation split is not used: {error}"
        return replace(labelled, source_notes=(*labelled.source_notes, note))
    groups = groups_of(val, group)
    sides = (("training", labelled.train_groups), ("test", labelled.test_groups))
    notes = [note for side, others in sides for note in _spanning(side, others, "validation", groups)]
    notes = (*labelled.source_notes, *notes)
    return replace(labelled, val=val, val_labels=labels, val_groups=groups, source_notes=notes, sets=sets)


def _spanning(
    side: str, groups: np.ndarray | None, other: str, others: np.ndarray | None, labels: np.ndarray | None = None
) -> list[str]:
    """Warns of groups that given splits part; `labels` are those of the other side, where only some of it is used."""
    number, images = shared_groups(groups, others)
    if not number:
        return []
    if labels is not None:
        images &= labels >= 0
    have = f"{count(number, 'group')} {'has' if number == 1 else 'have'} images in the {side} and in the {other} split"
    return [f"WARNING: {have}, {count(int(images.sum()), f'{other} image')} among them: figures will be too good"]


def label(train: Source, test: Source | None = None, group: str = "") -> Labelled:
    """Labels sources that are open already as `open_labelled` does; without `test`, a fifth of each class is held out.

    Images of one group are held out together. Groups are those of the sources, or what the pattern `group` finds.
    Classes are matched by name. Test images of a class that the training images lack stay in the test, where they can
    only count as wrong.

    Raises:
        SourceError: no labels, training images of fewer than two classes, nothing to hold out, the same images on
            both sides, no class in common, or groups that part nothing.
    """
    train_labels, classes = _numbered(train)
    sets = None if (found := train.label_sets()) is None else found.table
    present = np.flatnonzero(_sizes(train_labels, len(classes), sets))
    if len(present) < (2 if sets is None else 1):
        alone = f"of one class alone, {_some(classes, present)}" if len(present) else "of no class at all"
        raise SourceError(f"{train.name} has labelled images {alone}: there must be two at least to tell apart")
    notes, groups = _warnings(train, train_labels), groups_of(train, group)
    if groups is not None:
        notes += [check_groups(groups, train, group)]
    if test is None:
        rng = np.random.default_rng(_TEST_SEED)
        held_out = _draw(train_labels, groups, sets, len(classes), _TEST_SHARE, rng, leave=1)
        if not held_out.any():
            raise SourceError(f"{_inseparable(train, groups, 'one to hold out')}: name a source of test images")
        notes += [f"{train.name} has no test split of its own: a fifth of it, {held_out.sum():,} images, is held out"]
        return _split(train, classes, train_labels, groups, sets, held_out, notes)
    if same_places(train, test):
        raise SourceError(f"{test.name} holds the very images of {train.name}: name other images for the test")
    test_labels, test_classes = _numbered(test, several=sets is not None)
    if sets is None:
        test_labels, foreign = _renumber(test_labels, test_classes, classes)
    else:
        (test_labels, sets), foreign = join_sets(sets, classes, test), ()
    if not _sizes(test_labels, len(classes), sets)[present].any():
        name = f"the test split of {test.name}" if test.name == train.name else test.name
        others = foreign or test_classes
        names = f"{_some(others, range(len(others)))} against {_some(classes, present)}"
        what = f"the classes of {name} are none of those of {train.name}: {names}"
        raise SourceError(f"{what}; name the classes of both alike")
    test_groups = groups_of(test, group)
    notes += [*_warnings(test, test_labels), *_spanning("training", groups, "test", test_groups, test_labels)]
    sides = train_labels, test_labels, foreign, tuple(notes)
    return Labelled(train, test, classes, *sides, train_groups=groups, test_groups=test_groups, sets=sets)


def take_fraction(labelled: Labelled, share: str | float, seed: int) -> Labelled:
    """Keeps a share of each class's training images, at least one of each class that has any; of groups, whole ones.

    With the same seed a smaller fraction is part of a larger one. Raises ValueError as `parse_share`.
    """
    rng, labels = np.random.default_rng([seed, _FRACTION]), labelled.train_labels
    of = labelled.train_groups, labelled.sets, len(labelled.classes)
    drawn = _draw(labels, *of, parse_share(str(share)), rng, leave=0)
    return replace(labelled, train_labels=np.where(drawn, labels, -1))


def hold_out(labelled: Labelled, share: float, seed: int) -> Labelled:
    """Puts the validation images in place of the test images, to choose settings; without a validation split a share
    (between 0 and 1) of each class's training images, in whole groups.

    The real test images are in no split of the result. A class of one image stays in training; one of more keeps at
    least one there and gives at least one. Raises SourceError where no class has two training images (or groups).
    """
    if labelled.val is not None and labelled.val_labels is not None:
        note = f"settings are chosen on the validation split, {count(int((labelled.val_labels >= 0).sum()), 'image')}"
        chosen_on = {"test": labelled.val, "test_labels": labelled.val_labels, "test_groups": labelled.val_groups}
        without = {"val": None, "val_labels": None, "val_groups": None}
        return replace(labelled, **chosen_on, **without, foreign=(), source_notes=(note,))
    rng, labels = np.random.default_rng([seed, _SETTINGS]), labelled.train_labels
    held_out = _draw(labels, labelled.train_groups, labelled.sets, len(labelled.classes), share, rng, leave=1)
    if not held_out.any():
        raise SourceError(_inseparable(labelled.train, labelled.train_groups, "one to choose settings by", "training "))
    number = f"{held_out.sum():,} of {len(labelled.train_indices):,}"
    note = f"{number} training images are held out to choose settings by"
    return _split(labelled.train, labelled.classes, labels, labelled.train_groups, labelled.sets, held_out, [note])


def by_class(labels: Int[np.ndarray, " n"], num_classes: int) -> list[np.ndarray]:
    """Gives ascending indices of each class, by one sort: 1,000 passes over ImageNet's labels would take a second."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(num_classes + 1))
    return [order[start:end] for start, end in itertools.pairwise(edges)]


def _draw(
    labels: np.ndarray,
    groups: np.ndarray | None,
    sets: np.ndarray | None,
    num_classes: int,
    share: float,
    rng: np.random.Generator,
    leave: int,
) -> Bool[np.ndarray, " n"]:
    """Draws a share of each class: at least one image, or group, but always `leave` of them stay."""
    if groups is not None or sets is not None:
        return draw_groups(labels, groups, share, rng, leave, sets)
    drawn = np.zeros(len(labels), dtype=bool)
    for members in by_class(labels, num_classes):
        number = min(max(round(len(members) * share), 1), max(len(members) - leave, 0))
        drawn[rng.permutation(members)[:number]] = True
    return drawn


def _inseparable(source: Source, groups: np.ndarray | None, purpose: str, kind: str = "") -> str:
    """Says why nothing can be held out."""
    if groups is None:
        return f"no class of {source.name} has two {kind}images, {purpose}"
    return f"every group of {source.name} is the only one of some class, so that there is not {purpose}"


def _split(
    train: Source,
    classes: tuple[str, ...],
    labels: np.ndarray,
    groups: np.ndarray | None,
    sets: np.ndarray | None,
    held_out: np.ndarray,
    notes: list[str],
) -> Labelled:
    """Makes the images held out of a source its test images."""
    sides = np.where(held_out, -1, labels), np.where(held_out, labels, -1), (), tuple(notes)
    return Labelled(train, train, classes, *sides, train_groups=groups, test_groups=groups, sets=sets)


def _numbered(source: Source, several: bool = True) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """Gives the labels of a source, -1 where there is none, and the names they number; or of their sets."""
    if (sets := source.label_sets()) is not None and source.classes and (sets.number >= 0).any():
        if not several:
            raise SourceError(f"{source.name} has several labels an image, and the training images have one each")
        return sets.number, source.classes
    labels = source.labels()
    if labels is None or not (labels >= 0).any():
        what = f"{source.name} has no labels ({source.describe()})"
        raise SourceError(f"{what}: give e.g. a folder of one sub-folder per class")
    labels, classes = checked_labels(source.name, np.maximum(labels, -1), len(labels), source.classes)
    assert labels is not None
    assert classes is not None  # some image has a label
    return labels, classes


def _sizes(labels: np.ndarray, num_classes: int, sets: np.ndarray | None) -> Int64[np.ndarray, " K"]:
    """Counts the images of each class."""
    numbers = np.bincount(labels[labels >= 0], minlength=num_classes if sets is None else len(sets))
    return numbers if sets is None else numbers @ sets.astype(np.int64)


def _renumber(
    labels: Int64[np.ndarray, " m"], names: tuple[str, ...], classes: tuple[str, ...]
) -> tuple[Int64[np.ndarray, " m"], tuple[str, ...]]:
    """Renumbers labels of `names` by `classes` and, after them, by the names that `classes` lacks but labels use."""
    keys, position = _keys(names), {key: number for number, key in enumerate(_keys(classes))}
    used = set(np.unique(labels[labels >= 0]).tolist())
    foreign = [number for number, key in enumerate(keys) if key not in position and number in used]
    position |= {keys[number]: len(classes) + i for i, number in enumerate(foreign)}
    numbers = np.array([position.get(key, -1) for key in keys], dtype=np.int64)
    return np.where(labels >= 0, numbers[labels], -1), tuple(names[number] for number in foreign)


def _keys(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Pairs each name with how often it came before, so that ImageNet's two cranes match one by one."""
    before: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
    return [(name, next(before[name])) for name in names]


def _warnings(source: Source, labels: np.ndarray) -> list[str]:
    number = int((labels < 0).sum())
    unlabelled = [f"{count(number, 'image')} of {source.name} without a label left out"] if number else []
    return [*source.warnings, *unlabelled]


def _some(names: Sequence[str], numbers: Sequence[int] | np.ndarray) -> str:
    """Lists the first names of these numbers, each on one line."""
    one_line = (printable(" ".join(names[int(number)].split())) for number in numbers[:_NAMED])
    return ", ".join(one_line) + (", ..." if len(numbers) > _NAMED else "")
