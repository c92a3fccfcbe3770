"""How a batch travels from a loader worker: pixels in shared memory where there is room for them, all else by the pipe.

A container has 64 MB of shared memory (/dev/shm) if nobody asked for more. A tensor that travels in it is also one more
open file of both processes.
"""

import math
import os
import sys
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mpp.data.sources.descriptors import files_left

_SHARED_MEMORY = "/dev/shm"
_SMALL = 2**16  # bytes from which on shared memory is worth its open file
_SPARE_FILES = 24  # that a worker needs to send batches, and for what it decodes

T = TypeVar("T")

_told: list[str] = []  # once a process


def shared_memory() -> int:
    """Bytes of shared memory that are free; on systems that do not say so, as many as one likes."""
    try:
        held = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return held.f_bavail * held.f_frsize


def tell_if_tight(batch: int, workers: int) -> None:
    """Says on stderr, once, where there is too little shared memory for batches of so many bytes."""
    wanted, free = batch * (2 * workers + 3), shared_memory()  # two of each worker's, one in use, as many spare
    if not workers or wanted <= free or _told:
        return
    _told.append(
        f"note: {_SHARED_MEMORY} has {free / 1e6:,.0f} MB free, the batches of {workers} workers would take "
        f"{wanted / 1e6:,.0f}: those without room there travel by pipes, which takes longer; a container gets more by "
        f"--shm-size {math.ceil(2 * wanted / 2**30)}g"
    )
    print(_told[0], file=sys.stderr)


def empty_pixels(*shape: int) -> Tensor:
    """uint8, unset; in a loader worker where the main process sees it, if there is room, so that it is not copied."""
    size = math.prod(shape)
    # Half of what is free at most: NCCL and other processes need some, too.
    if get_worker_info() is not None and _SMALL <= size <= shared_memory() // 2 and files_left() >= _SPARE_FILES:
        try:
            storage = torch.UntypedStorage._new_shared(size)  # as torch's own collate does
        except RuntimeError:  # another process was faster, or no more files can be opened
            pass
        else:
            return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    return torch.empty(shape, dtype=torch.uint8)


def sendable(batch: T) -> T:
    """A batch as a loader worker sends it; in the main process, as it is.

    Left to torch, every tensor would be moved to shared memory, in a thread whose errors nobody hears of.
    """
    if get_worker_info() is None or not isinstance(batch, dict):
        return batch
    ready: Any = {key: _sendable(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return ready


def _sendable(tensor: Tensor) -> "Tensor | _ByPipe":
    if tensor.dtype == torch.uint8 and tensor.nbytes >= _SMALL and not tensor.is_shared():
        tensor = empty_pixels(*tensor.shape).copy_(tensor)
    return tensor if tensor.is_shared() else _ByPipe(tensor)


class _ByPipe:
    """A tensor that arrives as one, by its bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self.tensor.numpy(),)
