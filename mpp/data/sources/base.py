"""The interface of a source of images, and some images of another source."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mpp.data.sources.descriptors import no_more_files
from mpp.data.sources.names import printable
from mpp.errors import Unreachable, UserError

Sample = tuple[bytes | np.ndarray, int | None]
"""Encoded bytes or an array (H, W) or (H, W, C) of a real dtype, and the label or None."""
Labels = Sequence[int] | np.ndarray
"""Whole numbers, one an image."""
ClassNames = tuple[str, ...] | None
"""By label; None: unlabelled."""

UNKNOWN = -1
"""In a `Placement`: of an image in memory, or gone."""
_QUICK = 1000  # images whose sizes a quick fingerprint asks for


class SourceError(UserError, ValueError):
    """A source that cannot be opened: one line that names the thing, the value, and what to do next."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))  # a path may hold a line break


class SourceAway(SourceError, Unreachable):
    """A source whose store gives no answer, so that it may open in a while."""


def opening_error(text: str, cause: Exception) -> SourceError:
    """The error to raise where a source cannot be opened: SourceAway where its store gives no answer."""
    return (SourceAway if isinstance(cause, Unreachable) else SourceError)(text)


class TooLarge(OSError):
    """An image that is not read, for it has more bytes than are allowed or than there is memory for."""


class LabelSets(NamedTuple):
    """Several labels an image, or none."""

    number: np.ndarray
    """int64 (n,): the row of `table` that an image has; -1: it has no labels that are known."""
    table: np.ndarray
    """uint8 (sets, classes): 1 where a set has the class. No row comes twice."""


class Placement(NamedTuple):
    """Where images lie, known without reading them."""

    place: np.ndarray
    """int64: equal where it is the same file, member or row; UNKNOWN."""
    size: np.ndarray
    """int64, bytes; UNKNOWN."""
    local: np.ndarray
    """bool: reading it asks no server."""


