"""Tar shards behind URLs, read at random by ranges of bytes.

URL  ->  the cache's index, or its sidecar's, or one made by reading the shard once  ->  ranges, a batch at a time
     ->  (kept on the local disk)
"""

import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

from mpp.data.sources.base import SourceAway, SourceError
from mpp.data.sources.kept import KeptRanges
from mpp.data.sources.local_shards import Shard, ShardSource, cache_key, keep_index, kept_index, open_packed
from mpp.data.sources.patterns import shown
from mpp.data.sources.remote import TIMEOUT, RemoteFile, fetch_ranges, fetch_small
from mpp.data.sources.tar_index import BrokenTar, TarIndex, build_index, sidecar_name
from mpp.errors import Unreachable
from mpp.system.files import cache_folder

_PIECE = 4 * 2**20  # bytes a request while a whole shard is read


class RemoteShardSource(ShardSource):
    """Images inside uncompressed tar files of which some or all are behind URLs.

    Args:
        name: the string it was opened with, fit to be shown.
        shards: in the order of their images.
        classes: class names; None: unlabelled.
        note: what `describe` adds.
        keep: keep what is fetched in the cache folder.
        timeout: seconds that one request may take.

    Raises:
        SourceError: `keep`, and the cache folder cannot be made.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        classes: tuple[str, ...] | None,
        note: str,
        keep: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(name, shards, classes, note)
        self.timeout = timeout
        keys = [_key(shard.origin) if isinstance(shard.origin, RemoteFile) else "" for shard in shards]
        try:
            self._kept = KeptRanges(cache_folder(), keys) if keep else None
        except OSError as error:
            what = f"cannot keep anything in {cache_folder()} ({error.strerror})"
            raise SourceError(f"{name}: {what}; set MPP_CACHE to a folder with room") from error

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The member's bytes and its label. Of several images, `read_many` is many times as fast."""
        (image,) = self.read_many([index])
        if isinstance(image, OSError):
            raise image
        return image

    def read_many(self, indices: Sequence[int]) -> list[tuple[bytes, int | None] | OSError]:
        """Several images, fetched at the same time.

        Returns:
            One an index, in their order: the member's bytes and its label, or why it cannot be read.

        Raises:
            IndexError: an index outside [0, len).
        """
        images: dict[int, bytes | OSError] = {}
        missing: dict[int, tuple[int, int, int]] = {}
        for index in indices:
            shard, start, size = self._place(index)
            held = self._at_hand(index, shard, start, size)
            if held is None:
                missing[index] = (shard, start, size)
            else:
                images[index] = held
        fetched = fetch_ranges(
            [(self._url(shard), start, size) for shard, start, size in missing.values()], self.timeout
        )
        for (index, (shard, start, _)), data in zip(missing.items(), fetched, strict=True):
            images[index] = data
            if self._kept is not None and isinstance(data, bytes):
                self._kept.put(shard, self._member(index, shard), start, data)
        found = ((index, images[index]) for index in indices)
        return [data if isinstance(data, OSError) else (data, self._label(index)) for index, data in found]

    def _at_hand(self, index: int, shard: int, start: int, size: int) -> bytes | OSError | None:
        """From a local shard or from what was kept; None: to be fetched."""
        tar = self.tars[shard]
        if tar is not None:
            try:
                return self._read_local(tar, index, start, size)
            except OSError as error:
                return error
        return None if self._kept is None else self._kept.get(shard, self._member(index, shard), start, size)

    def _member(self, index: int, shard: int) -> int:
        return index - int(self._starts[shard])

    def _url(self, shard: int) -> str:
        origin = self.origins[shard]
        assert isinstance(origin, RemoteFile)  # those that are not have a local tar
        return origin.url


def _key(file: RemoteFile) -> str:
    """In the cache."""
    return cache_key(file.named, file.size, file.tag)


def open_remote(spec: str, file: RemoteFile, timeout: float = TIMEOUT) -> Shard:
    """A remote .tar with its index. A .tar.gz is fetched as a whole and unpacked into the cache.

    Raises:
        SourceError: unreadable, or not a complete tar file.
    """
    key = _key(file)
    if (cache_folder() / f"{key}.tar").is_file():
        return open_packed(spec, file, file.size, key, lambda: _stream(file, timeout))
    kept = cache_folder() / f"{key}.index"
    index = kept_index(kept, file.size)
    if index is not None:
        return Shard(file, None, index)
    try:
        with contextlib.suppress(PermissionError):  # as where it is not there
            index = TarIndex.from_bytes(fetch_small(sidecar_name(file.url), timeout) or b"", file.size)
        if index is None:
            with _stream(file, timeout) as stream:
                packed = stream.peek(2)[:2] == b"\x1f\x8b"
                index = None if packed else build_index(stream, file.size)
    except BrokenTar as error:
        raise SourceError(f"{shown(spec)}: {file} is not a complete tar file ({error}); make it again") from error
    except SourceError as error:
        raise SourceError(f"{shown(spec)}: {file}: {error}") from error
    except OSError as error:
        kind = SourceAway if isinstance(error, Unreachable) else SourceError
        raise kind(f"{shown(spec)}: cannot read {error}; check the connection, then start again") from error
    if index is not None:
        keep_index(kept, index)
        return Shard(file, None, index)
    return open_packed(
        spec, file, file.size, key, lambda: _stream(file, timeout)
    )  # one cannot read in the middle of gzip


def _stream(file: RemoteFile, timeout: float) -> io.BufferedReader:
    return io.BufferedReader(RangeReader(file, timeout), _PIECE)


class RangeReader(io.RawIOBase):
    """A remote file as a readable, seekable one. Each read is a request: wrap it in a buffer."""

    def __init__(self, file: RemoteFile, timeout: float = TIMEOUT) -> None:
        super().__init__()
        self._file, self._timeout, self._position = file, timeout, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        size = max(0, min(len(buffer), self._file.size - self._position))
        (data,) = fetch_ranges([(self._file.url, self._position, size)], self._timeout)
        if isinstance(data, OSError):
            raise data
        buffer[:size] = data
        self._position += size
        return size
