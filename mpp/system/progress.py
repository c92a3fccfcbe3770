"""How far something is that takes longer than ten seconds: a bar on a terminal, plain lines elsewhere, all on stderr.

    with Progress("reading features", 5000) as progress:
        for batch in batches:
            progress.add(len(batch))

Rank 0 alone shows anything, and no process that was forked from it. Several bars share one display.
"""

import multiprocessing
import os
import sys
import time
from types import TracebackType
from typing import Any, Self

SECONDS = 10.0
"""What ends sooner shows nothing; lines come no faster."""
_LINE_SHARE, _LINE_SECONDS = 0.1, 60.0  # a line is due after this much more of the whole, or this long

_display: Any = None  # rich's, while there is a bar
_bars = 0


class Progress:
    """Tells how far something is.

    Args:
        what: a few words of what is being done, such as "reading features".
        total: how many there are; None: not known.
        done: how many of them were there before.
        after: seconds before which nothing is shown.
        lines: whether to print lines where there can be no bar.
        on: False shows nothing.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "images",
        *,
        done: int = 0,
        after: float = SECONDS,
        lines: bool = True,
        on: bool = True,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._before, self._after, self._lines = done, after, lines
        self._process = os.getpid()
        main = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
        self._on = on and main
        self._begun = time.monotonic()
        self._bar: Any = None
        self._last: tuple[float, int] | None = None  # when the last line was, and what it said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, number: int = 1) -> None:
        """Counts some more as done."""
        self.to(self.done + number)

    def to(self, done: int) -> None:
        """Counts so many as done, with those of before."""
        self.done = done if self.total is None else min(done, self.total)
        if not self._on or os.getpid() != self._process:
            return
        if self._bar is not None:
            _display.update(self._bar, completed=self.done)
            return
        now = time.monotonic()
        if now - self._begun < self._after:
            return
        if _has_bars():
            self._bar = _show(self)
        elif self._lines and self._is_due(now):
            self._last = now, self.done
            print(self._line(now), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away; again does nothing."""
        bar, self._bar, self._on = self._bar, None, False
        if bar is not None and os.getpid() == self._process:
            _hide(bar)

    def _is_due(self, now: float) -> bool:
        if self._last is None:
            return True
        time_of_last, done = self._last
        gained = self.total is not None and self.done - done >= _LINE_SHARE * self.total
        return now - time_of_last >= (SECONDS if gained else _LINE_SECONDS)

    def _line(self, now: float) -> str:
        rate = (self.done - self._before) / max(now - self._begun, 1e-9)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        parts = [f"{self.done:,} {self.unit}", f"{speed} {self.unit}/s"]
        if self.total is not None:
            parts[0] = f"{self.done:,} of {self.total:,} {self.unit}"
            if rate > 0:
                parts.append(f"{clock((self.total - self.done) / rate)} left")
        return f"{self.what}: {', '.join(parts)}"


def say(text: str) -> None:
    """Prints a line on stderr, above the bars where there are some."""
    if _display is not None:
        _display.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as "1:02:05"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _has_bars() -> bool:
    """Whether stderr is a terminal that can move its cursor."""
    return _display is not None or (sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown"))


def _show(progress: Progress) -> Any:
    """Adds a bar, and starts the display with the first one; rich itself minds NO_COLOR."""
    global _display, _bars
    if _display is None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Display

        unit = TextColumn("{task.fields[unit]}", markup=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), unit)
        # Without redirecting it, what goes to a terminal's stdout would end in the bar; to a file it goes as it is.
        options: Any = {"transient": True, "refresh_per_second": 4, "redirect_stdout": sys.stdout.isatty()}
        _display = Display(*columns, TimeRemainingColumn(), "left", console=Console(stderr=True), **options)
        _display.start()
    _bars += 1
    return _display.add_task(progress.what, total=progress.total, completed=progress.done, unit=progress.unit)


def _hide(bar: Any) -> None:
    global _display, _bars
    _display.remove_task(bar)
    _bars -= 1
    if not _bars:
        _display.stop()
        _display = None


def _forget() -> None:
    """In a forked process: the display is its parent's, and its lock may be held for ever."""
    global _display, _bars
    if _display is not None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            setattr(sys, name, getattr(stream, "rich_proxied_file", stream))
        _display, _bars = None, 0


os.register_at_fork(after_in_child=_forget)
