"""All images looked at in parallel, in bounded memory, with the same result for any number of processes."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

import numpy as np

from mpp.curation.checking.look import BLANK, GOOD, GREY, Part, look
from mpp.curation.checking.values import Kind, Spread
from mpp.data.reader import Bad
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.sources.descriptors import not_started
from mpp.data.statistics import ChannelStatistics
from mpp.errors import RunError, UserError
from mpp.system.failure import last_line, why_ended
from mpp.system.process import without_warnings

_CHUNK = 32  # images of a task: few enough to hold their files at once, enough for reading them together
_AHEAD = 4  # tasks waiting or done for each process
_NAMED = 3  # bad files of a kind, and blank images, that are named


class Tally:
    """What is known of the images looked at: some numbers for each, and sums over all.

    Attributes:
        indices: int64 (n,), which images of the source.
        height, width: int32 (n,), 0 where an image is bad.
        content, pixels: uint64 (n,), hashes.
        flags: uint8 (n,), see `look`.
        named: the first bad ones of each kind.
    """

    def __init__(self, indices: np.ndarray, channels: int) -> None:
        n = len(indices)
        self.indices, self.done, self.seconds = indices, 0, 0.0
        self.height, self.width = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
        self.content, self.pixels = np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=np.uint64)
        self.flags = np.zeros(n, dtype=np.uint8)
        self.colours = ChannelStatistics(channels)
        self.forms: Counter[str] = Counter()
        self.channels: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.named: dict[str, list[Bad]] = {}
        self.spreads: dict[Kind, Spread] = {}

    def add(self, part: Part) -> None:
        """Notes the next images."""
        here = slice(self.done, self.done + len(part.flags))
        for name in ("height", "width", "content", "pixels", "flags"):
            getattr(self, name)[here] = getattr(part, name)
        self.done = here.stop
        self.seconds += part.seconds
        self.colours.merge(part.colours)
        self.forms += part.forms
        self.channels += part.channels
        for bad in part.bad:
            self.kinds[bad.kind] += 1
            first = self.named.setdefault(bad.kind, [])
            if len(first) < _NAMED:
                first.append(bad)
        for kind, spread in part.spreads.items():
            self.spreads.setdefault(kind, Spread(kind.channels)).merge(spread)

    @property
    def good(self) -> np.ndarray:
        """bool (n,): which can be used."""
        return (self.flags & GOOD).astype(bool)

    @property
    def grey(self) -> int:
        """How many are colour with all channels the same."""
        return int(np.count_nonzero(self.flags & GREY))

    @property
    def blank(self) -> np.ndarray:
        """Those of one colour throughout, as positions in `indices`."""
        return np.flatnonzero(self.flags & BLANK)

    @property
    def bad(self) -> int:
        """How many cannot be used."""
        return self.kinds.total()


def scan(
    source: Source,
    reading: DecodeOptions,
    indices: np.ndarray,
    workers: int,
    report_bad: Callable[[list[Bad]], None] = lambda bad: None,
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[Tally, float]:
    """Looks at images, and says how many seconds that took.

    Args:
        source: what to read.
        reading: how files become pixels.
        indices: int64 (n,), which images.
        workers: processes; 0 looks in this one.
        report_bad: hears of the bad ones, in order.
        tell: hears how many are done, every now and then.

    Raises:
        RunError: a process died or failed.
    """
    tally, start = Tally(indices, reading.channels), time.perf_counter()
    parts = _parallel(source, reading, indices, workers) if workers else _here(source, reading, indices)
    for part in parts:
        tally.add(part)
        report_bad(part.bad)
        tell(tally.done)
    return tally, time.perf_counter() - start


def _chunks(indices: np.ndarray) -> Iterator[list[int]]:
    for begin in range(0, len(indices), _CHUNK):
        yield indices[begin : begin + _CHUNK].tolist()


def _here(source: Source, reading: DecodeOptions, indices: np.ndarray) -> Iterator[Part]:
    for chunk in _chunks(indices):
        yield look(source, chunk, reading)


def _parallel(source: Source, reading: DecodeOptions, indices: np.ndarray, workers: int) -> Iterator[Part]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, _start, (source, reading, os.getpid()))
    waiting: deque[Future[Part]] = deque()
    processes: list[BaseProcess] = []
    try:
        for chunk in _chunks(indices):
            with without_warnings(".*fork", DeprecationWarning):  # the first one starts the processes
                waiting.append(pool.submit(_work, chunk))
            processes = processes or list(pool._processes.values())  # a pool that broke has forgotten them
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise _died(processes, workers) from None
    except UserError:
        raise
    except Exception as error:
        if error.__cause__ is None:  # nothing that a process sent
            raise not_started(error) from error
        raise RunError(
            f"a process failed: {last_line(str(error.__cause__))}; with --workers 0 the whole of it is shown"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _died(processes: list[BaseProcess], workers: int) -> RunError:
    """Why a process is gone. The pool ends the others by SIGTERM."""
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes if process.exitcode]
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    return RunError(f"a process {why_ended(code, f'take fewer --workers ({workers} now)')}")


_job: tuple[Source, DecodeOptions] | None = None


def _start(source: Source, reading: DecodeOptions, parent: int) -> None:
    """A process that leaves Ctrl-C to its parent and does not outlive it."""
    global _job
    _job = source, reading
    faulthandler.enable(2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(indices: list[int]) -> Part:
    assert _job is not None
    return look(_job[0], indices, _job[1])
