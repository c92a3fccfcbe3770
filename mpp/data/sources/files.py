"""Images that are files on the disk, one each."""

import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mpp.data.sources.base import UNKNOWN, ClassNames, Labels, LabelSets, Placement, Source, check_index, spread
from mpp.data.sources.names import printable

_PIECE, _THREADS = 1000, 16  # of files that are asked for at once, since a network disk answers late
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


class NotAFile(OSError):
    """A path that is no regular file: the text says what it is instead."""


class Outside(OSError):
    """A path that leaves the folder of the data set that names it."""


def within(path: str, folders: Iterable[str]) -> bool:
    """Whether a file lies in one of the folders, once all links are followed."""
    if "\0" in path:  # which no name has, and the system's functions raise a ValueError for
        return False
    real = os.path.realpath(path)
    return any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in folders)  # noqa: PTH118


def read_file(path: str) -> bytes:
    """A regular file's bytes; anything else is never opened, for opening a FIFO waits for a writer.

    Raises:
        NotAFile: a FIFO, a socket, a device or a folder.
        OSError: it cannot be read.
    """
    _check_regular(path, os.stat(path).st_mode)  # noqa: PTH116 - a Path for each read costs more than the question
    # It may have become another since: opened without waiting, and asked again.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
        return file.readall()


def _check_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFile(f"{printable(path)} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file")


def file_size(path: str) -> int:
    """A file's bytes; 0 where it cannot be asked."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - as above
    except OSError:
        return 0


def file_state(path: str | os.PathLike[str], times: bool) -> str:
    """Size of a file, and with `times` its time of modification."""
    try:
        info = os.stat(path)  # noqa: PTH116 - as above
    except OSError as error:  # gone since the source was opened: reading it says so
        return f"error {error.errno}"
    return f"{info.st_size} {info.st_mtime_ns}" if times else str(info.st_size)


def file_place(path: str) -> tuple[int, int]:
    """A number that a file has by whichever link or spelling of its path, and its size; UNKNOWN where it is gone."""
    try:
        info = os.stat(path)  # noqa: PTH116 - as above
    except OSError:
        return UNKNOWN, UNKNOWN
    return hash((info.st_dev, info.st_ino)), info.st_size


def file_places(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`file_place` of many files: int64 (n,) each."""
    pieces = [paths[start : start + _PIECE] for start in range(0, len(paths), _PIECE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [each for piece in pool.map(lambda piece: [*map(file_place, piece)], pieces) for each in piece]
    places, sizes = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return places, sizes


class PathTable:
    """Very many paths in two buffers.

    A million Python strings would cost each forked worker a copy of their pages as soon as it counts references.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        for path in paths:
            self.append(path)

    def append(self, path: str) -> None:
        """Adds a path at the end."""
        self._text += path.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    def names(self) -> tuple[bytes, bytes]:
        """All paths in order, end to end, and where each ends."""
        return bytes(self._text), np.asarray(self._ends, dtype="<i8").tobytes()


class FileSource(Source):
    """One image a file: `paths` are relative to root, or absolute; read once, in order. `groups` and `sets` as the
    methods give them; the rest as of every source.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[str],
        labels: Labels | None = None,
        classes: ClassNames = None,
        note: str = "",
        groups: PathTable | None = None,
        sets: LabelSets | None = None,
    ) -> None:
        super().__init__(name, None if labels is None else np.asarray(labels, dtype=np.int64), classes, note, sets)
        self._groups = groups
        self.root, self._folder = root, str(root)
        self._paths = paths if isinstance(paths, PathTable) else PathTable(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> bytes:
        return read_file(self.location(index))

    def location(self, index: int) -> str:
        return os.path.join(self._folder, self._paths[index])  # noqa: PTH118 - a million of them

    def record(self, index: int) -> str:
        return self._paths[index]

    def groups(self) -> Sequence[str] | None:
        return None if self._groups is None else [*self._groups]

    def size(self, index: int) -> int:
        return file_size(self.location(index))

    def placement(self, indices: np.ndarray) -> Placement:
        places, sizes = file_places([self.location(index) for index in indices.tolist()])
        return super().placement(indices)._replace(place=places, size=sizes)

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        yield str(self.root.resolve()) if times else ""
        if most is not None:
            yield from self._names()
        for index in spread(np.arange(len(self)), most):
            path = self.location(index)
            yield path.removeprefix(self._folder).removeprefix(os.sep) if most is None else ""
            yield file_state(path, times)

    def _names(self) -> tuple[bytes, bytes]:
        """As `PathTable.names`, of paths relative to root where they lie below it; where all are absolute and lie
        elsewhere, to the folder that they share."""
        above, paths = self._folder + os.sep, self._paths
        if all(path.startswith(os.sep) for path in paths) and not all(path.startswith(above) for path in paths):
            above = os.path.commonpath([os.path.dirname(path) for path in (min(paths), max(paths))])  # noqa: PTH120
        elif above.encode("utf-8", "surrogateescape") not in paths.names()[0]:
            return paths.names()
        return PathTable(path.removeprefix(above).removeprefix(os.sep) for path in paths).names()
