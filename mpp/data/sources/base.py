"""What a source of images is, and the two simplest: lists in memory, and some images of another source."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mpp.data.sources.descriptors import no_more_files
from mpp.data.sources.names import printable
from mpp.errors import Unreachable, UserError

Split = Literal["train", "test"]
_MOST_NUMBERED = 100_000  # ImageNet-21k has 21,841 classes, the largest sets of faces some 90,000


class SourceError(UserError, ValueError):
    """A source that cannot be opened: one line that names the thing, the value, and what to do next."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))  # a path may hold a line break


class SourceAway(SourceError, Unreachable):
    """A source whose store gives no answer, so that it may open in a while."""


class TooLarge(OSError):
    """An image that is not read, for it has more bytes than are allowed or than there is memory for."""


def past_limit(size: int, most: float) -> str:
    """What is wrong with an image of so many bytes."""
    return f"{size / 1e6:,.1f} MB, more than data.max_image_mb {most / 1e6:,.0f} allows"


@runtime_checkable
class Source(Protocol):
    """A map from index to image.

    A source may also have `where(index)`, what names an image in lists; `size(index) -> int`, the bytes that an image
    takes there, known without reading it; `read_many(indices)` and `block(indices)`, where many at once are faster;
    `decoded(index)`, where some of its arrays are final pixels (all as the functions of those names); `original`, the
    source whose images it gives in another form; and `warnings`, lines on what looks like a mistake.
    """

    name: str
    """The string it was opened with."""
    classes: tuple[str, ...] | None
    """Class names by label; None: unlabelled."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """Encoded bytes or an array (H, W) or (H, W, C) of a real dtype, and the label or None.

        Raises:
            OSError: the image cannot be read.
            IndexError: index outside [0, len).
        """
        ...

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 where an image has none, without reading images; None: unlabelled."""
        ...

    def describe(self) -> str:
        """One line: count, classes, what was ignored."""
        ...


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 image`, `12,345 images`, `10 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def summary(images: int, classes: tuple[str, ...] | None, note: str = "") -> str:
    """The line that `describe` gives: `12,345 images in 10 classes; note`."""
    held = (
        f"{count(images, 'image')}, unlabelled"
        if classes is None
        else (f"{count(images, 'image')} in {count(len(classes), 'class')}")
    )
    return f"{held}; {note}" if note else held


def warnings_of(source: Source) -> tuple[str, ...]:
    """What looks like a mistake in a source, a line each."""
    return tuple(getattr(source, "warnings", ()))


def check_index(index: int, length: int) -> int:
    """The index itself; IndexError outside [0, length), so that no source quietly counts from its end."""
    if not 0 <= index < length:
        raise IndexError(f"image {index} of a source of {length}")
    return index


class ListSource:
    """Images held in memory.

    Args:
        images: encoded bytes or arrays (H, W) or (H, W, C) of a real dtype; one array (N, H, W, C) will do.
        labels: one an image, -1 for none; None: unlabelled.
        classes: class names; None: numbers, where there are labels.
        name: what the source is called.
        note: what `describe` adds.
        split: of the source, where it has several.

    Raises:
        SourceError: labels that are not one whole number an image, or name no class.
    """

    def __init__(
        self,
        images: Sequence[bytes | np.ndarray] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        name: str = "list",
        note: str = "",
        split: str = "",
    ) -> None:
        self.name, self.note, self._images = name, note, images
        self._whole = f"the {split} split of {name}" if split else name
        self._labels, self.classes = (
            (None, None) if labels is None else checked_labels(name, labels, len(images), classes)
        )

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        """Which image of the source it is."""
        return f"image {check_index(index, len(self))} of {self._whole}"

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """The image and its label."""
        image = self._images[check_index(index, len(self))]
        label = -1 if self._labels is None else int(self._labels[index])
        return image, None if label < 0 else label

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """Images (B, H, W, C) where they are one array."""
        return self._images[indices] if isinstance(self._images, np.ndarray) else None

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count and classes."""
        return summary(len(self), self.classes, self.note)


class Subset:
    """Some images of another source, in the order of `indices`; the classes stay those of the whole.

    Raises:
        IndexError: an index outside [0, len(source)).
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.name, self.classes = source, source.name, source.classes
        self.warnings = warnings_of(source)
        self.indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(source):
            raise IndexError(f"{source.name}: indices must be in [0, {len(source)})")

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:
        """What the whole source calls the image."""
        inner = int(self.indices[check_index(index, len(self))])
        return where(self.source, inner)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """The image and its label."""
        return self.source.read(int(self.indices[check_index(index, len(self))]))

    def size(self, index: int) -> int:
        """As `size_of` the whole source."""
        return size_of(self.source, int(self.indices[check_index(index, len(self))]))

    def read_many(self, indices: Sequence[int]) -> list[tuple[bytes | np.ndarray, int | None] | OSError]:
        """Several images and labels, or why they cannot be read."""
        return [*read_many(self.source, [int(self.indices[check_index(index, len(self))]) for index in indices])]

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """Images (B, H, W, C) where the whole source holds them in an array."""
        return block(self.source, self.indices[indices])

    def decoded(self, index: int) -> bool:
        """As `decoded` of the whole source."""
        return decoded(self.source, int(self.indices[check_index(index, len(self))]))

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        labels = self.source.labels()
        return None if labels is None else labels[self.indices]

    def describe(self) -> str:
        """One line: how many of how many."""
        return f"{len(self):,} of {self.source.describe()}"


