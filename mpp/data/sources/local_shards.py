"""Tar shards on the local disk, read at random.

    path  ->  its sidecar's index, or the cache's, or one made now  ->  os.pread at offsets

Nothing is ever extracted: a .tar.gz is unpacked to a .tar as a whole, in the cache, because one cannot read in the
middle of gzip.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from mpp.data.sources.base import SourceAway, SourceError, check_index, summary
from mpp.data.sources.descriptors import Descriptors
from mpp.data.sources.names import printable
from mpp.data.sources.patterns import shown
from mpp.data.sources.tar_index import BLOCK, INDEX_FORMAT, TarIndex, index_tar, load_index, sidecar_name
from mpp.errors import Unreachable
from mpp.system.cache import make_room, shown_size, use
from mpp.system.files import cache_folder, claimed, write_whole

_MOST_UNPACKED = 100  # times what it has packed; gzip itself ends at 1,032
_MOST_SMALL = 64 * 2**20  # bytes that anything may unpack to


class Origin(Protocol):
    """What the user named: a local or a remote file."""

    def __str__(self) -> str:
        """For messages."""
        ...

    def state(self, times: bool) -> str:
        """Changes when the file does."""
        ...

    def beside(self, name: str) -> str:
        """Path or URL of another file in the same folder."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A shard on the local disk."""

    path: Path

    def __str__(self) -> str:
        return printable(str(self.path))

    def state(self, times: bool) -> str:
        """Path, size and time of modification; without `times` name and size."""
        name = str(self.path.resolve()) if times else self.path.name
        try:
            info = self.path.stat()
        except OSError as error:  # gone since the source was opened: images that cannot be read are met later
            return f"{name} error {error.errno}"
        return f"{name} {info.st_size} {info.st_mtime_ns}" if times else f"{name} {info.st_size}"

    def beside(self, name: str) -> str:
        """Path of another file in the same folder."""
        return str(self.path.parent / name)


@dataclass(frozen=True)
class Shard:
    """One shard, opened: what it was named as, the local .tar that is read (None: remote), and its index."""

    origin: Origin
    tar: Path | None
    index: TarIndex


