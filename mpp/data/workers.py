"""The loader's worker processes: how they start, how batches come from them, what they die of, and how they end."""

import atexit
import errno
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids
from torchdata.stateful_dataloader import StatefulDataLoader

from mpp.data.reader import Batch, Reader
from mpp.data.shared_memory import sendable
from mpp.data.sources.base import count
from mpp.data.sources.descriptors import check_files, no_more_files, not_started
from mpp.errors import ConfigError, RunError, UserError
from mpp.system.cores import count_cores
from mpp.system.failure import last_line, why_ended
from mpp.system.process import GENERATORS, forking, one_thread, return_memory, without_warnings

_MOST_WORKERS = 32  # for each core: reading over a network mostly waits
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def worker_count(config_workers: int, local_world: int, computing: bool = False) -> int:
    """Loader processes for one rank: as configured, or for -1 the cores here shared by the `local_world` ranks.

    0, reading in the training process itself, where a share would be one core or none; or two where the CPU is
    `computing`, too: measured, processes that stop its threads cost more than they read meanwhile.
    Raises ConfigError for so many that they would stop the machine rather than read.
    """
    cores = count_cores()
    if config_workers > (most := _MOST_WORKERS * cores):
        raise ConfigError(f"{config_workers:,} workers are too many for {count(cores, 'core')}: take up to {most}")
    if config_workers >= 0:
        return config_workers
    share = cores_for(local_world)
    return share if share > 1 + computing else 0


def cores_for(local_world: int) -> int:
    """The cores here, shared by the `local_world` ranks of this machine."""
    return count_cores() // max(1, local_world)


def load(reader: Reader, keys: Any, workers: int, pin_memory: bool) -> Generator[Batch]:
    """Yields the reader's batch for each of an iterable of keys, in order. Close it to end its workers.

    0 workers read in this process; `pin_memory` counts where there is CUDA.
    Raises RunError, while iterating, where a worker died, or failed in a way that is not foreseen.
    """
    iterator = _start(_Loader(reader, keys, workers, pin_memory))
    stop = functools.partial(_stop, iterator)
    # Registered after torch's own hook it runs before it, which would wait long for workers that do not know.
    atexit.register(stop)
    unregister = atexit.unregister  # a generator that is dropped at the very end finds its module empty
    try:
        while True:
            try:
                # As in a worker: sums over an image, as for its contrast, round differently on more threads.
                with nullcontext() if workers else one_thread():
                    batch = _next(iterator)
            except StopIteration:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        unregister(stop)
        stop()


class _Loader(StatefulDataLoader[Any]):
    """torchdata's loader, for samples that come as whole batches."""

    def __init__(self, reader: Reader, keys: Any, workers: int, pin_memory: bool) -> None:
        with without_warnings("'set_vital' is deprecated"):  # torchdata 0.11 on torch 2.13
            super().__init__(
                reader,  # pyright: ignore[reportArgumentType]
                batch_sampler=keys,
                num_workers=workers,
                collate_fn=sendable,
                pin_memory=pin_memory and torch.cuda.is_available(),
                worker_init_fn=functools.partial(_start_worker, os.getpid()),
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                generator=torch.Generator(),  # else each start would draw from, and so move, the global one
                snapshot_every_n_steps=None,  # the position is the caller's: nothing to carry back from the workers
            )

    def check_worker_number_rationality(self) -> None:
        """Silent: `data.workers` is the user's choice, also where it exceeds the cores."""


def _start_worker(parent: int, _: int) -> None:
    torch.set_num_threads(1)
    return_memory()  # one large image would be paid for until the run ends, in each worker
    queues: Any = Queue
    queues._on_queue_feeder_error = staticmethod(_end_unsent)  # in this process alone
    follow_parent(parent, _IGNORED_SIGNALS)


def follow_parent(parent: int, ignored: Sequence[signal.Signals]) -> None:
    """Has a child process leave signals to its parent, never outlive it, and say where it crashes."""
    if os.getppid() != parent:  # killed while this one started: asked for now, the parent would be somebody else
        os._exit(1)
    faulthandler.disable()  # where the parent enabled it, it takes itself for enabled, but torch has taken its place
    faulthandler.enable(2)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _end_unsent(error: Exception, _: Any) -> None:
    """Ends the worker: a batch that cannot be sent would be waited for without end."""
    print(f"a batch cannot be sent: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _start(loader: _Loader) -> Any:
    """The loader's iterator, and with it the workers."""
    if loader.num_workers:  # measured: five or six of each, and a few of ours
        check_files(6 * loader.num_workers + 12, loader.num_workers)
    try:
        # A worker seeds torch's generator, whose lock it must not inherit from a thread that draws.
        with forking(_IGNORED_SIGNALS), GENERATORS:
            iterator: Any = iter(loader)
    except (OSError, RuntimeError) as error:  # the latter, by torch, where one dies before its first answer
        raise not_started(error) from error
    if loader.num_workers:  # from now on it would raise for a dead worker anywhere in the training: see `_next`
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    return iterator


def _next(iterator: Any) -> Any:
    workers = getattr(iterator, "_workers", ())
    if not workers:
        return next(iterator)
    # Within it torch's handler of SIGCHLD raises for a worker that dies, be it while half a batch is in the pipe.
    _set_worker_pids(id(iterator), tuple(worker.pid for worker in workers))
    try:
        _error_if_any_worker_fails()
        return next(iterator)
    except (StopIteration, UserError):
        raise
    except Exception as error:
        raise _failed(workers, error) from error
    finally:
        _remove_worker_pids(id(iterator))


def _failed(workers: Sequence[Any], error: Exception) -> RunError:
    """Why no batch came, in one line."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if codes:
        return RunError(f"a loader process {why_ended(codes[0], f'take fewer workers ({len(workers)} now)')}")
    if "ancdata" in str(error):  # what becomes of a file that cannot be opened on arrival
        error = OSError(errno.EMFILE, str(error))
    return no_more_files(error) or RunError(
        f"a loader process failed: {last_line(str(error))}; with 0 workers the whole of it is shown"
    )


def _stop(iterator: Any) -> None:
    """Ends the workers. Private names of torch's, for without them a worker would only end by a signal it ignores."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
