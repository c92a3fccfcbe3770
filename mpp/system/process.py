"""Changes to what a whole process shares, safe where several threads make them.

Two threads that each change something and put it back may leave the change of one for good. Here the first to come
changes it and the last to go puts it back (`shared`), or they take turns (`GENERATORS`), or the change counts in one
thread alone (`one_thread`, `without_warnings`).
"""

import ctypes
import functools
import gc
import os
import platform
import re
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any


def shared(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A change that lasts, in all threads, from the first thread that enters it until the last one leaves it."""
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


def handle(numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """Has `handler` called at these signals; returns the function that puts the earlier handlers back.

    Python handles signals in the main thread alone: in another thread this does nothing. A handler that is not
    Python's own could not be put back, and stays.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: earlier for number in numbers if (earlier := signal.getsignal(number)) is not None}
    for number in before:
        signal.signal(number, handler)

    def restore() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    return restore


@functools.cache
def silence_libtiff() -> None:
    """Keeps Pillow's libtiff from writing to standard error what Pillow raises, for the rest of the process."""
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
    # It counts here alone, but the last set number is also that of every thread that is yet to come to torch.
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
    """Has the C library keep freed memory for the next allocation instead of giving it back to the system.

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
    """Ends `memory_reused`, also in a process that was forked within it: freed memory goes back to the system."""
    if _malloc:  # looked up before: a forked process must not wait for the lock of the dynamic linker
        tune, trim = _malloc
        # glibc moves these limits up to there by itself, but no longer once they were set.
        tune(_MMAP_THRESHOLD, 32 * 2**20)
        tune(_TRIM_THRESHOLD, 64 * 2**20)
        tune(_MMAP_MAX, 65_536)
        trim(0)


GENERATORS: Any = threading.RLock()
"""Taken from the seeding of a global generator, of torch, NumPy or Python, until library code has drawn from it."""
os.register_at_fork(after_in_child=GENERATORS._at_fork_reinit)  # a thread that has it is not in the child


@contextmanager
def global_draws(seed: int | None = None) -> Generator[None]:
    """Lets library code draw from torch's global CPU generator, from `seed` on, and puts its state back afterwards."""
    import torch

    with GENERATORS, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators, too
        yield


class _ThreadPattern:
    """Stands for the pattern in a filter of warnings: it matches only in the threads that are within."""

    def __init__(self, message: str) -> None:
        self._pattern, self.thread = re.compile(message, re.IGNORECASE), threading.local()

    def match(self, text: str) -> bool:
        return getattr(self.thread, "depth", 0) > 0 and self._pattern.match(text) is not None

    def __reduce__(self) -> Any:
        return re.compile, ("(?!)",)  # joblib sends all filters to its processes; nothing matches there


@functools.cache
def _filter(message: str, category: type[Warning]) -> tuple[str, Any, type[Warning], None, int]:
    return "ignore", _ThreadPattern(message), category, None, 0


@contextmanager
def without_warnings(message: str = "", category: type[Warning] = Warning) -> Generator[None]:
    """Hides from this thread the warnings of this category whose text begins like `message`, a regular expression.

    `warnings.catch_warnings` would change the filters of all threads. Our filter stays among them, and matches nothing
    elsewhere.
    """
    own = _filter(message, category)
    filters: Any = warnings.filters
    ours = next((each for each in filters if each is own or not isinstance(each[1], _ThreadPattern)), None)
    if ours is not own:  # it is missing, or another one would be asked first
        filters.insert(0, own)
    thread = own[1].thread
    thread.depth = getattr(thread, "depth", 0) + 1
    try:
        yield
    finally:
        thread.depth -= 1


_here = threading.local()


def _leave_garbage() -> None:
    """Keeps a child that `forking` starts from collecting what it inherits.

    Some garbage waits for a thread when it goes, as a process group of torch does for its own, and a child has none.
    """
    if getattr(_here, "forking", False):
        gc.freeze()


os.register_at_fork(after_in_child=_leave_garbage)


@contextmanager
def forking(signals: Sequence[signal.Signals]) -> Generator[None]:
    """Blocks these signals while child processes start, which inherit that until they have handlers of their own.

    It hides Python's warning of a fork, too, and leaves the garbage of this process to this process.
    """
    before, _here.forking = signal.pthread_sigmask(signal.SIG_BLOCK, signals), True
    try:
        with without_warnings(".*fork", DeprecationWarning):
            yield
    finally:
        _here.forking = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
