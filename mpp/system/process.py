"""Changes of what a whole process shares, safe where several threads make them.

Two threads that each remember what was there, change it and put it back may leave the change of one for good. Here the
first to come changes it and the last to go puts it back (`shared`), or they take turns (`GENERATORS`), or the change
counts in one thread alone (`printing_to`, `one_thread`, `without_warnings`).
"""

import ctypes
import functools
import os
import platform
import re
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO


def shared(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A change that lasts from the first thread that comes until the last that is within it goes, in all threads."""
    lock: Any = threading.Lock()
    within = 0
    made: AbstractContextManager[None]
    os.register_at_fork(after_in_child=lock._at_fork_reinit)

    @contextmanager
    def enter() -> Generator[None]:
        nonlocal within, made
        with lock:
            if not within:
                made = change()
                made.__enter__()
            within += 1
        try:
            yield
        finally:
            with lock:
                within -= 1
                if not within:
                    made.__exit__(None, None, None)

    return functools.wraps(change)(enter)


@shared
@contextmanager
def quiet() -> Generator[None]:
    """Nothing is written to standard error meanwhile, from C neither, by any thread."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Streams:
    """Stands for the stream that a thread has in its place, for other threads for that which was there before."""

    def __init__(self, before: TextIO) -> None:
        self._before, self._here = before, threading.local()

    def put(self, stream: TextIO | None) -> TextIO | None:
        """Puts it in its place for this thread; returns what was there."""
        earlier = getattr(self._here, "stream", None)
        self._here.stream = stream
        return earlier

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._here, "stream", None) or self._before, name)


_streams: tuple[_Streams, ...] = ()


@shared
@contextmanager
def _parted() -> Generator[None]:
    global _streams
    before = sys.stdout, sys.stderr
    _streams = tuple(map(_Streams, before))
    sys.stdout, sys.stderr = _streams  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def printing_to(stream: TextIO) -> Generator[None]:
    """What this thread prints, to standard error as well, goes there."""
    with _parted():
        streams = _streams
        earlier = [each.put(stream) for each in streams]
        try:
            yield
        finally:
            for each, before in zip(streams, earlier, strict=True):
                each.put(before)


@functools.cache
def silence_libtiff() -> None:
    """Pillow's libtiff no longer writes to standard error what Pillow raises, for the rest of the process."""
    from PIL import Image

    # A library's symbols are looked for in what it is linked with, too; a Pillow without libtiff has none.
    set_handler = getattr(ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler", None)
    if set_handler is not None:
        set_handler(None)


@contextmanager
def one_thread() -> Generator[None]:
    """In this thread, torch computes on one thread of the CPU."""
    import torch

    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    # It counts here alone, but what was set last is also the number of every thread that is yet to come to torch.
    other = threading.Thread(target=torch.set_num_threads, args=(before,))
    other.start()
    other.join()
    try:
        yield
    finally:
        torch.set_num_threads(before)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_malloc: tuple[Any, Any] | None = None  # mallopt and malloc_trim of this process, once they were used


def _glibc() -> tuple[Any, Any] | None:
    """mallopt and malloc_trim; None where another C library runs, or the environment tunes malloc."""
    names = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in names)
    if tuned or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc.mallopt, libc.malloc_trim


@shared
@contextmanager
def memory_reused() -> Generator[None]:
    """The C library does not give freed memory back to the system, but takes it for what is allocated next.

    A training step on the CPU allocates and frees the same tensors again and again. Usually the system maps and clears
    each page of the larger ones every time, which takes up to a fifth of the step.
    """
    global _malloc
    _malloc = _malloc or _glibc()
    if _malloc:
        _malloc[0](_TRIM_THRESHOLD, -1)  # never trim the heap
        _malloc[0](_MMAP_MAX, 0)  # and allocate nothing outside of it
    try:
        yield
    finally:
        return_memory()


def return_memory() -> None:
    """Ends `memory_reused`, also in a process that was forked within it: what is freed goes back to the system."""
    if _malloc:  # looked up before: a forked process must not wait for the lock of the dynamic linker
        tune, trim = _malloc
        # The ends to which glibc moves them by itself, which it no longer does once they were set.
        tune(_MMAP_THRESHOLD, 32 * 2**20)
        tune(_TRIM_THRESHOLD, 64 * 2**20)
        tune(_MMAP_MAX, 65_536)
        trim(0)


GENERATORS: Any = threading.RLock()
"""Held from the seeding of a global generator, of torch, NumPy or Python, until library code has drawn from it."""
os.register_at_fork(after_in_child=GENERATORS._at_fork_reinit)  # else held by a thread that is not in the child


@contextmanager
def global_draws(seed: int | None = None) -> Generator[None]:
    """Library code within draws from torch's global generator of the CPU, which then is as it was.

    Args:
        seed: what it starts from; None: from where it is.
    """
    import torch

    with GENERATORS, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators, too
        yield


class _Muted:
    """In the place of the pattern in a filter of warnings: matches in those threads alone that are within."""

    def __init__(self, message: str) -> None:
        self._pattern, self._here = re.compile(message, re.IGNORECASE), threading.local()

    def match(self, text: str) -> bool:
        return self.depth > 0 and self._pattern.match(text) is not None

    @property
    def depth(self) -> int:
        return getattr(self._here, "depth", 0)

    @depth.setter
    def depth(self, depth: int) -> None:
        self._here.depth = depth

    def __reduce__(self) -> Any:
        return re.compile, ("(?!)",)  # joblib sends all filters to its processes; nothing matches there


@functools.cache
def _filter(message: str, category: type[Warning]) -> tuple[str, Any, type[Warning], None, int]:
    return "ignore", _Muted(message), category, None, 0


@contextmanager
def without_warnings(message: str = "", category: type[Warning] = Warning) -> Generator[None]:
    """This thread hears no warnings of this category whose text begins like `message`, a regular expression.

    `warnings.catch_warnings` would change the filters of all threads. A filter of ours stays among them, and matches
    nothing elsewhere.
    """
    own = _filter(message, category)
    filters: Any = warnings.filters
    for other in [*filters, None]:
        if other is own:
            break
        if other is None or not isinstance(other[1], _Muted):  # one that would be asked first, or the end
            filters.insert(0, own)
            break
    own[1].depth += 1
    try:
        yield
    finally:
        own[1].depth -= 1