class ShardSource:
    """Images inside uncompressed tar files on the local disk.

    Twelve bytes an image in memory, in three arrays.

    Args:
        name: the string it was opened with, fit to be shown.
        shards: in the order of their images.
        classes: class names; None: unlabelled.
        note: what `describe` adds.
    """

    def __init__(self, name: str, shards: Sequence[Shard], classes: tuple[str, ...] | None, note: str) -> None:
        self.name, self.classes, self.note = name, classes, note
        self.warnings: tuple[str, ...] = ()
        self.origins = [shard.origin for shard in shards]
        self.tars = [None if shard.tar is None else str(shard.tar) for shard in shards]
        self._starts = np.cumsum([0, *(len(shard.index.blocks) for shard in shards)])
        self._blocks = np.concatenate([shard.index.blocks for shard in shards])
        self._sizes = np.concatenate([shard.index.sizes for shard in shards])
        labels = [np.maximum(shard.index.labels, -1) for shard in shards] if classes is not None else []
        self._labels = np.concatenate(labels) if labels else None
        self._open = Descriptors(os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._blocks)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Number of the shard, first byte in it, size."""
        shard = int(np.searchsorted(self._starts, check_index(index, len(self)), side="right")) - 1
        return shard, BLOCK * int(self._blocks[index]), int(self._sizes[index])

    def extents(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of the shard, first byte in it and size of each of these images: int64 (n,) each."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, BLOCK * self._blocks[indices].astype(np.int64), self._sizes[indices].astype(np.int64)

    def _label(self, index: int) -> int | None:
        label = -1 if self._labels is None else int(self._labels[index])
        return None if label < 0 else label

    def where(self, index: int) -> str:
        """The shard, and where the image starts in it."""
        shard, start, _ = self._place(index)
        return f"{self.origins[shard]}, byte {start}"

    def size(self, index: int) -> int:
        """The member's bytes."""
        return self._place(index)[2]

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The member's bytes and its label. Positioned reads, so that forked workers may share a descriptor."""
        shard, start, size = self._place(index)
        tar = self.tars[shard]
        assert tar is not None  # a source with remote shards is of another class
        return self._read_local(tar, index, start, size), self._label(index)

    def _read_local(self, tar: str, index: int, start: int, size: int) -> bytes:
        data = os.pread(self._open[tar], size, start)
        if len(data) != size:
            raise OSError(
                f"{self.where(index)}: the shard ends {size - len(data)} bytes early; it changed since indexing"
            )
        return data

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 where an image has none, or None."""
        return None if self._labels is None else self._labels.astype(np.int64)

    def state(self, times: bool) -> Iterator[str]:
        """One string a shard, which changes when the file does: where it lies, its size and its time or etag.

        Without `times` only its name and its size, which survive a copy.
        """
        return (origin.state(times) for origin in self.origins)

    def sizes(self) -> np.ndarray:
        """Encoded bytes of each image: (len,), whole numbers."""
        return self._sizes

    def describe(self) -> str:
        """One line: count, classes, what was ignored."""
        return summary(len(self), self.classes, self.note)


def cache_key(address: str, *state: object) -> str:
    """Name in the cache for what was made of a file in this state."""
    return hashlib.sha256(
        "\0".join(map(str, (address, *state, INDEX_FORMAT))).encode(errors="surrogateescape")
    ).hexdigest()[:32]


def open_local(spec: str, path: Path) -> Shard:
    """A local .tar or .tar.gz with its index, from the sidecar or the cache where they are there.

    A sidecar that is older than its shard is passed over.

    Raises:
        SourceError: unreadable, or not a complete tar or gzip file.
    """
    try:
        info = path.stat()
        sidecar = Path(sidecar_name(str(path)))
        index = load_index(sidecar, info.st_size)
        # Tars come in few sizes: one that was written anew, with other labels, may be as large as before.
        if index is not None and sidecar.stat().st_mtime_ns >= info.st_mtime_ns:
            return Shard(LocalFile(path), path, index)
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise SourceError(
            f"{shown(spec)}: cannot read {LocalFile(path)} ({error.strerror}); check its permissions"
        ) from error
    key = cache_key(str(path.resolve()), info.st_size, info.st_mtime_ns)
    if packed:
        return open_packed(spec, LocalFile(path), info.st_size, key, lambda: path.open("rb"))
    kept = cache_folder() / f"{key}.index"
    index = kept_index(kept, info.st_size) or _index_and_keep(spec, path, kept)
    return Shard(LocalFile(path), path, index)


def open_packed(spec: str, origin: Origin, size: int, key: str, opener: Callable[[], BinaryIO]) -> Shard:
    """A gzipped tar, unpacked into the cache where it is not there yet.

    Args:
        spec: for messages.
        origin: what the user named.
        size: of the gzipped file, in bytes.
        key: of this state of it in the cache.
        opener: opens the gzipped file.

    Raises:
        SourceError: damaged, far too large, no room, or it cannot be read.
    """
    tar, kept = cache_folder() / f"{key}.tar", cache_folder() / f"{key}.index"
    use(key)
    index = load_index(kept, tar.stat().st_size) if tar.is_file() else None
    if index is None:  # also where there is a .tar: only its index says that it is whole
        try:
            with claimed(cache_folder() / f"{key}.lock", wait=True):  # several runs unpack it once
                index = load_index(kept, tar.stat().st_size) if tar.is_file() else None
                if index is None:
                    _unpack(spec, origin, size, opener, tar)
                    index = _index_and_keep(spec, tar, kept, str(origin))
        except SourceError:
            raise
        except OSError as error:
            raise _no_room(spec, origin, error) from error
    return Shard(origin, tar, index)


def _index_and_keep(spec: str, tar: Path, kept: Path, called: str = "") -> TarIndex:
    try:
        index = index_tar(tar)
    except SourceError as error:
        raise SourceError(f"{shown(spec)}: {str(error).replace(str(tar), called) if called else str(error)}") from error
    keep_index(kept, index)
    return index


def kept_index(path: Path, tar_size: int) -> TarIndex | None:
    """As `load_index` from the cache, where it counts as used again."""
    index = load_index(path, tar_size)
    if index is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
    return index


def keep_index(path: Path, index: TarIndex) -> None:
    """Writes an index into the cache. One that cannot be kept costs time at the next start, nothing else."""
    data = index.to_bytes()
    with contextlib.suppress(OSError):
        write_whole(path, lambda file: file.write(data))


def _unpack(spec: str, origin: Origin, size: int, opener: Callable[[], BinaryIO], tar: Path) -> None:
    name = str(origin).rpartition("/")[2]
    most = max(_MOST_UNPACKED * size, _MOST_SMALL)

    def too_large() -> SourceError:
        what = f"{origin} has {shown_size(size)} and unpacks to more than {shown_size(most)}, which images do not"
        return SourceError(f"{shown(spec)}: {what}; if it is right, gunzip it and name the .tar")

    try:
        with opener() as file:
            room = make_room(_unpacked_size(file, size), f"{name}, unpacked,")

            def write(out: BinaryIO) -> None:
                written = 0
                while data := packed.read(2**20):
                    written += len(data)
                    if written > most:
                        raise too_large()
                    if written > room:
                        raise OSError(
                            errno.ENOSPC, f"it unpacks to more than {shown_size(room)}, for which there is room"
                        )
                    out.write(data)

            with gzip.open(file) as packed:
                write_whole(tar, write)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{shown(spec)}: {origin} is not a complete gzip file ({error}); make it again") from error
    except SourceError:
        raise
    except OSError as error:
        if error.errno is None:  # the network's
            kind = SourceAway if isinstance(error, Unreachable) else SourceError
            raise kind(f"{shown(spec)}: cannot read {error}; check the connection, then start again") from error
        raise _no_room(spec, origin, error) from error


def _unpacked_size(file: BinaryIO, size: int) -> int:
    """What a gzipped file of `size` bytes unpacks to, at least, and where it is whole most likely."""
    file.seek(max(0, size - 4))
    said = int.from_bytes(file.read(4), "little")  # modulo 4 GiB; anything, where the file was cut off
    file.seek(0)
    said += max(0, size - said + 2**31) // 2**32 * 2**32
    return said if size <= said <= 4 * size else size  # images hardly shrink


def _no_room(spec: str, origin: Origin, error: OSError) -> SourceError:
    reason = f"cannot unpack {str(origin).rpartition('/')[2]} into {cache_folder()} ({error.strerror or error})"
    hint = "set MPP_CACHE to a folder with room, or gunzip the shards"
    return SourceError(f"{shown(spec)}: {reason}; {hint}")
