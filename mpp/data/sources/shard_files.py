"""Tar shards, local or remote, opened: with an index, and unpacked where they are gzipped.

    path or URL  ->  the index of its sidecar or of the cache, or one made by reading the shard once

Nothing is ever extracted: a .tar.gz is unpacked to a .tar as a whole, in the cache, because one cannot read in the
middle of gzip.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpp.data.sources.base import SourceError, opening_error
from mpp.data.sources.files import file_state
from mpp.data.sources.names import printable
from mpp.data.sources.patterns import shown
from mpp.data.sources.remote import TIMEOUT, RemoteFile, fetch_small, open_stream
from mpp.data.sources.tar_index import (
    INDEX_FORMAT,
    BrokenTar,
    TarIndex,
    build_index,
    index_tar,
    load_index,
    sidecar_name,
)
from mpp.system.cache import make_room, shown_size, use
from mpp.system.files import cache_folder, claimed, write_whole

_MOST_UNPACKED = 100  # times the packed size; gzip itself ends at 1,032
_MOST_SMALL = 64 * 2**20  # bytes that anything may unpack to


@dataclass(frozen=True)
class LocalFile:
    """A shard on the local disk."""

    path: Path

    def __str__(self) -> str:
        return printable(str(self.path))

    def state(self, times: bool) -> str:
        """Path, size and time of modification; without `times` name and size."""
        return f"{self.path.resolve() if times else self.path.name} {file_state(self.path, times)}"

    def beside(self, name: str) -> str:
        """Path of another file in the same folder."""
        return str(self.path.parent / name)


@dataclass(frozen=True)
class Shard:
    """One shard, opened: what the user named, the local .tar that is read (None: remote), and its index."""

    origin: LocalFile | RemoteFile
    tar: Path | None
    index: TarIndex


def _cache_key(address: str, *state: object) -> str:
    """Name in the cache for what was made of a file in this state."""
    text = "\0".join(map(str, (address, *state, INDEX_FORMAT)))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def remote_key(file: RemoteFile) -> str:
    """Name in the cache for what was made of a remote file in this state."""
    return _cache_key(file.named, file.size, file.tag)


def open_local(spec: str, path: Path) -> Shard:
    """A local .tar or .tar.gz with its index, from the sidecar, unless it is older than its shard, or the cache.

    Raises SourceError: unreadable, or not a complete tar or gzip file.
    """
    origin = LocalFile(path)
    try:
        info = path.stat()
        sidecar = Path(sidecar_name(str(path)))
        index = load_index(sidecar, info.st_size)
        # Tars come in few sizes: one that was written anew, with other labels, may be as large as before.
        if index is not None and sidecar.stat().st_mtime_ns >= info.st_mtime_ns:
            return Shard(origin, path, index)
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise SourceError(f"{shown(spec)}: cannot read {origin} ({error.strerror}); check its permissions") from error
    key = _cache_key(str(path.resolve()), info.st_size, info.st_mtime_ns)
    if packed:
        return _open_packed(spec, origin, info.st_size, key, lambda: path.open("rb"))
    index = _cached_index(key, info.st_size)
    return Shard(origin, path, index or _index_into_cache(spec, path, key))


def open_remote(spec: str, file: RemoteFile, timeout: float = TIMEOUT) -> Shard:
    """A remote .tar with its index. A .tar.gz is fetched as a whole and unpacked into the cache.

    Raises SourceError: unreadable, or not a complete tar file.
    """
    key = remote_key(file)
    packed = (cache_folder() / f"{key}.tar").is_file()
    index = None if packed else _cached_index(key, file.size)
    if not packed and index is None:
        try:
            with contextlib.suppress(PermissionError):  # as where it is not there
                index = TarIndex.from_bytes(fetch_small(sidecar_name(file.url), timeout) or b"", file.size)
            if index is None:
                with open_stream(file, timeout) as opened:
                    packed = opened.peek(2)[:2] == b"\x1f\x8b"
                    index = None if packed else build_index(opened, file.size)
        except BrokenTar as error:
            raise SourceError(f"{shown(spec)}: {file} is not a complete tar file ({error}); make it again") from error
        except SourceError as error:
            raise SourceError(f"{shown(spec)}: {file}: {error}") from error
        except OSError as error:
            text = f"{shown(spec)}: cannot read {error}; check the connection, then start again"
            raise opening_error(text, error) from error
        if index is not None:
            _cache_index(key, index)
    if index is None:
        return _open_packed(spec, file, file.size, key, lambda: open_stream(file, timeout))
    return Shard(file, None, index)


def _cached_index(key: str, tar_size: int) -> TarIndex | None:
    """As `load_index` from the cache, where it counts as used again."""
    path = cache_folder() / f"{key}.index"
    index = load_index(path, tar_size)
    if index is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
    return index


def _cache_index(key: str, index: TarIndex) -> None:
    """Writes an index into the cache; where that fails, the next start makes it again."""
    with contextlib.suppress(OSError):
        write_whole(cache_folder() / f"{key}.index", index.to_bytes())


def _index_into_cache(spec: str, tar: Path, key: str, called: str = "") -> TarIndex:
    try:
        index = index_tar(tar)
    except SourceError as error:
        raise SourceError(f"{shown(spec)}: {str(error).replace(str(tar), called or str(tar))}") from error
    _cache_index(key, index)
    return index


def _open_packed(
    spec: str, origin: LocalFile | RemoteFile, size: int, key: str, opener: Callable[[], BinaryIO]
) -> Shard:
    """A gzipped tar of `size` bytes, unpacked into the cache as `key` where it is not there yet.

    Raises SourceError: damaged, far too large, no room, or it cannot be read.
    """
    tar = cache_folder() / f"{key}.tar"

    def index_of_whole() -> TarIndex | None:  # only its index says that a .tar is whole
        return load_index(cache_folder() / f"{key}.index", tar.stat().st_size) if tar.is_file() else None

    use(key)
    index = index_of_whole()
    if index is None:
        try:
            with claimed(cache_folder() / f"{key}.lock", wait=True):  # several runs unpack it once
                index = index_of_whole()
                if index is None:
                    _unpack(spec, origin, size, opener, tar)
                    index = _index_into_cache(spec, tar, key, str(origin))
        except SourceError:
            raise
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            what = f"{origin} is not a complete gzip file ({error})"
            raise SourceError(f"{shown(spec)}: {what}; make it again") from error
        except OSError as error:
            if error.errno is None:  # the network's
                text = f"{shown(spec)}: cannot read {error}; check the connection, then start again"
                raise opening_error(text, error) from error
            what = f"cannot unpack {_base_name(origin)} into {cache_folder()} ({error.strerror or error})"
            hint = "set MPP_CACHE to a folder with room, or gunzip the shards"
            raise SourceError(f"{shown(spec)}: {what}; {hint}") from error
    return Shard(origin, tar, index)


def _unpack(spec: str, origin: LocalFile | RemoteFile, size: int, opener: Callable[[], BinaryIO], tar: Path) -> None:
    most = max(_MOST_UNPACKED * size, _MOST_SMALL)
    with opener() as file, gzip.open(file) as packed:
        room = make_room(_unpacked_size(file, size), f"{_base_name(origin)}, unpacked,")

        def write(out: BinaryIO) -> None:
            written = 0
            while data := packed.read(2**20):
                written += len(data)
                if written > most:
                    what = f"{origin} has {shown_size(size)} and unpacks to more than {shown_size(most)}"
                    hint = "if it is right, gunzip it and name the .tar"
                    raise SourceError(f"{shown(spec)}: {what}, which images do not; {hint}")
                if written > room:
                    raise OSError(errno.ENOSPC, f"it unpacks to more than {shown_size(room)}, for which there is room")
                out.write(data)

        write_whole(tar, write)


def _base_name(origin: LocalFile | RemoteFile) -> str:
    return str(origin).rpartition("/")[2]


def _unpacked_size(file: BinaryIO, size: int) -> int:
    """The size to which a gzipped file of `size` bytes unpacks, at least, and where it is whole most likely."""
    file.seek(max(0, size - 4))
    stated = int.from_bytes(file.read(4), "little")  # modulo 4 GiB; anything, where the file was cut off
    file.seek(0)
    stated += max(0, size - stated + 2**31) // 2**32 * 2**32
    return stated if size <= stated <= 4 * size else size  # images hardly shrink
