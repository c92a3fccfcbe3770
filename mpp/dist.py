"""Several processes under `torchrun`, or one without it: who we are, and what all processes agree on."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, local_rank of local_size on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def world_from_environment() -> World:
    """What torchrun set, or a world of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


_patient: list[Any] = []  # the group of those who wait while one prepares the data, which may take hours


def start(world: World, device: torch.device) -> None:
    """Joins the process group: nccl with gloo for CPU tensors on CUDA, gloo elsewhere. Nothing for a world of one."""
    if world.size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        _patient.append(dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)))


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        _patient.clear()
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes, of the group that was started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(patient: bool = False) -> None:
    """Waits for all processes: 30 minutes, or as long as preparing the data may take."""
    if dist.is_initialized():
        dist.barrier(_patient[0] if patient else None)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, on all of them."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process; by CPU tensors, so that no device has to be waited for."""
    if not dist.is_initialized():
        return flag
    tensor = torch.tensor([int(flag)])
    dist.all_reduce(tensor)
    return bool(tensor.item())


def gather(value: Any) -> list[Any]:
    """Everybody's value (picklable), in order of rank, on all processes."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
