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
_LEAST_BYTES = 2**16  # from which on shared memory is worth its open file
_SPARE_FILES = 24  # that a worker needs to send batches, and for what it decodes
T = TypeVar("T")
_noted = False  # once a process


def free_bytes() -> int:
    """Bytes of shared memory that are free; `sys.maxsize` on systems that do not say so."""
    try:
        system = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return system.f_bavail * system.f_frsize


def note_if_tight(batch: int, workers: int) -> None:
    """Says on stderr, once, where there is too little shared memory for batches of so many bytes."""
    global _noted
    wanted, free = batch * (2 * workers + 3), free_bytes()  # two of each worker's, one in use, as many spare
    if workers and wanted > free and not _noted:
        _noted = True
        print(
            f"note: {_SHARED_MEMORY} has {free / 1e6:,.0f} MB free, the batches of {workers} workers would take "
            f"{wanted / 1e6:,.0f}: those without room there travel by pipes, which takes longer; a container gets more "
            f"by --shm-size {math.ceil(2 * wanted / 2**30)}g",
            file=sys.stderr,
        )


def empty_pixels(*shape: int) -> Tensor:
    """uint8, unset; in a loader worker, if there is room, in shared memory, so that it need not be copied."""
    size = math.prod(shape)
    # Half of what is free at most: NCCL and other processes need some, too.
    if get_worker_info() is not None and _LEAST_BYTES <= size <= free_bytes() // 2 and files_left() >= _SPARE_FILES:
        try:
            storage = torch.UntypedStorage._new_shared(size)  # as torch's own collate does
        except RuntimeError:  # another process was faster, or no more files can be opened
            pass
        else:
            return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    return torch.empty(shape, dtype=torch.uint8)


def sendable(batch: T) -> T:
    """A batch as a loader worker sends it; in the main process, as it is.

    Left to torch, every tensor would be moved to shared memory, in a thread whose errors nobody sees.
    """
    if get_worker_info() is None or not isinstance(batch, dict):
        return batch
    ready: Any = {key: _sendable(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return ready


def _sendable(tensor: Tensor) -> "Tensor | _ByPipe":
    if tensor.dtype == torch.uint8 and tensor.nbytes >= _LEAST_BYTES and not tensor.is_shared():
        tensor = empty_pixels(*tensor.shape).copy_(tensor)
    return tensor if tensor.is_shared() else _ByPipe(tensor)


class _ByPipe:
    """A tensor that arrives as one, by its bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self.tensor.numpy(),)
