"""Batches: an endless stream for training and one ordered pass for evaluation.

    position p of the stream -> epoch p // n, place p % n -> index permutation(seed, epoch)[place]
                             -> read, decode, transform with draws from (seed, epoch, index) -> a slot of batch p // B

No worker and no rank has a random state of its own, so the stream is the same bits for any number of either, from
whatever position it starts.
"""

import atexit
import errno
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import torch
from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids
from torchdata.stateful_dataloader import StatefulDataLoader

from mpp.data.reader import Bad, Batch, Evaluation, Late, Reader, Training, Transform
from mpp.data.sending import sendable, tell_if_tight
from mpp.data.settings import Reading
from mpp.data.sources.base import Source, count
from mpp.data.sources.descriptors import check_files, no_more_files, not_started
from mpp.data.sources.mixture import MixtureSource
from mpp.errors import ConfigError, RunError, UserError
from mpp.system.cores import count_cores
from mpp.system.failure import last_line, why_ended
from mpp.system.process import GENERATORS, one_thread, return_memory, without_warnings

_MOST_WORKERS = 32  # for each core: reading over a network mostly waits
_ORDER = 1  # what the draws are for; reader.py has the other purposes
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch: int64 (length,)."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(length)


def stream(
    source: Source,
    transform: Transform,
    reading: Reading,
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    start: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    late: bool = False,
) -> Generator[Batch]:
    """Training batches without end. Close it (`.close()`) or drop it to end its workers.

    Args:
        source: what to read.
        transform: pictures to uint8 (C, h, w).
        reading: how files become pixels.
        seed: of the order and every draw.
        batch_size: global batch, over all ranks.
        micro_batch: images in each batch that this rank gets; divides batch_size / world.
        start: position in the stream, in images; a multiple of batch_size.
        rank: which of `world` equal shares of each global batch this is.
        world: number of ranks.
        workers: loader processes; 0 reads in this one.
        pin_memory: into page-locked memory, where there is CUDA.
        late: leave ordinary JPEGs undecoded, for `LateDecoder`.

    Raises:
        ValueError: sizes that do not divide.
        TooManyBad: (while iterating) 20 images in a row could not be used.
        Unreachable: (while iterating) what the images are read from gives no answer.
    """
    if len(source) < 1:
        raise ValueError(f"{source.name}: the source is empty")
    if batch_size % world or (batch_size // world) % micro_batch or not 0 <= rank < world:
        sizes = f"batch_size {batch_size}, world {world}, rank {rank}, micro_batch {micro_batch}"
        raise ValueError(f"each of the ranks takes an equal share in equal micro-batches, got {sizes}")
    if start < 0 or start % batch_size:
        raise ValueError(f"the stream starts at a multiple of batch_size ({batch_size}), got {start}")
    pixels = micro_batch * reading.channels * transform.image_hw[0] * transform.image_hw[1]
    if rank == 0:
        tell_if_tight(pixels, workers)
    slots = _Slots(source, seed, batch_size, micro_batch, start, rank, world)
    return _batches(_Loader(Training(source, transform, reading, seed, late), slots, workers, pin_memory))


def sequential(
    source: Source,
    transform: Transform,
    reading: Reading,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """Evaluation batches: the given images in order, the last batch as small as it is. Bad images are left out.

    Args:
        source: what to read.
        transform: pictures to uint8 (C, h, w).
        reading: how files become pixels.
        indices: which images.
        batch_size: images a batch, bad ones counted.
        workers: loader processes; 0 reads in this one.
        pin_memory: as for `stream`.
    """
    return in_order(Evaluation(source, transform, reading), indices, batch_size, workers, pin_memory)


def in_order(
    reader: Reader, indices: Sequence[int] | np.ndarray, batch_size: int, workers: int, pin_memory: bool = False
) -> Generator[Batch]:
    """What a reader makes of the given images in order, as `sequential`."""
    order = np.asarray(indices, dtype=np.int64)
    parts = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return _batches(_Loader(reader, parts, min(workers, len(parts)), pin_memory))


def worker_count(config_workers: int, local_world: int, computing: bool = False) -> int:
    """Loader processes for one rank: as configured, or for -1 the cores here shared by the `local_world` ranks.

    0, reading in the training process itself, where a share would be one core or none; or two where the CPU is
    `computing`, too: measured, processes that stop its threads cost more than they read meanwhile.

    Raises:
        ConfigError: so many that they would stop the machine rather than read.
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


class _Slots:
    """Yields this rank's micro-batches as keys (pass, index), int64 (B, 2), without end."""

    def __init__(
        self, source: Source, seed: int, batch_size: int, micro_batch: int, start: int, rank: int, world: int
    ) -> None:
        self.source, self.seed, self.batch_size, self.micro_batch = source, seed, batch_size, micro_batch
        self.start, self.share = start, batch_size // world
        self.first = rank * self.share
        self._known = -1
        self._passes = self._order = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        begin = self.start
        while True:
            for slot in range(begin + self.first, begin + self.first + self.share, self.micro_batch):
                yield self._keys(slot, slot + self.micro_batch)
            begin += self.batch_size

    def _keys(self, begin: int, end: int) -> np.ndarray:
        """The keys of positions begin..end of the stream, which may lie in several epochs."""
        length, parts = len(self.source), []
        while begin < end:
            epoch, place_in_epoch = divmod(begin, length)
            if epoch != self._known:
                self._known = epoch
                self._passes, self._order = epoch_order(self.source, self.seed, epoch)
            here = slice(place_in_epoch, place_in_epoch + end - begin)
            parts.append(np.stack([self._passes[here], self._order[here]], axis=1))
            begin += len(parts[-1])
        return np.concatenate(parts)


def epoch_order(source: Source, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of one epoch in order, and which of each one's passes it is: passes and indices, int64 (len,).

    Every image once and the epoch's own number, but for weighted mixtures, which draw (`MixtureSource.draw`).
    """
    if isinstance(source, MixtureSource) and source.weights is not None:
        return source.draw(seed, epoch)
    return np.broadcast_to(np.int64(epoch), len(source)), permutation(seed, epoch, len(source))


def number_of(*key: int) -> int:
    """A 64-bit number that depends on the key alone; zeros at its end do not count."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def derive_seed(*parts: int) -> int:
    """A seed below 2^63 from several numbers, such that different numbers give unrelated seeds."""
    return number_of(len(parts), *parts) >> 1  # with their count, zeros at the end count too


class _Loader(StatefulDataLoader[Any]):
    """torchdata's loader, for samples that come as whole batches."""

    def __init__(self, dataset: Any, batches: Any, workers: int, pin_memory: bool) -> None:
        with without_warnings("'set_vital' is deprecated"):  # torchdata 0.11 on torch 2.13
            super().__init__(
                dataset,
                batch_sampler=batches,
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
    """Workers leave signals to the main process, which decides when to stop; never outlive it; say where they crash."""
    if os.getppid() != parent:  # killed while this worker started: asked for now, its parent would be somebody else
        os._exit(1)
    torch.set_num_threads(1)
    return_memory()  # one large image would be paid for until the run ends, in each worker
    queues: Any = Queue
    queues._on_queue_feeder_error = staticmethod(_end_unsent)  # in this process alone
    faulthandler.disable()  # where the parent enabled it, it takes itself for enabled, but torch has taken its place
    faulthandler.enable(2)
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_unsent(error: Exception, _: Any) -> None:
    """A batch that cannot be sent would be waited for without end."""
    print(f"a batch cannot be sent: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _start(loader: _Loader) -> Any:
    """The loader's iterator, and with it the workers."""
    if loader.num_workers:  # measured: five or six of each, and a few of ours
        check_files(6 * loader.num_workers + 12, loader.num_workers)
    # Until a worker has started up it would obey signals; it inherits the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    try:
        # A worker seeds torch's generator, whose lock it must not inherit from a thread that draws.
        with without_warnings(".*fork", DeprecationWarning), GENERATORS:
            iterator: Any = iter(loader)
    except (OSError, RuntimeError) as error:  # the latter, by torch, where one dies before its first answer
        raise not_started(error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if loader.num_workers:  # from now on it would raise for a dead worker anywhere in the training: see `_next`
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    return iterator


def _next(iterator: Any) -> Any:
    """The next batch.

    Raises:
        RunError: a worker died, or failed in a way that is not foreseen.
    """
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


def _batches(loader: _Loader) -> Generator[Batch]:
    iterator = _start(loader)
    stop = functools.partial(_stop, iterator)
    # Registered after torch's own hook it runs before it, which would wait long for workers that do not know.
    atexit.register(stop)
    unregister = atexit.unregister  # a generator that is dropped at the very end finds its module empty
    try:
        while True:
            try:
                # As in a worker: sums over an image, as for its contrast, round differently on more threads.
                with nullcontext() if loader.num_workers else one_thread():
                    batch = _next(iterator)
            except StopIteration:
                return
            if isinstance(batch, Exception):
                raise batch
            batch["bad"] = [Bad(*bad) for bad in batch["bad"]]  # pinning makes lists of tuples
            batch["late"] = [Late(*late) for late in batch["late"]]
            yield batch
    finally:
        unregister(stop)
        stop()
