"""Where and in what numbers a model runs: device, precision, compilation, data parallelism."""

import inspect
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mpp import dist
from mpp.dist import World
from mpp.errors import ConfigError, UserError
from mpp.train.sharded import shard

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str, world: World, setting: str = "train.device") -> torch.device:
    """The device that `name` means; auto takes CUDA (one device per local rank), else the CPU.

    Raises:
        UserError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{setting} {name!r} is not a device; take auto, cuda, cuda:1 or cpu") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index if device.index is not None else world.local_rank
        if index >= count:
            raise UserError(f"{setting} {name}: this machine has {count} CUDA devices; take auto or cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"{setting} {name!r} is not supported; take auto, cuda, cuda:1 or cpu")
    return device


def refuse_shared(device: torch.device, setting: str = "train.device") -> None:
    """Refuses a GPU that another rank has too; for all ranks together.

    Raises:
        ConfigError: on all ranks.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    first: dict[str, int] = {}
    for rank, other in enumerate(dist.gather(gpu)):
        if other and first.setdefault(other, rank) != rank:
            raise ConfigError(
                f"{setting}: ranks {first[other]} and {rank} would share the GPU {other}; take auto or cuda, by which "
                "each process that torchrun starts on a machine has its own, and no more processes than GPUs"
            )


def choose_precision(name: str, device: torch.device, setting: str = "train.precision") -> str:
    """bf16, fp16 or fp32 for `name` on `device`; auto takes bf16 where the hardware computes it.

    Raises:
        UserError: fp16 elsewhere than on CUDA.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"{setting} fp16 needs CUDA, not {device.type}; take bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without such instructions bf16 is emulated, and slower than fp32.
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if can.get("amx_bf16") or can.get("avx512_bf16") else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a forward pass runs in `precision`, with weights in fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def prepare(
    model: nn.Module,
    device: torch.device,
    world: World,
    compile_mode: str,
    parallel: str = "ddp",
    precision: str = "fp32",
    ema: AveragedModel | None = None,
) -> nn.Module:
    """The module that the training step calls: compiled if asked for, and averaged over ranks by DDP.

    By fsdp, several ranks share out the weights of `model` and `ema` instead, in place, so the optimiser must be built
    after. auto compiles on CUDA, where there is the C compiler that torch.compile needs.

    Raises:
        UserError: fsdp in fp16.
    """
    can = device.type == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang")))
    compiled = compile_mode == "on" or (compile_mode == "auto" and can)
    if world.size > 1 and parallel == "fsdp":
        if precision == "fp16":
            raise UserError(
                "train.parallel fsdp has no loss scaling for fp16; take train.precision bf16 or fp32, or ddp"
            )
        shard(model, device, world.size, precision, compiled)
        if ema is not None:
            shard(ema.module, device, world.size, precision)
        return model
    if compiled:
        model.compile()
    if world.size > 1:
        ids = [device.index] if device.type == "cuda" else None
        # Only batch normalisation changes buffers (`share_statistics`); torch 2.13 renamed the switch.
        known = inspect.signature(DistributedDataParallel).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {switch: False}
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)
    return model


def share_statistics(model: nn.Module, *copies: nn.Module | None) -> None:
    """Averages the running statistics of batch normalisation over all ranks, and copies them into `copies`.

    Training never reads them, so ranks may see different batches; whoever tests or saves must see the same statistics.
    """
    held = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    parts = [part for module in held for part in (module.running_mean, module.running_var) if part is not None]
    if not parts:
        return
    mean = dist.sum_over_ranks(torch.cat([part.flatten() for part in parts])) / dist.rank_and_size()[1]
    for part, value in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))
    for copy in copies:
        if copy is not None:
            own = copy.module if isinstance(copy, AveragedModel) else copy
            for buffer, value in zip(own.buffers(), model.buffers(), strict=True):
                buffer.copy_(value)


def gradient_sync(model: nn.Module, on: bool) -> AbstractContextManager[None]:
    """The context of a backward pass whose gradients are (not) averaged over ranks at once."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
    no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(model, "no_sync", None)
    return nullcontext() if on or no_sync is None else no_sync()
