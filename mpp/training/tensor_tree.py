"""States of runs, trees of dicts and lists with tensors in them, and how a sharded run holds each tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

Key = tuple[str | int, ...]
"""Where a tensor stands in a state: ("optimizer", "state", 3, "exp_avg")."""
Like = Callable[[Key], DTensor | None]
"""Gives the sharded tensor that the one at a key of a state is to be like; None: that one is to be whole."""


def map_tensors(state: Any, function: Callable[[Key, Tensor], Any], key: Key = ()) -> Any:
    """Return the state in dicts and lists of its own, each tensor replaced by what `function` makes of it."""
    if isinstance(state, dict):
        return {name: map_tensors(value, function, (*key, name)) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map_tensors(value, function, (*key, number)) for number, value in enumerate(state))
    return function(key, state) if isinstance(state, Tensor) else state


def like_these(model: nn.Module, optimizer: Optimizer, ema: nn.Module | None) -> Like:
    """Return how the tensors of a run's state are sharded, for a state to be loaded."""
    known: dict[Key, Tensor] = {("model", name): value for name, value in model.state_dict().items()}
    known |= {("ema", name): value for name, value in (ema.state_dict() if ema is not None else {}).items()}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    known |= {("optimizer", "state", number): parameter.detach() for number, parameter in enumerate(parameters)}

    def like(key: Key) -> DTensor | None:
        found = known.get(key[:3])
        return found if isinstance(found, DTensor) else None

    return like


def share(value: Tensor, like: DTensor | None) -> Tensor:
    """Return this rank's shard of a tensor that every rank has; a whole copy where nothing of its shape is sharded."""
    if like is None or like.shape != value.shape:
        return value.clone()
    shard = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=value.dtype).copy_(shard)  # without the rest of the storage
