"""Fully sharded data parallelism (FSDP2): each rank keeps its share of the weights, their moments and their average.

Parameters become DTensors, which optimiser, averages and gradient clipping take as they are. Training calls the model,
which gathers a block at a time; pictures, few-shot accuracy, tests and exports take it `whole`.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)

_twins: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # of sharded models, without weights


def shard(model: nn.Module, device: torch.device, size: int, precision: str, compiled: bool = False) -> None:
    """Share the weights of `model` out among `size` ranks, in place, by transformer block and what is left of it.

    The shards stay fp32, and so do the sums of gradients. For bf16 the blocks are gathered in bf16; embeddings, last
    norm and head are not, nor (on CUDA) is what enters a block, so that the residual stream is as precise as by
    autocast alone. `compiled` blocks are compiled one by one.
    """
    # The twin has the model's parameters and buffers on "meta"; of a sharded model none can be made.
    empty: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    _twins[model] = copy.deepcopy(model, empty)
    mesh = init_device_mesh(device.type, (size,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        # On the CPU autocast leaves LayerNorm alone, whose input and weights must then be of one type.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=device.type == "cpu")
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]  # timm's name
    blocks = [block for blocks in lists for block in blocks.children()]
    if compiled:  # one code for all of them, which stochastic depth and the last block's output make several
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        if compiled:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was called on the model."""
    return model in _twins


@contextlib.contextmanager
def whole(model: M) -> Iterator[M]:
    """Give `model` itself; of a sharded one, a copy with all its weights, for as long as it is used.

    To be entered on all ranks together; inside, each may do as it likes. The copy costs every device 4 bytes a
    parameter, and one gathering instead of one a batch.
    """
    twin = _twins.get(model)
    if twin is None:
        yield model
        return
    twin.to_empty(device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                twin.get_parameter(name).copy_(cast(DTensor, parameter).full_tensor())
            for name, buffer in model.named_buffers():
                twin.get_buffer(name).copy_(buffer)
        yield cast(M, twin)
    finally:
        twin.to("meta")


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Return the norm of all gradients of `model` together, scaling them down to `max_norm` where that is above 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm:  # else nothing must touch them: an overflow of the norm alone would make them NaN
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
