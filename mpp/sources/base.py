"""What a source of images is, and the two simplest: files on disk and lists in memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from mpp.errors import UserError

Split = Literal["train", "test"]


class SourceError(UserError, ValueError):
    """A source that cannot be opened: one line that names the thing, the value, and what to do next."""


@runtime_checkable
class Source(Protocol):
    """A map from index to image.

    A source may also have `where(index) -> str`, the file or member that a bad image is reported by.
    """

    name: str
    """The string it was opened with."""
    classes: tuple[str, ...] | None
    """Class names by label; None: unlabelled."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """Encoded bytes or a uint8 array (H, W) or (H, W, C), and the label or None.

        Raises:
            OSError: the image cannot be read.
            IndexError: index outside [0, len).
        """
        ...

    def labels(self) -> np.ndarray | None:
        """int64 (len,), without reading images; None: unlabelled."""
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


def check_index(index: int, length: int) -> int:
    """The index itself; IndexError outside [0, length), so that no source quietly counts from its end."""
    if not 0 <= index < length:
        raise IndexError(f"image {index} of a source of {length}")
    return index


class PathTable:
    """Very many paths in two buffers.

    A million Python strings would cost each forked worker a copy of their pages as soon as it counts references.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([0, *(len(path) for path in encoded)], dtype=np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class FileSource:
    """One image a file.

    Args:
        name: the string it was opened with.
        root: the folder that the paths start from.
        paths: relative to root.
        labels: one a path, or None.
        classes: class names; None: unlabelled.
        note: what `describe` adds.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[str],
        labels: Sequence[int] | np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        note: str = "",
    ) -> None:
        self.name, self.root, self.classes, self.note = name, root, classes, note
        self._paths = PathTable(paths)
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self._paths[index])

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The file's bytes and its label."""
        path = self.root / self._paths[index]
        return path.read_bytes(), None if self._labels is None else int(self._labels[index])

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count, classes, what was ignored."""
        return summary(len(self), self.classes, self.note)


class ListSource:
    """Images held in memory.

    Args:
        images: encoded bytes or uint8 arrays (H, W) or (H, W, C); one array (N, H, W, C) will do.
        labels: one an image, or None.
        classes: class names; None: numbers, where there are labels.
        name: what the source is called.
        note: what `describe` adds.
    """

    def __init__(
        self,
        images: Sequence[bytes | np.ndarray] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        name: str = "list",
        note: str = "",
    ) -> None:
        self.name, self.note, self._images = name, note, images
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = None if self._labels is None else (classes or numbered_classes(self._labels))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """The image and its label."""
        image = self._images[check_index(index, len(self))]
        return image, None if self._labels is None else int(self._labels[index])

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
        self.indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(source):
            raise IndexError(f"{source.name}: indices must be in [0, {len(source)})")

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:
        """What the whole source calls the image."""
        inner = int(self.indices[check_index(index, len(self))])
        return place(self.source, inner) or f"image {inner}"

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """The image and its label."""
        return self.source.read(int(self.indices[check_index(index, len(self))]))

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        labels = self.source.labels()
        return None if labels is None else labels[self.indices]

    def describe(self) -> str:
        """One line: how many of how many."""
        return f"{len(self):,} of {self.source.describe()}"


def place(source: Source, index: int) -> str:
    """The file or member that an image lies in; empty where the source does not say."""
    where = getattr(source, "where", None)
    return where(index) if where else ""


def numbered_classes(labels: np.ndarray) -> tuple[str, ...]:
    """Class names "0" to "n-1" for labels that came without any."""
    return tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1))
