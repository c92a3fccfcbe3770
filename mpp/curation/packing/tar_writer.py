"""One tar shard: written member by member, synced, read back, and only then called by its name."""

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpp.data.sources.base import SourceError
from mpp.data.sources.tar_index import BLOCK, load_index, sidecar_name, write_sidecar
from mpp.errors import RunError

TEMPORARY = ".unfinished"
"""How a shard's name ends while it is written."""
_END = bytes(2 * BLOCK)
_PIECE = 2**20


class Part(NamedTuple):
    """A finished shard."""

    name: str
    images: int
    bytes: int
    sha256: str


class TarWriter:
    """Writes a tar of images with their labels, the same bytes for the same members: no times, no owners.

    Args:
        path: what it is called in the end.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}-{os.getpid()}{TEMPORARY}")
        self._file = self._temporary.open("wb")
        self._digest, self._size = hashlib.sha256(), 0
        self._sizes: list[int] = []
        self._labels: list[int] = []

    def __len__(self) -> int:
        """Images in it."""
        return len(self._sizes)

    @property
    def size(self) -> int:
        """Bytes of the whole file, if it ended here."""
        return self._size + len(_END)

    def add(self, key: str, extension: str, data: bytes, label: int | None) -> None:
        """An image, and its label where it has one.

        Raises:
            OSError: it cannot be written.
        """
        self._member(f"{key}.{extension}", data)
        if label is not None:
            self._member(f"{key}.cls", str(label).encode())
        self._sizes.append(len(data))
        self._labels.append(-1 if label is None else label)

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for piece in (info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)):
            self._write(piece)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> Part:
        """Ends the file, reads it back, gives it its name and writes its index beside it.

        Raises:
            RunError: what was read back differs from what was written.
            OSError: it cannot be written.
        """
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        if sha256(self._temporary) != self._digest.hexdigest():
            raise self._differs("other bytes than were written")
        os.replace(self._temporary, self._path)
        self._check_index()
        return Part(self._path.name, len(self), self._size, self._digest.hexdigest())

    def _check_index(self) -> None:
        try:
            write_sidecar(self._path)
        except SourceError as error:
            raise self._differs(str(error)) from error
        index = load_index(Path(sidecar_name(str(self._path))), self._size)
        if index is None or not (
            np.array_equal(index.sizes, self._sizes) and np.array_equal(index.labels, self._labels)
        ):
            raise self._differs("other members than were written")

    def _differs(self, what: str) -> RunError:
        return RunError(f"{self._path} read back gives {what}; check the disk, and run the same command again")

    def abandon(self) -> None:
        """Removes what is not finished."""
        with contextlib.suppress(OSError):  # a full disk fails again in closing
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def member_bytes(size: int) -> int:
    """What a member of so many bytes takes in a tar."""
    return BLOCK + size + -size % BLOCK


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
