"""Several processes may work at one study: each takes the next task that is ready and that no other works at.

A task is locked while it is worked at. The lock goes with its process, however that ends, so that another one goes on
with what a killed one began. On a file system without locks a study is for one process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpp.system.files import claimed
from mpp.training.loop import StopSignal

_WAIT_SECONDS = 2.0
"""Until the tasks of other processes are looked at again."""


@dataclass(frozen=True)
class Task:
    """A piece of work for one process."""

    lock: Path
    do: Callable[[], int]
    """Does it, or finds that it is done; returns the exit status."""
    ready: Callable[[], bool] = lambda: True
    """Whether what it needs is done."""


def run_tasks(tasks: Sequence[Task]) -> int:
    """Does all tasks, the first ones first, or waits until other processes have; returns the exit status.

    That is 0, that of a task that was stopped, or that of a stop requested while waiting.
    """
    left, waited = list(tasks), False
    while left:
        for task in left:
            if not task.ready():
                continue
            with claimed(task.lock) as mine:
                status = task.do() if mine else 0
            if status:
                return status
            if mine:
                left.remove(task)
                break
        else:
            if not waited:
                print(f"waiting for other processes, which are at the rest or what it needs ({len(left)})", flush=True)
            waited = True
            signals = StopSignal()
            try:
                time.sleep(_WAIT_SECONDS)
            finally:
                signals.restore()
            if signals.status:
                return signals.status
    return 0


def lock_of(study: Path | str, path: Path | str) -> Path:
    """The lock of what makes `path`, both in the study's folder."""
    return Path(study) / "locks" / Path(path).relative_to(study)
