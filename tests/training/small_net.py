"""A small model with blocks, sharded or whole, its training and its checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpp.training.checkpoint import Checkpoints
from mpp.training.loop import State, fit
from mpp.training.optim import build_ema, build_optimizer, parameter_groups
from mpp.training.saving import Saving
from mpp.training.schedule import Schedule
from mpp.training.settings import OptimConfig
from mpp.training.sharded import shard

CPU = torch.device("cpu")
SCHEDULE = Schedule(6, 4, 2, lambda step: 0.1, clip_norm=0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes.add(self.linear.weight.dtype)
        return x + self.linear(self.norm(x)).relu()


class Net(nn.Module):
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 1)
        self.register_buffer("offset", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.position)) + self.offset


def build(sharded: bool, optimiser: str = "adamw", precision: str = "fp32", ema: float = 0.5) -> State:
    torch.manual_seed(0)
    model = Net()
    average = build_ema(model, ema)
    if sharded:
        shard(model, CPU, 1, precision)
        if average is not None:
            shard(average.module, CPU, 1, precision)
    config = OptimConfig(name=optimiser)
    return State(model, build_optimizer(parameter_groups(model, 0.1), config), average)


def batches(start: int) -> Iterator[Tensor]:
    for number in range(start // 2, 99):
        yield torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(number))


def step(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=getattr(model, "bf16", False)):
        loss = model(batch).float().square().mean()
    return loss, {"loss": torch.stack([loss.detach().double(), torch.ones((), dtype=torch.float64)])}


def train(state: State, until: int = 6) -> State:
    schedule = Schedule(until, *(SCHEDULE.batch_size, SCHEDULE.accumulate, SCHEDULE.rate, SCHEDULE.clip_norm))
    fit(state, state.model, batches(state.images_seen), step, schedule)
    return state


def save(state: State, folder: Path) -> Path:
    with Saving(SCHEDULE, Checkpoints(folder), lambda: None, None) as saving:
        saving(state)
    latest = saving.checkpoints.latest()
    assert latest is not None
    return latest


def gathered(state: Any) -> Any:
    """The state with whole tensors."""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return state.full_tensor() if isinstance(state, DTensor) else state
