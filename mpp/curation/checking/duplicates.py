"""Images that are there more than once, by the hashes of their files and of their pixels."""

from collections.abc import Iterator

import numpy as np

from mpp.curation.checking.scan import Tally
from mpp.data.sources.base import Source
from mpp.data.sources.names import printable

HEAD = ("group", "split", "index", "class", "bytes", "file")
TRAIN, TEST = 0, 1


class Duplicates:
    """Groups of images with the same pixels, in the files of a source and of its test split.

    Args:
        splits: source and tally, of train first and then of test where there is one.
    """

    def __init__(self, splits: list[tuple[Source, Tally]]) -> None:
        self.splits = splits
        tallies = [tally for _, tally in splits]
        self._split = np.concatenate([np.full(tally.good.sum(), number) for number, tally in enumerate(tallies)])
        self._index = np.concatenate([tally.indices[tally.good] for tally in tallies])
        self._content = np.concatenate([tally.content[tally.good] for tally in tallies])
        self._label = np.concatenate([_labels(source)[tally.indices[tally.good]] for source, tally in splits])
        pixels = np.concatenate([tally.pixels[tally.good] for tally in tallies])
        self._order, self._starts, self._ends = _runs(pixels)
        order, starts = self._order, self._starts
        own = np.sort(self._content)
        first = _firsts(own)
        sizes = np.diff(np.append(np.flatnonzero(first), len(own)))
        self.same_bytes = int(np.count_nonzero(sizes > 1))
        """Groups of files that are equal."""
        self.same_bytes_images = int(sizes[sizes > 1].sum())
        """Images in them."""
        content, label = self._content[order], self._label[order]
        several = self._reduce(np.minimum, content) != self._reduce(np.maximum, content)
        self.same_pixels = int(np.count_nonzero(several))
        """Groups of images that are equal in files that are not all equal."""
        self.same_pixels_images = int((self._ends - starts)[several].sum())
        """Images in them."""
        low = self._reduce(np.minimum, np.where(label < 0, np.iinfo(np.int64).max, label))
        self.conflicts = np.flatnonzero(low < self._reduce(np.maximum, label))
        """Groups whose labels differ."""
        split = self._split[order]
        self.across = np.flatnonzero(self._reduce(np.minimum, split) != self._reduce(np.maximum, split))
        """Groups that lie in both splits."""
        within = self._reduce(np.add, (split == TEST).astype(np.int64))
        self.test_images = int(within[self.across].sum()) if len(self.across) else 0
        """Images of the test split that the train split holds, too."""

    def _reduce(self, operation: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Over each group, of values in the order of the groups."""
        if not len(self._starts):
            return np.empty(0, dtype=values.dtype)
        edges = np.stack([self._starts, self._ends], axis=1).ravel()
        padded = np.append(values, values[-1:])  # an edge may be the end
        return operation.reduceat(padded, edges)[::2]

    def __len__(self) -> int:
        return len(self._starts)

    def members(self, group: int) -> Iterator[tuple[int, str, int, str, str, str]]:
        """A row of HEAD for each image of a group, numbered from 0."""
        for row in np.sort(self._order[self._starts[group] : self._ends[group]]).tolist():
            source, _ = self.splits[int(self._split[row])]
            index, label = int(self._index[row]), int(self._label[row])
            name = source.classes[label] if source.classes and 0 <= label < len(source.classes) else ""
            split = ("train", "test")[int(self._split[row])] if len(self.splits) > 1 else ""
            file = source.location(index)
            yield group, split, index, name, f"{int(self._content[row]):016x}", file

    def rows(self) -> Iterator[tuple[int | str, ...]]:
        """HEAD, and every image that is there more than once."""
        yield HEAD
        for group in range(len(self)):
            yield from self.members(group)

    def shown(self, group: int) -> str:
        """A group in one line: `a/1.png (a) = b/1.png (b)`, the first four."""
        rows = list(self.members(group))
        names = [
            f"{printable(file)}{f' ({printable(name)})' if name else ''}{f' of {split}' if split else ''}"
            for _, split, _, name, _, file in rows
        ]
        return " = ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _labels(source: Source) -> np.ndarray:
    labels = source.labels()
    return np.full(len(source), -1, dtype=np.int64) if labels is None else labels


def _firsts(ordered: np.ndarray) -> np.ndarray:
    """Where equal values begin: bool (n,)."""
    return np.concatenate([np.ones(min(1, len(ordered)), dtype=bool), ordered[1:] != ordered[:-1]])


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order that brings equal values together, and the bounds in it of those that are there more than once.

    Groups come in the order of their first images.
    """
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(_firsts(values[order]))
    ends = np.append(starts[1:], len(values))
    many = ends - starts > 1
    starts, ends = starts[many], ends[many]
    by_first = np.argsort(order[starts]) if len(starts) else np.empty(0, dtype=np.int64)
    return order, starts[by_first], ends[by_first]
