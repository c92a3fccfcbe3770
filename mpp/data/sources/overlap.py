"""Images that two sources share: the very same files, members or rows, and others that are equal byte for byte.

where each image lies, and its size, without reading it -> the same places
of the others those whose size occurs on both sides     -> read and hashed, within limits -> equal bytes
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mpp.data.sources.array import ArraySource
from mpp.data.sources.base import ListSource, Source, Subset, count, read_many, where
from mpp.data.sources.files import FileSource
from mpp.data.sources.hub import HubSource
from mpp.data.sources.local_shards import LocalFile, ShardSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.names import printable
from mpp.data.sources.remote import RemoteFile

MOST_IMAGES, MOST_BYTES = 100_000, 2**31
"""At most so much is read for a comparison."""
_NOWHERE = -1  # as a place: in memory, or gone
_PIECE, _THREADS = 1000, 16  # of files that are asked for at once, since a network disk answers late
_AT_ONCE = 64  # images that are read together


class Shared(NamedTuple):
    """Which of some images another source holds, too."""

    tested: int
    """How many were looked for."""
    places: int
    """Of these, the very same file, member or row, however it was named."""
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
        """Whether the other source is, or holds, all that was looked for."""
        return 0 < self.tested == self.found

    def sentences(self, there: str) -> list[str]:
        """How many are in `there`, and what was not compared; none where nothing is to be said."""
        lines, tested = [], count(self.tested, "test image")
        if self.found:
            which = f"{self.places:,} as the same files" if self.places else ""
            which += " and " if self.places and self.copies else ""
            which += f"{self.copies:,} byte for byte" if self.copies else ""
            lines.append(f"{self.found:,} of the {tested} are in {there}, {which}, such as {self.example}")
        if self.unread:
            lines.append(
                f"{self.unread:,} of the {tested} were not compared with {there} byte for byte: that "
                f"reads up to {MOST_IMAGES:,} images and {MOST_BYTES / 2**30:g} GiB, and none of remote shards"
            )
        return lines


class _Facts(NamedTuple):
    """Of each image, without reading it."""

    place: np.ndarray
    """int64: equal where it is the same file, member or row; _NOWHERE: unknown."""
    size: np.ndarray
    """int64: bytes, -1 where it is unknown."""
    near: np.ndarray
    """bool: reading it asks no server."""


def shared(test: Source, indices: np.ndarray, there: Source) -> Shared:
    """Which images of a test are also in another source.

    Args:
        test: where the images are.
        indices: int64 (n,), which of its images.
        there: where they are looked for.
    """
    ours, theirs = _facts(test, indices), _facts(there, np.arange(len(there)))
    same = (ours.place != _NOWHERE) & np.isin(ours.place, theirs.place)
    alike = ~same & (ours.size >= 0) & np.isin(ours.size, theirs.size)
    read = _affordable(ours, theirs, np.flatnonzero(alike & ours.near))
    held: dict[bytes, int] = {}
    sizes = ours.size[read]
    for index, digest in _digests(there, np.flatnonzero(theirs.near & np.isin(theirs.size, sizes))):
        held.setdefault(digest, index)
    known = {index: held[digest] for index, digest in _digests(test, indices[read]) if digest in held}
    # What may also be equal to one that lies far away was not compared with all there is.
    far = np.isin(ours.size, theirs.size[~theirs.near])
    done = np.zeros(len(indices), dtype=bool)
    done[read] = True
    done &= ~far | np.isin(indices, list(known))
    if same.any():
        row = int(np.flatnonzero(same)[0])
        known = {int(indices[row]): int(np.flatnonzero(theirs.place == ours.place[row])[0])} | known
    example = ""
    if known:
        index, other = next(iter(known.items()))
        example = " = ".join(dict.fromkeys((printable(where(test, index)), printable(where(there, other)))))
    copies = len(known) - int(same.any())
    return Shared(len(indices), int(same.sum()), copies, int((alike & ~done).sum()), example)


def same_places(one: Source, other: Source) -> bool:
    """Whether both hold the same files, members or rows in the same order, as far as three of them tell."""
    last = len(one) - 1
    if len(one) != len(other) or last < 0:
        return False
    some = np.array([0, last // 2, last])
    ours, theirs = (_facts(source, some).place for source in (one, other))
    return bool((ours != _NOWHERE).all() and (ours == theirs).all())


def _facts(source: Source, indices: np.ndarray) -> _Facts:
    original = getattr(source, "original", None)
    if original is not None:
        return _facts(original, indices)
    if isinstance(source, Subset):
        return _facts(source.source, source.indices[indices])
    if isinstance(source, MixtureSource):
        return _of_mixture(source, indices)
    places, sizes = np.full((2, len(indices)), -1, dtype=np.int64)
    near = np.ones(len(indices), dtype=bool)
    if isinstance(source, FileSource):
        places, sizes = _of_files([source.where(index) for index in indices.tolist()])
    elif isinstance(source, ShardSource):
        shards, starts, sizes = source.extents(indices)
        origins = [_origin(origin) for origin in source.origins]
        of = zip(shards.tolist(), starts.tolist(), strict=True)
        places = np.array([hash((origins[shard], start)) for shard, start in of], dtype=np.int64)
        near = np.array([tar is not None for tar in source.tars])[shards]
    elif isinstance(source, ArraySource):
        file = _state(str(source.path))[0]
        places = np.array([hash((file, index)) for index in indices.tolist()], dtype=np.int64)
        sizes[:] = source.read(0)[0].nbytes
    elif isinstance(source, HubSource):
        sizes = source.sizes()[indices]
        rows = [hash((source.arrow_fingerprint, index)) for index in indices.tolist()]
        places, apart = np.array(rows, dtype=np.int64), np.flatnonzero(sizes < 0)
        paths = [source.file_of(int(indices[row])) or "" for row in apart]
        places[apart], sizes[apart] = _of_files([path if source.inside(path) else "" for path in paths])
    elif isinstance(source, ListSource):
        images = (source.read(index)[0] for index in indices.tolist())
        sizes = np.array([image.nbytes if isinstance(image, np.ndarray) else len(image) for image in images])
    return _Facts(places, sizes.astype(np.int64), near)


def _of_mixture(source: MixtureSource, indices: np.ndarray) -> _Facts:
    places, sizes = np.full((2, len(indices)), -1, dtype=np.int64)
    facts = _Facts(places, sizes, np.ones(len(indices), dtype=bool))
    of, inner = source.places(indices)
    for part in np.unique(of).tolist():
        rows = np.flatnonzero(of == part)
        for whole, some in zip(facts, _facts(source.parts[part], inner[rows]), strict=True):
            whole[rows] = some
    return facts


def _of_files(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Places and sizes."""
    if not paths:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    pieces = [paths[start : start + _PIECE] for start in range(0, len(paths), _PIECE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [state for piece in pool.map(lambda piece: [*map(_state, piece)], pieces) for state in piece]
    places, sizes = np.array(found, dtype=np.int64).T
    return places, sizes


def _state(path: str) -> tuple[int, int]:
    """Of a file, the same by whichever link or spelling of its path; and its size."""
    try:
        info = os.stat(path)  # noqa: PTH116 - a Path for each of a million files takes longer than the question
    except OSError:
        return _NOWHERE, -1
    return hash((info.st_dev, info.st_ino)), info.st_size


def _origin(origin: object) -> int:
    if isinstance(origin, LocalFile):
        return _state(str(origin.path))[0]
    return hash(origin.named) if isinstance(origin, RemoteFile) else _NOWHERE


def _affordable(ours: _Facts, theirs: _Facts, rows: np.ndarray) -> np.ndarray:
    """Of these images, as many as may be read with all those of their sizes there; drawn evenly, by a fixed seed."""
    rows = np.random.default_rng(0).permutation(rows)
    sizes = ours.size[rows]
    there, number = np.unique(theirs.size[theirs.near], return_counts=True)
    others = np.zeros(len(rows), dtype=np.int64)
    if len(there):
        at = np.minimum(np.searchsorted(there, sizes), len(there) - 1)
        others = np.where(there[at] == sizes, number[at], 0)
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(sizes, return_index=True)[1]] = True
    images = 1 + np.where(first, others, 0)  # those of one size are read once
    within = (np.cumsum(images) <= MOST_IMAGES) & (np.cumsum(images * sizes) <= MOST_BYTES)
    return np.sort(rows[within & (others > 0)])


def _digests(source: Source, indices: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Each image's index, and a hash of its bytes; those that cannot be read are passed over."""
    for start in range(0, len(indices), _AT_ONCE):
        some = indices[start : start + _AT_ONCE].tolist()
        for index, found in zip(some, read_many(source, some), strict=True):
            if not isinstance(found, OSError):
                yield index, _digest(found[0])


def _digest(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, np.ndarray):
        image = f"{image.dtype} {image.shape} ".encode() + np.ascontiguousarray(image).tobytes()
    return hashlib.sha1(image, usedforsecurity=False).digest()
