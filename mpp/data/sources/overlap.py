"""Images that two sources share: the very same files, members or rows, and others that are equal byte for byte.

where each image lies, and its size, without reading it -> the same places
of the others those whose size occurs on both sides     -> read and hashed, within limits -> equal bytes
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpp.data.sources.base import UNKNOWN, Placement, Source, count, image_digest
from mpp.data.sources.names import printable
from mpp.system.progress import Progress

MOST_IMAGES, MOST_BYTES = 100_000, 2**31
"""At most so much is read for a comparison."""
_AT_ONCE = 64  # images that are read together


class Shared(NamedTuple):
    """How many of some test images another source holds, too."""

    tested: int
    places: int
    """The very same file, member or row, however it was named."""
    copies: int
    """Others that are equal byte for byte."""
    unread: int
    """Those that could be equal, for there are images of their size, and were not read."""
    example: str
    """One that is shared, and where it lies there; empty: none."""

    @property
    def found(self) -> int:
        """How many are shared, as far as they were compared."""
        return self.places + self.copies

    @property
    def all_of_them(self) -> bool:
        """Whether the other source is, or holds, all test images."""
        return 0 < self.tested == self.found

    def sentences(self, there: str) -> list[str]:
        """How many are in `there`, and how many were not compared; none where nothing is to be said."""
        lines, tested = [], count(self.tested, "test image")
        if self.found:
            ways = ((self.places, "as the same files"), (self.copies, "byte for byte"))
            which = " and ".join(f"{number:,} {way}" for number, way in ways if number)
            lines.append(f"{self.found:,} of the {tested} are in {there}, {which}, such as {self.example}")
        if self.unread:
            lines.append(
                f"{self.unread:,} of the {tested} were not compared with {there} byte for byte: that "
                f"reads up to {MOST_IMAGES:,} images and {MOST_BYTES / 2**30:g} GiB, and none of remote shards"
            )
        return lines


def shared(test: Source, indices: np.ndarray, there: Source) -> Shared:
    """Which images of a test, int64 (n,), are also in another source."""
    ours, theirs = test.placement(indices), there.placement(np.arange(len(there)))
    same = (ours.place != UNKNOWN) & np.isin(ours.place, theirs.place)
    alike = ~same & (ours.size >= 0) & np.isin(ours.size, theirs.size)
    read = _affordable(ours, theirs, np.flatnonzero(alike & ours.local))
    digests = dict[bytes, int]()
    for index, digest in _digests(there, np.flatnonzero(theirs.local & np.isin(theirs.size, ours.size[read]))):
        digests.setdefault(digest, index)
    pairs = {index: digests[digest] for index, digest in _digests(test, indices[read]) if digest in digests}
    copies = len(pairs)
    # An image that may also be equal to one of a remote shard was not compared with all there is.
    remote = np.isin(ours.size, theirs.size[~theirs.local]) & ~np.isin(indices, list(pairs))
    compared = np.isin(np.arange(len(indices)), read) & ~remote
    if same.any():
        row = int(np.flatnonzero(same)[0])
        pairs = {int(indices[row]): int(np.flatnonzero(theirs.place == ours.place[row])[0])} | pairs
    example = ""
    for index, other in list(pairs.items())[:1]:
        example = " = ".join(dict.fromkeys((printable(test.location(index)), printable(there.location(other)))))
    return Shared(len(indices), int(same.sum()), copies, int((alike & ~compared).sum()), example)


def same_places(one: Source, other: Source) -> bool:
    """Whether both hold the same files, members or rows in the same order, as far as three of them tell."""
    last = len(one) - 1
    if len(one) != len(other) or last < 0:
        return False
    some = np.array([0, last // 2, last])
    ours, theirs = one.placement(some).place, other.placement(some).place
    return bool((ours != UNKNOWN).all() and (ours == theirs).all())


def _affordable(ours: Placement, theirs: Placement, rows: np.ndarray) -> np.ndarray:
    """Of these images, as many as may be read with all those of their sizes there; drawn evenly, by a fixed seed."""
    rows = np.random.default_rng(0).permutation(rows)
    sizes = ours.size[rows]
    there, number = np.unique(theirs.size[theirs.local], return_counts=True)
    number_of = dict(zip(there.tolist(), number.tolist(), strict=True))
    others = np.array([number_of.get(size, 0) for size in sizes.tolist()], dtype=np.int64)
    first = np.isin(np.arange(len(rows)), np.unique(sizes, return_index=True)[1])
    images = 1 + np.where(first, others, 0)  # those of one size are read once
    within = (np.cumsum(images) <= MOST_IMAGES) & (np.cumsum(images * sizes) <= MOST_BYTES)
    return np.sort(rows[within & (others > 0)])


def _digests(source: Source, indices: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Each image's index, and a hash of its bytes; those that cannot be read are passed over."""
    with Progress("comparing images", len(indices)) as progress:
        for start in range(0, len(indices), _AT_ONCE):
            some = indices[start : start + _AT_ONCE].tolist()
            for index, found in zip(some, source.read_many(some), strict=True):
                if not isinstance(found, OSError):
                    yield index, image_digest(found[0])
            progress.add(len(some))
