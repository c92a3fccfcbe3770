"""Open files by path, a few at a time: a run over a thousand shards must not meet the limit on open files."""

import errno
import math
import os
import resource
from collections import OrderedDict
from typing import Any

from mpp.errors import RunError

_NO_MORE = (errno.EMFILE, errno.ENFILE)


def files_left() -> float:
    """How many more files this process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        return math.inf if limit == resource.RLIM_INFINITY else limit - len(os.listdir("/dev/fd"))  # noqa: PTH208
    except OSError as error:  # none is left to list them with, or there is no such folder
        return 0 if error.errno in _NO_MORE else math.inf


def _too_few_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: a process may have {limit:,} here (ulimit -n)"


def check_files(wanted: int, workers: int) -> None:
    """Refuses so many workers where a process may not open so many more files: batches would be lost on their way.

    Raises:
        RunError: naming the limit.
    """
    if files_left() < wanted:
        raise RunError(
            f"{_too_few_files()}, and {workers} workers need {wanted} more; raise that, as by ulimit -n 4096, or take "
            "fewer workers"
        )


def no_more_files(error: BaseException) -> RunError | None:
    """What to tell where an error is that no more files can be opened, which is no fault of the file; else None."""
    if getattr(error, "errno", None) not in _NO_MORE and "too many open files" not in str(error).lower():
        return None
    return RunError(f"{_too_few_files()}; raise that, as by ulimit -n 4096, or take fewer workers")


def not_started(error: BaseException) -> RunError:
    """What to tell where no process could be started."""
    return no_more_files(error) or RunError(f"no process can be started ({str(error).strip()}): take fewer workers")


class Descriptors:
    """Opens files when they are first asked for and closes those asked for longest ago.

    For positioned reads and writes (`os.pread`), so that forked processes may share them.
    """

    def __init__(self, flags: int, limit: int = 64) -> None:
        # Pipes, libraries and the batches of loader workers need most of a low limit.
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, max(1, allowed // 4))
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
        descriptor = self._open[path] = self._opened(path)
        return descriptor

    def _opened(self, path: str) -> int:
        """With the limit on open files reached, one of our own makes room."""
        while True:
            try:
                return os.open(path, self._flags, 0o666)
            except OSError as error:
                if error.errno not in _NO_MORE or not self._open:
                    raise
            os.close(self._open.popitem(last=False)[1])
