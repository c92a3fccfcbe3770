"""Saving while the run goes on: it waits for a copy of its state to host memory, and a thread writes the copy."""

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mpp import dist
from mpp.training.checkpoint import Checkpoints
from mpp.training.loop import Interrupted, State
from mpp.training.schedule import Schedule
from mpp.training.tensor_tree import Key, map_tensors


class Saving:
    """The function that saves a state of the run; called on all ranks together.

    As a context it is left only when what was begun is on disk. The next save waits for that too, and where writing
    failed either raises a RunError that says why; `failed` tells beforehand.
    """

    def __init__(
        self, schedule: Schedule, checkpoints: Checkpoints, flush_rows: Callable[[], None], saved_step: int | None
    ) -> None:
        """`saved_step`: the step that is saved already, if any."""
        self.checkpoints = checkpoints
        self._schedule, self._flush_rows = schedule, flush_rows
        self._saved_step = saved_step
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: torch_dist.ProcessGroup | None = None

    def __call__(self, state: State) -> None:
        step = self._schedule.step(state.images_seen)
        self.wait()
        if step == self._saved_step:
            return
        self._flush_rows()  # a checkpoint must never be newer than the rows that lead to it
        content = state.state_dict()
        if state.sharded and self._group is None:
            # A group of its own, since the thread's turn comes at any time.
            self._group = cast(torch_dist.ProcessGroup, torch_dist.new_group(backend="gloo", timeout=dist.timeout()))
        if state.sharded or dist.rank_and_size()[0] == 0:
            copied = self._copy(content)
            self._thread = threading.Thread(target=self._write, args=(step, copied), daemon=True)
            self._thread.start()
        self._saved_step = step

    @property
    def failed(self) -> bool:
        """Whether this rank could not write what was saved last."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until what was saved last is on disk; raises RunError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, content: dict[str, Any]) -> None:
        try:
            self._copy.finish()
            self.checkpoints.save(step, content, self._group)
        except BaseException as error:  # for the thread that trains to raise
            self._error = error

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error that ends the run is more important than a failed save; but a stopped run says that it was saved.
        important = error is None or isinstance(error, Interrupted)
        with contextlib.nullcontext() if important else contextlib.suppress(Exception):
            self.wait()


class HostCopy:
    """Copies of a state in host memory, in the same buffers each time, pinned where they come from CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[Key, Tensor] = {}
        self._mesh: DeviceMesh | None = None
        self._device: torch.device | None = None  # the CUDA device that tensors come from
        self._copied: torch.cuda.Event | None = None

    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the copy; of tensors on CUDA it is begun, in the order of what else the device does."""
        copy = map_tensors(state, self._tensor)
        if self._device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copy

    def finish(self) -> None:
        """Wait for what was begun; may be called by another thread."""
        if self._device is not None and self._copied is not None:
            torch.cuda.set_device(self._device)  # a new thread has the first one, where it would take memory
            self._copied.synchronize()

    def _tensor(self, key: Key, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return self._plain(key, value)
        if self._mesh is None:
            self._mesh = init_device_mesh("cpu", (torch_dist.get_world_size(),))
        local, size, stride = self._plain(key, value.to_local()), value.shape, value.stride()
        return DTensor.from_local(local, self._mesh, value.placements, run_check=False, shape=size, stride=stride)

    def _plain(self, key: Key, value: Tensor) -> Tensor:
        if value.is_cuda:
            self._device = value.device
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            self._buffers[key] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)