def read_many(
    source: Source, indices: Sequence[int], most: float = math.inf
) -> Iterator[tuple[bytes | np.ndarray, int | None] | OSError]:
    """Several images and labels in the order of `indices`, or why they cannot be read: at once, if the source can.

    Images of more than `most` bytes are not read, and those read at once have no more together.
    """
    at_once = getattr(source, "read_many", None)
    waiting, total = list[int](), 0
    for index in indices:
        size = size_of(source, index) if most < math.inf else 0  # of a file, one more question to its disk
        if size > most or total + size > most:
            yield from _read_at_once(source, waiting)
            waiting, total = [], 0
        if size > most:
            yield TooLarge(past_limit(size, most))
        elif at_once is None:
            yield _read_one(source, index)
        else:
            waiting.append(index)
            total += size
    yield from _read_at_once(source, waiting)


def _read_at_once(source: Any, indices: list[int]) -> Sequence[tuple[bytes | np.ndarray, int | None] | OSError]:
    if not indices:
        return []
    try:
        return source.read_many(indices)
    except MemoryError:
        return [_read_one(source, index) for index in indices]


def _read_one(source: Source, index: int) -> tuple[bytes | np.ndarray, int | None] | OSError:
    try:
        return source.read(index)
    except OSError as error:
        if (limit := no_more_files(error)) is not None:
            raise limit from error
        return error
    except MemoryError:
        return TooLarge("takes more memory than there is")


def block(source: Source, indices: np.ndarray) -> np.ndarray | None:
    """The pixels of several images at once, uint8 (B, H, W, C), where the source holds all of them in an array."""
    whole = getattr(source, "block", None)
    found = whole(indices) if whole else None
    return found if found is not None and found.dtype == np.uint8 and found.ndim == 4 else None


def decoded(source: Source, index: int) -> bool:
    """Whether what `read` gives of an image is its final pixels, already scaled to their range."""
    of_image = getattr(source, "decoded", None)
    return of_image is not None and of_image(index)


def size_of(source: Source, index: int) -> int:
    """Bytes that an image takes where it lies, known without reading it; 0 where the source does not say."""
    size = getattr(source, "size", None)
    return size(index) if size else 0


def where(source: Source, index: int) -> str:
    """What names an image in lists and messages: the path of its file as the system takes it, which `printable` brings
    into one line; of one that is no file of its own, which one it is of which file, or of the source."""
    of_image = getattr(source, "where", None)
    return of_image(index) if of_image else f"image {index} of {source.name}"


def checked_labels(
    name: str, labels: Sequence[int] | np.ndarray, images: int, classes: tuple[str, ...] | None = None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """int64 labels, -1 for none, and the classes that they number, or twice None where no image has a label.

    Args:
        name: of the source, for messages.
        labels: one an image.
        images: how many there are.
        classes: class names; None: `numbered_classes`.

    Raises:
        SourceError: labels that are not one whole number from -1 an image, or number no class.
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


def numbered_classes(name: str, largest: int, images: int) -> tuple[str, ...]:
    """Class names "0" to `largest` for labels that came without any.

    Raises:
        SourceError: more classes than `most_numbered`.
    """
    if largest >= most_numbered(images):
        raise SourceError(
            f"{name}: the label {largest} would mean {largest + 1:,} classes, of {count(images, 'image')}: "
            "check the labels, and number classes from 0 or name them"
        )
    return tuple(map(str, range(largest + 1)))


def most_numbered(images: int) -> int:
    """How many classes bare numbers may count.

    Some images of a large set keep its numbers, so that most of the classes may be missing; a number beyond every such
    set is a damaged label, or an identifier of something else.
    """
    return max(_MOST_NUMBERED, images)
