"""Open files by path, a few at a time: a run over a thousand shards must not meet the limit on open files."""

import os
from collections import OrderedDict
from typing import Any


class Descriptors:
    """Opens files when they are first asked for and closes those asked for longest ago.

    For positioned reads and writes (`os.pread`), so that forked processes may share them.
    """

    def __init__(self, flags: int, limit: int = 64) -> None:
        self._flags, self._limit = flags | os.O_CLOEXEC, limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has none of this process's descriptors.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __getitem__(self, path: str) -> int:
        """The descriptor, to be used before the next one is asked for. OSError where it cannot be opened."""
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        descriptor = self._open[path] = os.open(path, self._flags, 0o666)
        return descriptor
