"""Work in several processes: results in order, a few at a time; no process outlives the one that started it."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from mpp.data.sources.descriptors import not_started
from mpp.data.workers import follow_parent
from mpp.errors import RunError, UserError
from mpp.system.failure import last_line, why_ended
from mpp.system.process import forking

Task = TypeVar("Task")
Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AHEAD = 4  # tasks waiting or done for each process
_WITHOUT = "; with --workers 0 the whole of it is shown"


def in_processes(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    tell: Callable[[int], None] = lambda images: None,
    again: str = "",
) -> Generator[Result]:
    """Gives the results of `work` in the order of the tasks; close it to end the processes.

    Work, tasks and results can be pickled. At least once a second `tell` gets the images that `count_images` has
    counted; `again` ends the message of a process that died or failed.

    Raises:
        UserError, OSError: as `work` raised it.
        RunError: a process died, failed in another way, or could not be started.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    counts = context.RawArray("q", len(tasks))
    pool = ProcessPoolExecutor(max(1, min(workers, len(tasks))), context, _start, (work, counts, os.getpid()))
    processes: list[BaseProcess] = []
    futures: deque[Future[Result]] = deque()

    def next_result() -> Result:
        while wait([futures[0]], timeout=1).not_done:
            tell(sum(counts))
        return futures.popleft().result()

    try:
        for number, task in enumerate(tasks):
            with forking(_SIGNALS):  # the first one starts the processes
                futures.append(pool.submit(_call, number, task))
            processes = processes or list(pool._processes.values())  # a pool that broke has forgotten them
            if len(futures) >= _AHEAD * workers:
                yield next_result()
        while futures:
            yield next_result()
    except BrokenProcessPool:
        raise _died(processes, f"take fewer --workers ({workers} now)", again) from None
    except UserError:
        raise
    except Exception as error:
        if error.__cause__ is None:  # no process sent it
            raise not_started(error) from error
        if isinstance(error, OSError):
            raise
        raise RunError(f"a process failed: {last_line(str(error.__cause__))}{again or _WITHOUT}") from error
    finally:
        for process in processes or list((pool._processes or {}).values()):
            process.kill()  # nothing that it leaves behind is ever taken for a result
        # Else the pool would wait for ever for the rest of a result that was being sent: this process can write, too.
        queue: Any = pool._result_queue
        queue._writer.close()
        pool.shutdown(cancel_futures=True)


def _died(processes: list[BaseProcess], fewer: str, again: str) -> RunError:
    """Why a process is gone. The pool ends the others by SIGTERM."""
    for process in processes:
        while process.exitcode is None:  # also where the pool's own thread is just learning it
            process.join(0.01)
    codes = [process.exitcode for process in processes if process.exitcode]
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    return RunError(f"a process {why_ended(code, fewer)}{again}")


_work: Callable[[Any], Any] | None = None  # of this process, if it is one of a pool
_counts: Any = None
_number = _parent = 0


def _start(work: Callable[[Any], Any], counts: Any, parent: int) -> None:
    """Leaves Ctrl-C to the parent, and ends with it."""
    global _work, _counts, _parent
    _work, _counts, _parent = work, counts, parent
    follow_parent(parent, [signal.SIGINT])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _call(number: int, task: Any) -> Any:
    global _number
    _number = number
    assert _work is not None
    return _work(task)


def count_images(images: int) -> None:
    """Counts images of the present task for `tell`, and ends a process whose parent is gone."""
    if _work is not None:
        if os.getppid() != _parent:
            os._exit(1)
        _counts[_number] += images
