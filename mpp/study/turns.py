"""Several processes may work at one study: each takes the next part of it that is ready and that nobody is at.

A part is locked while it is worked at. The lock goes with its process, however that ends, so that another one goes on
with what a killed one began. On a file system without locks a study is for one process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpp.system.files import claimed
from mpp.training.loop import StopSignal

_PATIENCE = 2.0
"""Seconds before it is asked again whether others have done what is waited for."""


@dataclass(frozen=True)
class Part:
    """What one process does at a time."""

    lock: Path
    do: Callable[[], int]
    """Does it, or finds that it is done; returns the exit status."""
    ready: Callable[[], bool] = lambda: True
    """Whether all that it needs is done."""


def take_turns(parts: Sequence[Part]) -> int:
    """Does all parts, the first ones first, or waits until others have; returns the exit status: 0, that of a part that
    was stopped, or, where it waits, of a requested stop."""
    left, waited = list(parts), False
    while left:
        for part in left:
            if not part.ready():
                continue
            with claimed(part.lock) as mine:
                status = part.do() if mine else 0
            if status:
                return status
            if mine:
                left.remove(part)
                break
        else:
            if not waited:
                print(f"waiting for other processes, which are at the rest or what it needs ({len(left)})", flush=True)
            waited = True
            status = _pause()
            if status:
                return status
    return 0


def _pause() -> int:
    """Waits a little; the exit status of a stop that was asked for meanwhile, or 0."""
    signals = StopSignal()
    try:
        time.sleep(_PATIENCE)
    finally:
        signals.restore()
    return signals.status


def lock_of(study: Path | str, path: Path | str) -> Path:
    """The file that is locked while what makes `path` is worked at, both in the study's folder."""
    return Path(study) / "locks" / Path(path).relative_to(study)
