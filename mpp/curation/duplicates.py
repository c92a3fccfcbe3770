"""Images that are there more than once, by the hashes of their files and of their pixels."""

from collections.abc import Iterator, Mapping

import numpy as np

from mpp.curation.scan import BLANK, ScanResult
from mpp.data.sources.base import Source
from mpp.data.sources.names import Split, printable

HEAD = ("group", "split", "index", "class", "bytes", "file")
_LAST = np.iinfo(np.int64).max


class Duplicates:
    """Groups of images with the same pixels, among the good images of all splits of a source.

    Args:
        splits: source and result of the scan of each split, of train first.

    Attributes:
        same_bytes, same_bytes_images: groups of equal files, and the images in them.
        same_pixels, same_pixels_images: groups of equal images in files that are not all equal, and their images.
        conflicts, across: groups whose labels differ; that lie in several splits and are not blank.
        leaked: images of other splits than train that are also in another split.
    """

    def __init__(self, splits: Mapping[Split, tuple[Source, ScanResult]]) -> None:
        self.names = tuple(splits)
        self._splits = list(splits.values())

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(result, name)[result.good] for _, result in self._splits])

        self._index, self._content = joined("indices"), joined("content")
        self._split = np.repeat(np.arange(len(splits)), [np.count_nonzero(result.good) for _, result in self._splits])
        self._label = np.concatenate([_labels(source)[result.indices[result.good]] for source, result in self._splits])
        _, first, group, size = np.unique(joined("pixels"), return_index=True, return_inverse=True, return_counts=True)
        # The images of all groups; groups in the order of their first images.
        rows = np.flatnonzero(size[group] > 1)
        self._rows = rows = rows[np.argsort(first[group[rows]], kind="stable")]
        self._starts = np.flatnonzero(np.diff(first[group[rows]], prepend=-1))
        sizes = np.unique(self._content, return_counts=True)[1]
        self.same_bytes = int(np.count_nonzero(sizes > 1))
        self.same_bytes_images = int(sizes[sizes > 1].sum())
        lowest, highest = self._range(self._content)
        several = lowest != highest
        self.same_pixels = int(np.count_nonzero(several))
        self.same_pixels_images = int(np.diff(self._starts, append=len(rows))[several].sum())
        lowest = self._range(np.where(self._label < 0, _LAST, self._label))[0]
        self.conflicts = np.flatnonzero(lowest < self._range(self._label)[1])
        lowest, highest = self._range(self._split)
        blank = (joined("flags")[rows[self._starts]] & BLANK).astype(bool)
        self.across = np.flatnonzero((lowest != highest) & ~blank)
        members = np.split(self._split[rows], self._starts[1:])
        self.leaked = sum(int(np.count_nonzero(members[number])) for number in self.across)

    def _range(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value of each group."""
        if not len(self._starts):
            return values[:0], values[:0]
        chosen = values[self._rows]
        return np.minimum.reduceat(chosen, self._starts), np.maximum.reduceat(chosen, self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def members(self, group: int) -> Iterator[tuple[int, str, int, str, str, str]]:
        """A row of HEAD for each image of a group, numbered from 0."""
        end = self._starts[group + 1] if group + 1 < len(self) else len(self._rows)
        for row in self._rows[self._starts[group] : end].tolist():
            source, _ = self._splits[int(self._split[row])]
            index, label = int(self._index[row]), int(self._label[row])
            name = source.classes[label] if source.classes and 0 <= label < len(source.classes) else ""
            split = self.names[int(self._split[row])] if len(self._splits) > 1 else ""
            yield group, split, index, name, f"{int(self._content[row]):016x}", source.location(index)

    def rows(self) -> Iterator[tuple[int | str, ...]]:
        """HEAD, and every image that is there more than once."""
        yield HEAD
        for group in range(len(self)):
            yield from self.members(group)

    def shown(self, group: int) -> str:
        """A group in one line: `a/1.png (a) = b/1.png (b)`, the first four."""
        names = [
            f"{printable(file)}{f' ({printable(name)})' if name else ''}{f' of {split}' if split else ''}"
            for _, split, _, name, _, file in self.members(group)
        ]
        return " = ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _labels(source: Source) -> np.ndarray:
    labels = source.labels()
    return np.full(len(source), -1, dtype=np.int64) if labels is None else labels
