"""Handlers of signals, for as long as something is at work; none where there are none to be had."""

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


def handle(numbers: Sequence[signal.Signals], handler: Handler) -> Callable[[], None]:
    """Has `handler` called at these signals; returns the function that puts the earlier handlers back.

    Python has signals in the main thread alone: in another, as of a web page or a notebook's executor, nothing is
    handled. A handler that is not Python's own, as where Python is embedded, could not be put back, and stays.
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
