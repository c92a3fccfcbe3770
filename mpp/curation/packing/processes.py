"""Numbered tasks in several processes, of which any may die and none outlives the one that started them."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from mpp.data.sources.descriptors import not_started
from mpp.errors import RunError, UserError
from mpp.system.failure import last_line, why_ended
from mpp.system.process import handle

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ASK_S = 1.0

Task = Callable[[int, Callable[[int], None]], None]
"""Takes the number of a task, and a function to call with the images done since its last call.

That function ends the process once its parent is gone."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; its text is the signal's name."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise `Stopped`, in the main thread (see `handle`)."""

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    restore = handle(_SIGNALS, stop)
    try:
        yield
    finally:
        restore()


def run_tasks(work: Task, tasks: Sequence[int], workers: int) -> Generator[tuple[list[int], int]]:
    """Runs the tasks in forked processes; close it to end them.

    Args:
        work: one task.
        tasks: their numbers, begun in this order.
        workers: processes, at most one a task.

    Yields:
        The tasks finished since the last time, in any order, and the images done so far; at least once a second.

    Raises:
        UserError: as `work` raised it.
        OSError: likewise.
        RunError: a process died.
    """
    context = multiprocessing.get_context("fork")
    workers = min(workers, len(tasks))
    counts = context.RawArray("q", workers)
    running: dict[Connection, BaseProcess] = {}
    # Until a child has its own handlers a signal waits.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        try:
            for worker in range(workers):
                here, there = context.Pipe()
                process = context.Process(target=_worker, args=(work, there, counts, worker, os.getpid()), daemon=True)
                process.start()
                there.close()  # so that it closes when the child dies
                running[here] = process
        except OSError as error:
            raise not_started(error) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        yield from _hand_out(tasks, running, counts)
    finally:
        for pipe, process in running.items():
            process.kill()  # nothing that a worker leaves behind is ever taken for a shard
            process.join()
            pipe.close()


def _hand_out(
    tasks: Sequence[int], running: dict[Connection, BaseProcess], counts: Sequence[int]
) -> Generator[tuple[list[int], int]]:
    left, rest = len(tasks), iter(tasks)

    def hand(pipe: Connection) -> None:
        following = next(rest, None)
        if following is not None:
            pipe.send(following)

    def finished(pipe: Connection) -> int:
        task, error = pipe.recv()
        if error is not None:
            raise error
        hand(pipe)
        return task

    for pipe in running:
        hand(pipe)
    while left:
        done: list[int] = []
        for pipe in wait(list(running), _ASK_S):
            assert isinstance(pipe, Connection)
            try:
                done.append(finished(pipe))
            except (EOFError, ConnectionError):
                raise _died(running[pipe]) from None
        left -= len(done)
        yield done, sum(counts)


def _died(process: BaseProcess) -> RunError:
    process.join()
    again = "the same command again goes on where this one stopped"
    return RunError(f"a process {why_ended(process.exitcode or 0, 'take fewer --workers')}; {again}")


def _worker(work: Task, pipe: Connection, counts: list[int], worker: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent takes care
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def count(images: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        counts[worker] += images

    while True:
        while not pipe.poll(_ASK_S):  # a brother may hold the other end: it does not close with the parent
            count(0)
        task, error = pipe.recv(), None
        try:
            work(task, count)
        except UserError as raised:
            error = RunError(str(raised)) if isinstance(raised, RunError) else UserError(str(raised))
        except OSError as raised:
            error = OSError(raised.errno, raised.strerror or str(raised))
        except Exception:
            error = RunError(f"a process failed: {last_line(traceback.format_exc())}")
        count(0)  # without the parent, there is nobody to tell
        pipe.send((task, error))
