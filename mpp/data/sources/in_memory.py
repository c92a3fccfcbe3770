"""Images and labels in memory; labels are checked, and their classes have names."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpp.data.sources.base import ClassNames, Labels, LabelSets, Placement, Source, SourceError, check_index, count

_MOST_NUMBERED = 100_000  # ImageNet-21k has 21,841 classes, the largest sets of faces some 90,000


class ListSource(Source):
    """Images in memory.

    Args:
        images: encoded bytes or arrays (H, W) or (H, W, C) of a real dtype; one array (N, H, W, C) will do.
        labels: one an image, -1 for none; None: unlabelled.
        classes: class names; None: numbers, where there are labels.
        name: what the source is called.
        split: of the source, where it has several.

    Raises SourceError: labels that are not one whole number an image, or name no class.
    """

    def __init__(
        self,
        images: Sequence[bytes | np.ndarray] | np.ndarray,
        labels: Labels | None = None,
        classes: ClassNames = None,
        name: str = "list",
        split: str = "",
    ) -> None:
        checked = (None, None) if labels is None else checked_labels(name, labels, len(images), classes)
        super().__init__(name, *checked)
        self._images, self._whole = images, f"the {split} split of {name}" if split else name

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> bytes | np.ndarray:
        return self._images[index]

    def location(self, index: int) -> str:
        return f"image {check_index(index, len(self))} of {self._whole}"

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        images = self._images
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4:
            return images[indices]
        return None

    def placement(self, indices: np.ndarray) -> Placement:
        images = (self._images[index] for index in indices.tolist())
        sizes = [image.nbytes if isinstance(image, np.ndarray) else len(image) for image in images]
        return super().placement(indices)._replace(size=np.array(sizes, dtype=np.int64))


def checked_labels(
    name: str, labels: Labels, images: int, classes: ClassNames = None
) -> tuple[np.ndarray | None, ClassNames]:
    """int64 labels, -1 for none, and the classes that they number, or twice None where no image has a label.

    Without `classes` they are `numbered_classes`; `name` is the source's, for messages.

    Raises SourceError: labels that are not one whole number from -1 an image, or number no class.
    """
    given = np.asarray(labels)
    if given.shape != (images,) or (given.dtype.kind not in "iu" and images):
        what = f"the labels are {given.dtype} {given.shape}"
        raise SourceError(f"{name}: {what}; expected {images} whole numbers from 0, -1 where an image has none")
    least, largest = (int(given.min()), int(given.max())) if images else (-1, -1)
    if least < -1:
        raise SourceError(f"{name}: there is a label {least}; labels count classes from 0, -1 where an image has none")
    if largest < 0:
        return None, None
    classes = numbered_classes(name, largest, images) if classes is None else classes
    if largest >= len(classes):
        raise SourceError(f"{name}: there is a label {largest}, but {count(len(classes), 'class')}; check the labels")
    return given.astype(np.int64), classes


def labels_or_sets(name: str, labels: Any, images: int) -> tuple[np.ndarray | None, ClassNames, LabelSets | None]:
    """Labels and classes as `checked_labels` has them, also of an array N x 1; of one N x K the sets, and no labels.

    Such an array has a column for each class, "0" to "K - 1": 1 for "yes", 0 or -1 ("uncertain") for "no". A row of -1
    alone has no labels. Raises SourceError: other numbers or another shape.
    """
    given = np.asarray(labels)
    if given.ndim and given.size == len(given):
        return *checked_labels(name, given.reshape(-1), images), None
    if given.ndim != 2:
        return *checked_labels(name, given, images), None
    what = f"{name}: the labels are {given.dtype} {given.shape}"
    expected = f"several labels an image are {images} rows of 0 and 1, a column for each class"
    if given.dtype.kind not in "biuf" or len(given) != images or not given.shape[1]:
        raise SourceError(f"{what}; {expected}")
    others = given[~np.isin(given, (-1, 0, 1))]
    if others.size:
        raise SourceError(f"{what} and hold {others[0]:g}; {expected}")
    table, number = np.unique((given == 1).astype(np.uint8), axis=0, return_inverse=True)
    unknown = (given == -1).all(axis=1)
    sets = LabelSets(np.where(unknown, -1, number.reshape(-1)).astype(np.int64), table)
    return None, tuple(map(str, range(given.shape[1]))), sets


def sets_note(sets: LabelSets | None) -> str:
    """What `describe` says of several labels an image; empty where images have one."""
    if sets is None:
        return ""
    sizes = sets.table.sum(axis=1)[sets.number[sets.number >= 0]]
    if sizes.size and (sizes == 1).all():
        return "several labels an image, but each has one alone: save one number an image if classes exclude each other"
    return f"several labels an image, none in {np.count_nonzero(sizes == 0):,}"


def numbered_classes(name: str, largest: int, images: int) -> tuple[str, ...]:
    """Class names "0" to `largest` for labels that came without any; SourceError above `most_numbered`."""
    if largest >= most_numbered(images):
        raise SourceError(
            f"{name}: the label {largest} would mean {largest + 1:,} classes, of {count(images, 'image')}: "
            "check the labels, and number classes from 0 or name them"
        )
    return tuple(map(str, range(largest + 1)))


def most_numbered(images: int) -> int:
    """How many classes bare numbers may count: some images of a large set keep its numbers, so most may be missing;
    a larger number is a damaged label, or an identifier of something else."""
    return max(_MOST_NUMBERED, images)
