"""Where and in what numbers a model runs: device, precision, compilation, data parallelism."""

import functools
import inspect
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mpp import dist
from mpp.dist import World
from mpp.errors import ConfigError, UserError
from mpp.training.optim import MovingAverage
from mpp.training.sharded import shard

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str, world: World, setting: str = "train.device") -> torch.device:
    """Return the device that `name` means; auto takes CUDA (one device per local rank), else the CPU.

    Raises UserError for one that is not there.
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
    """Raise ConfigError on all ranks, which call it together, where two of them have the same GPU."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    first: dict[str, int] = {}
    for rank, other in enumerate(dist.gather(gpu)):
        if other and first.setdefault(other, rank) != rank:
            raise ConfigError(
                f"{setting}: ranks {first[other]} and {rank} would share the GPU {other}; take auto or cuda, by which "
                "each process that torchrun starts on a machine has its own, and no more processes than GPUs"
            )


def choose_precision(name: str, device: torch.device, setting: str = "train.precision") -> str:
    """Return bf16, fp16 or fp32 for `name` on `device`; auto takes bf16 where the hardware computes it.

    Raises UserError for fp16 elsewhere than on CUDA.
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
    """Return the context in which a forward pass runs in `precision`, with weights in fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


@functools.cache
def compile_obstacle(device: torch.device) -> str | None:
    """Return why torch.compile does not work on this GPU, and what to do; None where it works, which is tried.

    Before the first kernel Triton builds a module for Python from C.
    """
    named = os.environ.get("CC")
    if not any(map(shutil.which, (named,) if named else ("gcc", "clang"))):
        return f"there is no C compiler{f' {named}, which CC names' * bool(named)}: install one, such as gcc"
    headers = sysconfig.get_path("include", "posix_prefix")
    if not Path(headers, "Python.h").is_file():
        return f"there is no Python.h in {headers}: install Python's headers (python3-dev, python3-devel)"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of torch, Triton, the compiler, the file system
        reason = error.__cause__ or getattr(error, "inner_exception", None) or error
        first_line = str(reason).strip().partition("\n")[0] or type(reason).__name__
        needs = "a CUDA driver, a GPU that Triton supports and room in TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR"
        return f"a first trial failed ({first_line}): see what it needs, such as {needs}"
    return None


@functools.cache
def _warn_uncompiled(obstacle: str) -> None:
    print(f"WARNING: not compiled, and slower: torch.compile does not work here, for {obstacle}", file=sys.stderr)


def prepare(
    model: nn.Module,
    device: torch.device,
    world: World,
    compile_mode: str,
    parallel: str = "ddp",
    precision: str = "fp32",
    ema: MovingAverage | None = None,
    around: nn.Module | None = None,
) -> nn.Module:
    """Return the module that the training step calls: `model`, or a module `around` it that computes more of the step.

    It is compiled if asked for, and averaged over ranks by DDP. By fsdp, several ranks share out the weights of `model`
    and `ema` instead, in place, so the optimiser must be built after. auto compiles on CUDA; where that cannot work, it
    warns once and leaves the module as it is, while on raises UserError, as does fsdp in fp16.
    """
    called = around or model
    compiled = compile_mode == "on" or (compile_mode == "auto" and device.type == "cuda")
    obstacle = compile_obstacle(device) if compiled and device.type == "cuda" else None
    if obstacle and compile_mode == "on":
        raise UserError(f"train.compile on: torch.compile does not work here, for {obstacle}; or take auto or off")
    if obstacle:
        compiled = False
        if world.local_rank == 0:
            _warn_uncompiled(obstacle)
    if world.size > 1 and parallel == "fsdp":
        if precision == "fp16":
            raise UserError(
                "train.parallel fsdp has no loss scaling for fp16; take train.precision bf16 or fp32, or ddp"
            )
        shard(model, device, world.size, precision, compiled)
        if ema is not None:
            shard(ema.module, device, world.size, precision)
        return called
    if compiled:
        called.compile()
    if world.size == 1:
        return called
    ids = [device.index] if device.type == "cuda" else None
    # Only batch normalisation changes buffers (`share_statistics`); torch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False}
    return DistributedDataParallel(called, device_ids=ids, gradient_as_bucket_view=True, **options)


def share_statistics(model: nn.Module, ema: MovingAverage | None) -> None:
    """Average the running statistics of batch normalisation over all ranks, and copy them into the moving average.

    Training never reads them, so ranks may see different batches; whoever tests or saves must see the same statistics.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    parts = [part for layer in layers for part in (layer.running_mean, layer.running_var) if part is not None]
    if not parts:
        return
    mean = dist.sum_over_ranks(torch.cat([part.flatten() for part in parts])) / dist.rank_and_size()[1]
    for part, value in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))
    for buffer, value in zip(ema.module.buffers(), model.buffers(), strict=True) if ema is not None else ():
        buffer.copy_(value)


def gradient_sync(model: nn.Module, on: bool) -> AbstractContextManager[None]:
    """Return the context of a backward pass whose gradients DDP averages over ranks at once, or not yet.

    FSDP always does: else every device would keep whole gradients until the last pass of an update, 4 bytes a
    parameter, where its share of them is all that it needs.
    """
    no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(model, "no_sync", None)
    return nullcontext() if on or no_sync is None else no_sync()
