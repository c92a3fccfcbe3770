"""Batches: an endless stream for training and one ordered pass for evaluation.

    position p of the stream -> epoch p // n, step p % n -> index permutation(seed, epoch)[p % n]
                             -> read, decode, transform with draws from (seed, epoch, index) -> a row of batch p // B

No worker and no rank has a random state of its own, so the stream is the same bits for any number of either, from
whatever position it starts.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from mpp.data.reader import Batch, EvalReader, Reader, TrainReader
from mpp.data.seeds import permutation
from mpp.data.settings import DecodeOptions
from mpp.data.shared_memory import note_if_tight
from mpp.data.sources.base import Source
from mpp.data.sources.mixture import MixtureSource
from mpp.data.transform import Transform
from mpp.data.workers import load


def stream(
    source: Source,
    transform: Transform,
    options: DecodeOptions,
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    start: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    device_jpegs: bool = False,
) -> Generator[Batch]:
    """Training batches without end, from position `start` in images, a multiple of `batch_size`. Close it at the end.

    Of each batch of `batch_size` images, rank r of `world` gets the r-th equal share, in batches of `micro_batch`.
    `workers` processes read, or this one for 0; with `device_jpegs` they leave ordinary JPEGs to a `DeviceDecoder`.
    Raises ValueError for sizes that do not divide; while iterating, TooManyBad (20 in a row) and Unreachable.
    """
    if len(source) < 1:
        raise ValueError(f"{source.name}: the source is empty")
    if batch_size % world or (batch_size // world) % micro_batch or not 0 <= rank < world:
        sizes = f"batch_size {batch_size}, world {world}, rank {rank}, micro_batch {micro_batch}"
        raise ValueError(f"each of the ranks takes an equal share in equal micro-batches, got {sizes}")
    if start < 0 or start % batch_size:
        raise ValueError(f"the stream starts at a multiple of batch_size ({batch_size}), got {start}")
    if rank == 0:
        note_if_tight(micro_batch * options.channels * transform.image_hw[0] * transform.image_hw[1], workers)
    reader = TrainReader(source, transform, options, seed, device_jpegs)
    return load(reader, _keys(source, seed, batch_size, micro_batch, start, rank, world), workers, pin_memory)


def sequential(
    source: Source,
    transform: Transform,
    options: DecodeOptions,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """Evaluation batches: the given images in order, `batch_size` of them at a time, bad ones left out."""
    return in_order(EvalReader(source, transform, options), indices, batch_size, workers, pin_memory)


def in_order(
    reader: Reader, indices: Sequence[int] | np.ndarray, batch_size: int, workers: int, pin_memory: bool = False
) -> Generator[Batch]:
    """A reader's batches of the given images in order, as `sequential`."""
    order = np.asarray(indices, dtype=np.int64)
    keys = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return load(reader, keys, min(workers, len(keys)), pin_memory)


def _keys(
    source: Source, seed: int, batch_size: int, micro_batch: int, start: int, rank: int, world: int
) -> Iterator[np.ndarray]:
    """This rank's micro-batches as keys (epoch, index), int64 (B, 2), without end."""
    share, known = batch_size // world, -1
    epochs = order = np.empty(0, dtype=np.int64)
    for batch in itertools.count(start + rank * share, batch_size):
        for begin in range(batch, batch + share, micro_batch):
            parts: list[np.ndarray] = []
            position, end = begin, begin + micro_batch
            while position < end:  # which may lie in several epochs
                epoch, first = divmod(position, len(source))
                if epoch != known:
                    known, (epochs, order) = epoch, _epoch_order(source, seed, epoch)
                here = slice(first, first + end - position)
                parts.append(np.stack([epochs[here], order[here]], axis=1))
                position += len(parts[-1])
            yield np.concatenate(parts)


def _epoch_order(source: Source, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of one epoch in order, and which of each one's passes it is: passes and indices, int64 (len,).

    Every image once and the epoch's own number, but for weighted mixtures, which draw (`MixtureSource.draw`).
    """
    if isinstance(source, MixtureSource) and source.weights is not None:
        return source.draw(seed, epoch)
    return np.broadcast_to(np.int64(epoch), len(source)), permutation(seed, epoch, len(source))
