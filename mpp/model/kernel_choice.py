"""Which attention kernel a model computes by: the one named, or the fastest of those that run here and fit in memory.

task_of(model, batch=64, ...) -> Task        what attention is computed for
choose_kernel("auto", task) -> "explicit"    timed for these shapes, at most once a machine
"""

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpp import dist
from mpp.errors import UserError
from mpp.model.attention import KERNELS, Attention, use_kernel, xformers_obstacle
from mpp.system.cores import memory, processor
from mpp.system.files import cache_folder, write_whole

_FASTER = 0.95  # of the default kernel's time: another kernel must need less to be taken
_MEMORY_SHARE = 0.25  # that attention weights may take
_SAMPLE_FLOPS = 4e9  # timed on a CPU, where the run's own batch would take long: fewer images, or heads
_SECONDS, _ROUNDS = 0.4, 7
EVALUATION_BATCH = 128
"""Images that are evaluated at a time, in a run and after it."""


@dataclass(frozen=True)
class Task:
    """What attention is computed for."""

    batch: int
    """Images in a pass; 0: not known."""
    tokens: int
    heads: int
    width: int
    """Features of a head."""
    blocks: int
    """Those whose attention weights are in memory at once while training."""
    training: bool
    """Forward and backward; evaluations in between run forward, with `EVALUATION_BATCH` images."""
    device: torch.device
    dtype: torch.dtype

    def fits(self) -> bool:
        """Whether memory has room for the explicit kernel's attention weights, B H N N a block."""
        images = 3 * self.batch  # three times while a block computes
        if self.training:
            images = max(images + self.blocks * self.batch, 3 * EVALUATION_BATCH)
        size = images * self.heads * self.tokens**2 * self.dtype.itemsize
        return size <= _MEMORY_SHARE * memory() / max(1, dist.world_from_environment().local_size)

    @property
    def sample(self) -> tuple[int, int, int, int] | None:
        """Batch, tokens, heads and width to time; None if even a single head would take too long."""
        if self.device.type == "cuda":
            return self.batch, self.tokens, self.heads, self.width
        head_flops = (12 if self.training else 4) * self.tokens**2 * self.width
        if head_flops > _SAMPLE_FLOPS:
            return None
        heads = max(1, min(self.batch * self.heads, int(_SAMPLE_FLOPS // head_flops)))
        return max(1, heads // self.heads), self.tokens, min(heads, self.heads), self.width


def task_of(model: nn.Module, batch: int, training: bool, device: torch.device, dtype: torch.dtype) -> Task | None:
    """The task of a timm ViT with our layers, or of a module around one; None without our layers."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    vit: Any = next((module for module in model.modules() if isinstance(module, VisionTransformer)), None)
    if not layers or vit is None:
        return None
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    blocks = 1 if vit.grad_checkpointing else len(layers)
    return Task(batch, tokens, layers[0].num_heads, layers[0].head_dim, blocks, training, device, dtype)


def choose_kernel(name: str, task: Task) -> str:
    """The kernel that `name` means for `task`.

    "auto" takes xformers where it runs, else sdpa, unless another kernel is more than 5 % faster: on CUDA sdpa, on a
    CPU the explicit one, if its attention weights fit in a quarter of the memory. The cache keeps what was timed, so
    that noise does not decide differently the next time.

    Raises:
        UserError: a kernel asked for by name that cannot run here, with the reason.
    """
    if name not in ("auto", "xformers"):
        return name
    obstacle = xformers_obstacle(task.device, task.dtype, task.width)
    if name == "xformers":
        if obstacle:
            raise UserError(f"model.attention xformers cannot run here: {obstacle}; use auto or sdpa")
        return name
    candidates = ["sdpa"] if obstacle else ["xformers", "sdpa"]
    if task.device.type == "cpu" and task.batch and task.fits():
        candidates.append("explicit")
    sample = task.sample if task.batch and len(candidates) > 1 else None
    return candidates[0] if sample is None else _fastest(candidates, task, sample)


def settle_kernel(name: str, saved: str, task: Task | None, *models: nn.Module | None) -> str:
    """Chooses a run's attention kernel on rank 0 and sets it in the models of all ranks.

    Returns the kernel and the type of device, as "explicit cpu", for the run's checkpoints. A resumed run gives it as
    `saved` (else empty), and keeps its kernel, for its bits. Without our layers, `task` is None.
    """
    if task is None:
        return ""
    kernel, _, device = saved.partition(" ")
    if name == "auto" and device == task.device.type:
        # The run may come from another machine.
        refused = kernel == "xformers" and xformers_obstacle(task.device, task.dtype, task.width)
        if kernel in KERNELS and not refused and (kernel != "explicit" or task.fits()):
            name = kernel
    rank, _ = dist.rank_and_size()
    kernel = dist.gather(choose_kernel(name, task) if rank == 0 else "")[0]
    for model in models:
        if model is not None:
            use_kernel(model, kernel)
    return f"{kernel} {task.device.type}"


def _fastest(names: Sequence[str], task: Task, sample: tuple[int, int, int, int]) -> str:
    """The fastest of these kernels; the first, unless another one is clearly faster."""
    key = f"{'/'.join(names)}: {_machine(task.device)}, {task.dtype}, {sample}, {'backward' * task.training}"
    path = cache_folder() / "attention.json"
    known = _read(path)
    if known.get(key) not in names:
        times = time_kernels(names, sample, task.device, task.dtype, training=task.training)
        best = min(times, key=lambda name: times[name])
        known = {**_read(path), key: best if times[best] < _FASTER * times[names[0]] else names[0]}
        with contextlib.suppress(OSError):
            write_whole(path, json.dumps(known, indent=1))
    return known[key]


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _machine(device: torch.device) -> str:
    """The hardware and software on which it depends which kernel is fast."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
        with contextlib.suppress(PackageNotFoundError):
            name += f", xformers {version('xformers')}"
        return name
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def time_kernels(
    names: Sequence[str],
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    training: bool = True,
) -> dict[str, float]:
    """Median seconds of each of these `KERNELS`, timed in turns, at most 7 times each and 0.4 s in all.

    `shape` is batch, tokens, heads and head width; `training` times forward and backward, not forward alone.
    """
    batch, tokens, heads, width = shape
    source = torch.Generator(device).manual_seed(0)  # the run's own stream of draws stays as it is
    joint = torch.randn(batch, tokens, 3, heads, width, generator=source, device=device, dtype=dtype)
    towards = torch.randn(batch, tokens, heads, width, generator=source, device=device, dtype=dtype)
    times: list[list[float]] = []  # of the rounds; the first two are for warming up
    with torch.set_grad_enabled(training):
        joint.requires_grad_(training)
        run = functools.partial(forward_backward, towards=towards) if training else _forward
        while len(times) < 2 + _ROUNDS and (len(times) < 3 or sum(map(sum, times)) < _SECONDS):
            times.append([_seconds(functools.partial(run, name, joint), device) for name in names])
    return {name: statistics.median(column) for name, column in zip(names, zip(*times[2:], strict=True), strict=True)}


def forward_backward(
    name: str, joint: Float[Tensor, "B N 3 H E"], towards: Float[Tensor, "B N H E"]
) -> Float[Tensor, "B N 3 H E"]:
    """The gradient of queries, keys and values through this kernel; they lie in memory as `Attention` has them."""
    return torch.autograd.grad(_forward(name, joint), joint, towards)[0]


def _forward(name: str, joint: Float[Tensor, "B N 3 H E"]) -> Float[Tensor, "B N H E"]:
    q, k, v = (part.transpose(1, 2) for part in joint.unbind(2))
    return KERNELS[name](q, k, v, 0.0).transpose(1, 2)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began
