"""Open files by path, a few at a time: a run over a thousand shards must not meet the limit on open files."""

import errno
import math
import os
import resource
from typing import Any

from mpp.errors import RunError

_NO_MORE = (errno.EMFILE, errno.ENFILE)
_HINT = "raise that, as by ulimit -n 4096, or take fewer workers"


def _limit() -> float:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def files_left() -> float:
    """How many more files this process may open."""
    try:
        return _limit() - len(os.listdir("/dev/fd"))  # noqa: PTH208
    except OSError as error:  # none is left to list them with, or there is no such folder
        return 0 if error.errno in _NO_MORE else math.inf


def _too_few() -> str:
    return f"too many open files: a process may have {_limit():,} here (ulimit -n)"


def check_files(wanted: int, workers: int) -> None:
    """Refuses so many workers where a process may not open so many more files: batches would be lost on their way.

    Raises RunError: naming the limit.
    """
    if files_left() < wanted:
        raise RunError(f"{_too_few()}, and {workers} workers need {wanted} more; {_HINT}")


def no_more_files(error: BaseException) -> RunError | None:
    """The error to raise where one says that no more files can be opened, which is no fault of the file; else None."""
    if getattr(error, "errno", None) not in _NO_MORE and "too many open files" not in str(error).lower():
        return None
    return RunError(f"{_too_few()}; {_HINT}")


def not_started(error: BaseException) -> RunError:
    """The error to raise where no process could be started."""
    return no_more_files(error) or RunError(f"no process can be started ({str(error).strip()}): take fewer workers")


class Descriptors:
    """Opens files when they are first asked for and closes those asked for longest ago.

    For positioned reads and writes (`os.pread`), so that forked processes may share them.
    """

    def __init__(self, flags: int, limit: int = 64) -> None:
        # Pipes, libraries and the batches of loader workers need most of a low limit.
        self._flags, self._limit = flags | os.O_CLOEXEC, min(limit, max(1, _limit() / 4))
        self._open: dict[str, int] = {}  # those asked for longest ago first

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has none of this process's descriptors.
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __getitem__(self, path: str) -> int:
        """The descriptor, to be used before the next one is asked for. OSError where it cannot be opened."""
        descriptor = self._open.pop(path, None)
        while descriptor is None:
            try:
                while len(self._open) >= self._limit:
                    self._close_oldest()
                descriptor = os.open(path, self._flags, 0o666)
            except OSError as error:
                if error.errno not in _NO_MORE or not self._open:
                    raise
                self._close_oldest()  # with the limit on open files reached, one of our own makes room
        self._open[path] = descriptor
        return descriptor

    def _close_oldest(self) -> None:
        os.close(self._open.pop(next(iter(self._open))))
