"""Images that are files on the disk, one each."""

import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mpp.data.sources.base import check_index, summary
from mpp.data.sources.names import printable


class NotAFile(OSError):
    """A path that is there and is no regular file: its text says what it is instead."""


class Outside(OSError):
    """A path that leaves the folder of the data set that names it: its text says so."""


def within(path: str, folders: Iterable[str]) -> bool:
    """Whether a file lies in one of the folders, once all links are followed."""
    if "\0" in path:  # which no name has, and the system's functions raise a ValueError for
        return False
    real = os.path.realpath(path)
    return any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in folders)  # noqa: PTH118


_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


def _check_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFile(f"{printable(path)} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file")


def read_file(path: str) -> bytes:
    """A regular file's bytes; anything else is never opened, for opening a FIFO waits for a writer.

    Raises:
        NotAFile: a FIFO, a socket, a device or a folder.
        OSError: it cannot be read.
    """
    _check_regular(path, os.stat(path).st_mode)  # noqa: PTH116 - a Path for each read costs more than the question
    # It may have become another since: without waiting, and asked again.
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
        return file.readall()


def file_size(path: str) -> int:
    """A file's bytes; 0 where it cannot be asked."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - as above
    except OSError:
        return 0


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


class PathTable:
    """Very many paths in two buffers, filled as they come.

    A million Python strings would cost each forked worker a copy of their pages as soon as it counts references.
    """

    _PIECE = 65_536

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        self.extend(paths)

    def extend(self, paths: Iterable[str]) -> None:
        """Adds paths at the end."""
        rest = iter(paths)
        while piece := [path.encode("utf-8", "surrogateescape") for path in islice(rest, self._PIECE)]:
            ends = np.cumsum([len(path) for path in piece], dtype=np.int64) + len(self._text)
            self._ends.frombytes(ends.tobytes())
            self._text += b"".join(piece)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def names(self) -> tuple[bytes, bytes]:
        """All paths in order, end to end, and where each ends."""
        return bytes(self._text), np.asarray(self._ends, dtype="<i8").tobytes()

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class FileSource:
    """One image a file.

    Args:
        name: the string it was opened with.
        root: the folder that the paths start from.
        paths: relative to root, or absolute; read once, in order.
        labels: one a path, -1 for none; None: unlabelled.
        classes: class names; None: unlabelled.
        note: what `describe` adds.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[str] | PathTable,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        note: str = "",
    ) -> None:
        self.name, self.root, self.classes, self.note = name, root, classes, note
        self.warnings: tuple[str, ...] = ()
        self._folder = str(root)
        self._paths = paths if isinstance(paths, PathTable) else PathTable(paths)
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        """The image's path, as the system takes it."""
        return os.path.join(self._folder, self._paths[index])  # noqa: PTH118 - a million of them

    def names(self) -> tuple[bytes, bytes]:
        """The paths in order, end to end, and where each ends: relative to root where they lie below it.

        Where all are absolute and lie elsewhere, to the folder that they share.
        """
        above, paths = self._folder + os.sep, self._paths
        if all(path.startswith(os.sep) for path in paths) and not all(path.startswith(above) for path in paths):
            above = os.path.commonpath([os.path.dirname(path) for path in (min(paths), max(paths))])  # noqa: PTH120
        elif above.encode("utf-8", "surrogateescape") not in paths.names()[0]:
            return paths.names()
        return PathTable(path.removeprefix(above).removeprefix(os.sep) for path in paths).names()

    def size(self, index: int) -> int:
        """The file's bytes; 0 where it cannot be asked: reading it says why."""
        return file_size(self.where(index))

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The file's bytes and its label.

        Raises:
            OSError: it cannot be read.
            NotAFile: a FIFO, a socket, a device or a folder, which is never opened.
        """
        label = -1 if self._labels is None else int(self._labels[check_index(index, len(self))])
        return read_file(self.where(index)), None if label < 0 else label

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count, classes, what was ignored."""
        return summary(len(self), self.classes, self.note)
