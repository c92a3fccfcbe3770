"""A cache on the local disk of what was fetched of remote shards.

Two files a shard: KEY.part has the shard's own layout with holes where nothing was fetched, and KEY.sums one number
per image, its CRC32 with bit 32 set. The number is written after the bytes, and a read believes the bytes only where
they fit the number: processes and ranks share the files without a lock, and a crash between the two costs a fetch.
"""

import contextlib
import os
import struct
import zlib
from pathlib import Path

from mpp.data.sources.descriptors import Descriptors
from mpp.system.cache import make_room, use

_SUM = struct.Struct("<q")
_AT_ONCE = 2**28  # bytes for which room is looked for


class RangeCache:
    """Ranges of shards in a folder.

    Args:
        folder: made where it is missing.
        keys: of the shards, fit for file names; another state of a shard needs another key.

    Raises OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, keys: list[str]) -> None:
        self._parts = [str(folder / f"{key}.part") for key in keys]
        self._sums = [str(folder / f"{key}.sums") for key in keys]
        self._open = Descriptors(os.O_RDWR | os.O_CREAT, limit=128)
        self._room, self._full = 0, False  # bytes that may be written before room is looked for again
        folder.mkdir(parents=True, exist_ok=True)
        use(*filter(None, keys))

    def get(self, shard: int, member: int, start: int, size: int) -> bytes | None:
        """The bytes from `start` on of an image, the shard's `member`-th; None where they are not there whole."""
        try:
            known = os.pread(self._open[self._sums[shard]], _SUM.size, _SUM.size * member)
            if len(known) != _SUM.size or not any(known):
                return None
            data = os.pread(self._open[self._parts[shard]], size, start)
        except OSError:
            return None
        return data if known == _sum(data) and len(data) == size else None

    def put(self, shard: int, member: int, start: int, data: bytes) -> None:
        """Writes an image. A cache that is full costs another fetch, nothing else."""
        if self._full:
            return
        self._room -= len(data)
        if self._room < 0:
            try:
                make_room(max(_AT_ONCE, len(data)))
            except OSError:
                self._full = True
                return
            self._room = max(_AT_ONCE - len(data), 0)
        with contextlib.suppress(OSError):
            if os.pwrite(self._open[self._parts[shard]], data, start) == len(data):
                os.pwrite(self._open[self._sums[shard]], _sum(data), _SUM.size * member)


def _sum(data: bytes) -> bytes:
    return _SUM.pack(zlib.crc32(data) | 1 << 32)
