"""Fully sharded data parallelism (FSDP2): each rank keeps its share of the weights, their moments and their average.

Parameters become DTensors, which optimiser, averages and gradient clipping take as they are. Who trains calls the
model, which gathers a block at a time; who looks at it (pictures, few-shot accuracy, tests, export) takes it `whole`.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mpp.training.nested import Place

M = TypeVar("M", bound=nn.Module)

Like = Callable[[Place], DTensor | None]
"""The sharded tensor of this run that the one at a place of a state is to be like; None: that one is to be whole."""

_emptied: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # a sharded model's twin without weights


def shard(model: nn.Module, device: torch.device, size: int, precision: str, compiled: bool = False) -> None:
    """Shares the weights of `model` out among `size` ranks, in place, by transformer block and what is left of it.

    The shards stay fp32, and so do the sums of gradients. For bf16 the blocks are gathered in bf16; embeddings, last
    norm and head are not, nor (on CUDA) is what enters a block, so that the residual stream is as precise as by
    autocast alone. `compiled` blocks are compiled one by one.
    """
    _emptied[model] = _without_weights(model)
    mesh = init_device_mesh(device.type, (size,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        # On the CPU autocast leaves LayerNorm alone, whose input and weights must then be of one type.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=device.type == "cpu")
    blocks = _blocks(model)
    if compiled:  # one code for all of them, which stochastic depth and the last block's output make several
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        if compiled:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return model in _emptied


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, by timm's name for what holds them."""
    held = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for blocks in held for block in blocks.children()]


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers are on "meta"; cannot be made of a sharded one."""
    empty: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy.deepcopy(model, empty)


@contextlib.contextmanager
def whole(model: M) -> Iterator[M]:
    """`model` itself; of a sharded one, a copy with all its weights, for as long as it is looked at.

    To be entered on all ranks together; inside, each may do as it likes. The copy costs every device 4 bytes a
    parameter, and one gathering instead of one a batch.
    """
    emptied = _emptied.get(model)
    if emptied is None:
        yield model
        return
    emptied.to_empty(device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                emptied.get_parameter(name).copy_(cast(DTensor, parameter).full_tensor())
            for name, buffer in model.named_buffers():
                emptied.get_buffer(name).copy_(buffer)
        yield cast(M, emptied)
    finally:
        emptied.to("meta")


def like_these(model: nn.Module, optimizer: Optimizer, ema: nn.Module | None) -> Like:
    """How the tensors of a run's state are sharded, for a state to be loaded."""
    known: dict[Place, Tensor] = {("model", name): value for name, value in model.state_dict().items()}
    known |= {("ema", name): value for name, value in (ema.state_dict() if ema is not None else {}).items()}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    known |= {("optimizer", "state", number): parameter.detach() for number, parameter in enumerate(parameters)}

    def like(place: Place) -> DTensor | None:
        found = known.get(place[:3])
        return found if isinstance(found, DTensor) else None

    return like


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """The norm of all gradients of `model` together, which it scales down to `most` where that is above 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if most:  # else nothing must touch them: an overflow of the norm alone would make them NaN
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def share(value: Tensor, like: DTensor | None) -> Tensor:
    """This rank's shard of a tensor that every rank has; a copy of it whole, where nothing of its shape is sharded."""
    if like is None or like.shape != value.shape:
        return value.clone()
    shard = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=value.dtype).copy_(shard)  # without the rest of the storage