class Source(ABC):
    """A map from index to image. A new kind of source defines `__len__` and `image`; all else has a default.

    Args:
        name: the string it was opened with.
        labels: whole numbers (len,), -1 where an image has none; None: unlabelled.
        classes: class names by label; None: unlabelled.
        note: what `describe` adds.
        sets: as `label_sets` gives them.
    """

    warnings: tuple[str, ...] = ()
    """What looks like a mistake, a line each."""
    weights: tuple[float, ...] | None = None
    """Of a mixture, how often images of its parts are drawn."""
    reads_together = False
    """Whether `_read_together` is faster than one image after the other."""
    _kind = ""
    """The name of the class in fingerprints, where it once had another."""

    def __init__(
        self,
        name: str,
        labels: np.ndarray | None = None,
        classes: ClassNames = None,
        note: str = "",
        sets: LabelSets | None = None,
    ) -> None:
        self.name, self.classes, self.note, self._labels, self._sets = name, classes, note, labels, sets

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> bytes | np.ndarray:
        """Encoded bytes or an array (H, W) or (H, W, C) of a real dtype; OSError where it cannot be read."""

    def label(self, index: int) -> int | None:
        """The label of an image; None where it has none."""
        label = -1 if self._labels is None else int(self._labels[index])
        return None if label < 0 else label

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 where an image has none, without reading images; None: unlabelled."""
        return None if self._labels is None else self._labels.astype(np.int64, copy=False)

    def label_sets(self) -> LabelSets | None:
        """The classes of each image where it may have several; such a source has no `labels`. None: of others."""
        return self._sets

    def groups(self) -> Sequence[str] | None:
        """The group that each image belongs to, such as its scene or patient, "" where it has none; None: no groups."""
        return None

    def describe(self) -> str:
        """One line: count, classes, what was ignored."""
        return summary(len(self), self.classes, self.note)

    def location(self, index: int) -> str:
        """Names an image in lists and messages: its file as the system takes it (see `printable`), or its place."""
        return f"image {check_index(index, len(self))} of {self.name}"

    def record(self, index: int) -> str:
        """The name of an image within the source, in which a pattern finds its group."""
        return self.location(index)

    def size(self, index: int) -> int:
        """Bytes that an image takes where it lies, known without reading it; 0 where that is unknown."""
        return 0

    def decoded(self, index: int) -> bool:
        """Whether `read` gives the final pixels of an image, already scaled to their range."""
        return False

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """Several images at once, uint8 (B, H, W, C), where the source holds all of them in one array."""
        return None

    def read(self, index: int) -> Sample:
        """An image and its label. OSError where the image cannot be read, IndexError outside [0, len)."""
        return self.image(check_index(index, len(self))), self.label(index)

    def read_many(self, indices: Sequence[int], most: float = math.inf) -> Iterator[Sample | OSError]:
        """Several images and labels in the order of `indices`, or why they cannot be read.

        Images of more than `most` bytes are not read, and those read together have no more in all.
        """
        waiting, total = list[int](), 0
        for index in indices:
            size = self.size(index) if most < math.inf else 0  # of a file, one more question to its disk
            if size > most or total + size > most:
                yield from self._read_group(waiting)
                waiting, total = [], 0
            if size > most:
                yield TooLarge(past_limit(size, most))
            elif self.reads_together:
                waiting.append(index)
                total += size
            else:
                yield self._read_or_error(index)
        yield from self._read_group(waiting)

    def _read_together(self, indices: Sequence[int]) -> list[Sample | OSError]:
        """As `read_many`, at the same time; for sources that set `reads_together`."""
        raise NotImplementedError

    def _read_group(self, indices: Sequence[int]) -> Sequence[Sample | OSError]:
        try:
            return self._read_together(indices) if indices else []
        except MemoryError:
            return [self._read_or_error(index) for index in indices]

    def _read_or_error(self, index: int) -> Sample | OSError:
        try:
            return self.read(index)
        except OSError as error:
            if (limit := no_more_files(error)) is not None:
                raise limit from error
            return error
        except MemoryError:
            return TooLarge("takes more memory than there is")

    def placement(self, indices: np.ndarray) -> Placement:
        """Where these images lie, without reading them."""
        unknown = np.full(len(indices), UNKNOWN, dtype=np.int64)
        return Placement(unknown, unknown, np.ones(len(indices), dtype=bool))

    def fingerprint(self, *, times: bool = True, most: int | None = None, labelled: bool = True) -> str:
        """64 hexadecimal digits that change with any image, label or class name.

        Files, shards and arrays on disk are not read: paths, sizes and times of modification stand for their contents.

        Args:
            times: whether paths and times count; without, only names and sizes do, so that a copy has the same.
            most: how many single images are asked for their size, or read; None: all.
            labelled: whether labels and class names count.
        """
        labels, classes = (self.labels(), self.classes) if labelled else (None, None)
        digest = hashlib.sha256(b"mpp fingerprint 1")
        numbers = b"" if labels is None else np.ascontiguousarray(labels, dtype="<i8").tobytes()
        if labelled and (sets := self.label_sets()) is not None:
            numbers = np.ascontiguousarray(sets.number, dtype="<i8").tobytes() + sets.table.tobytes()
        parts = self._fingerprint_parts(times, most, labelled)
        for part in (self._kind or type(self).__name__, str(len(self)), json.dumps(classes), numbers, *parts):
            data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
            # With its length before it, so that no two sequences of parts are the same bytes.
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def quick_fingerprint(self, labelled: bool = True) -> str:
        """As `fingerprint` without times, in a moment even for millions of files: of sizes, those of 1,000 images."""
        return self.fingerprint(times=False, most=_QUICK, labelled=labelled)

    def listing(self) -> str:
        """How many images, of how many classes, and a quick fingerprint of them."""
        return f"{summary(len(self), self.classes)} with fingerprint {self.quick_fingerprint()[:12]}"

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        """What tells these images from others: by default the images, as `read` gives them."""
        for index in spread(np.arange(len(self)), most):
            try:
                image, label = self.read(index)
            except OSError:
                yield "unreadable"
                continue
            if isinstance(image, np.ndarray):
                yield from (f"{image.dtype.str} {image.shape}", np.ascontiguousarray(image).tobytes())
            else:
                yield from ("bytes", image)
            yield str(label if labelled else None)


class Subset(Source):
    """Some images of another source, in the order of `indices`; the classes stay those of the whole.

    IndexError where an index lies outside [0, len(source)).
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        labels = source.labels()
        self.source, self.warnings = source, source.warnings
        self.indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(source):
            raise IndexError(f"{source.name}: indices must be in [0, {len(source)})")
        super().__init__(source.name, None if labels is None else labels[self.indices], source.classes)

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> bytes | np.ndarray:
        return self.source.image(self._inner(index))

    def _inner(self, index: int) -> int:
        return int(self.indices[check_index(index, len(self))])

    def label_sets(self) -> LabelSets | None:
        sets = self.source.label_sets()
        return None if sets is None else sets._replace(number=sets.number[self.indices])

    def groups(self) -> Sequence[str] | None:
        groups = self.source.groups()
        return None if groups is None else [groups[index] for index in self.indices.tolist()]

    def location(self, index: int) -> str:
        return self.source.location(self._inner(index))

    def record(self, index: int) -> str:
        return self.source.record(self._inner(index))

    def size(self, index: int) -> int:
        return self.source.size(self._inner(index))

    def decoded(self, index: int) -> bool:
        return self.source.decoded(self._inner(index))

    def read_many(self, indices: Sequence[int], most: float = math.inf) -> Iterator[Sample | OSError]:
        return self.source.read_many([self._inner(index) for index in indices], most)

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        return self.source.block(self.indices[indices])

    def placement(self, indices: np.ndarray) -> Placement:
        return self.source.placement(self.indices[indices])

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        yield self.source.fingerprint(times=times, most=most, labelled=labelled)
        yield np.ascontiguousarray(self.indices, dtype="<i8").tobytes()

    def describe(self) -> str:
        return f"{len(self):,} of {self.source.describe()}"


def past_limit(size: int, most: float) -> str:
    """What is wrong with an image of so many bytes."""
    return f"{size / 1e6:,.1f} MB, more than data.max_image_mb {most / 1e6:,.0f} allows"


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 image`, `12,345 images`, `10 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def summary(images: int, classes: ClassNames, note: str = "") -> str:
    """The line that `describe` gives: `12,345 images in 10 classes; note`."""
    kind = ", unlabelled" if classes is None else f" in {count(len(classes), 'class')}"
    return count(images, "image") + kind + (f"; {note}" if note else "")


def check_index(index: int, length: int) -> int:
    """The index itself; IndexError outside [0, length), so that no source quietly counts from its end."""
    if not 0 <= index < length:
        raise IndexError(f"image {index} of a source of {length}")
    return index


def spread(indices: np.ndarray, most: int | None) -> list[int]:
    """At most so many of these indices, evenly spread; None: all."""
    if most is not None and len(indices) > most:
        indices = indices[np.linspace(0, len(indices) - 1, most).astype(np.int64)]
    return indices.tolist()


def image_digest(image: bytes | np.ndarray) -> bytes:
    """Return a hash of a file's bytes, or of an array's shape, type and values: 20 bytes."""
    # SHA-1 is twice as fast as BLAKE2 where the processor knows it; else a look at all images would take twice as long.
    if isinstance(image, bytes):
        return hashlib.sha1(image, usedforsecurity=False).digest()
    digest = hashlib.sha1(f"{image.dtype} {image.shape}".encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
