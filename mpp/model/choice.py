"""Which attention kernel a model computes by: the one named, or the fastest of those that run here and fit in memory.

task_of(model, batch=64, ...) -> Task        what attention is computed for
choose_kernel("auto", task) -> "explicit"    timed for these shapes, at most once a machine
"""

import contextlib
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpp import dist
from mpp.errors import UserError
from mpp.model.attention import KERNELS, Attention, use_kernel, xformers_obstacle
from mpp.system.cores import memory
from mpp.system.files import cache_folder, write_whole

_MARGIN = 0.95  # of the time of the kernel that takes the least memory, below which another one is taken
_SHARE = 0.25  # of the memory, that attention weights may take
_SAMPLE_FLOPS = 4e9  # of what a CPU is timed by: fewer images, or heads, where the run's own batch would take long
_SECONDS, _ROUNDS = 0.4, 7
_FILE = "attention.json"  # in the cache's folder
EVALUATION_BATCH = 128
"""Images that are evaluated at a time, in a run and after it."""


@dataclass(frozen=True)
class Task:
    """What attention is computed for: images of one size, in passes of so many.

    Attributes:
        batch: images in a pass; 0: not known.
        tokens: of an image.
        heads, width: attention heads, and features of each.
        blocks: those whose attention weights are in memory at once while training.
        training: backward, too; evaluations in between go without, in passes of `EVALUATION_BATCH` images.
        device, dtype: where and in which type queries, keys and values are.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    blocks: int
    training: bool
    device: torch.device
    dtype: torch.dtype

    def fits(self) -> bool:
        """Whether memory has room for the explicit kernel's attention weights, B H N N a block."""
        images = 3 * self.batch  # three times while a block computes
        if self.training:
            images = max(images + self.blocks * self.batch, 3 * EVALUATION_BATCH)
        size = images * self.heads * self.tokens**2 * self.dtype.itemsize
        return size <= _SHARE * memory() / max(1, dist.world_from_environment().local_size)

    @property
    def sample(self) -> tuple[int, int, int, int] | None:
        """Batch, tokens, heads and width that are timed; None where even a single head would take too long."""
        if self.device.type == "cuda":
            return self.batch, self.tokens, self.heads, self.width
        of_head = (12 if self.training else 4) * self.tokens**2 * self.width
        if of_head > _SAMPLE_FLOPS:
            return None
        heads = max(1, min(self.batch * self.heads, int(_SAMPLE_FLOPS // of_head)))
        return max(1, heads // self.heads), self.tokens, min(heads, self.heads), self.width


def task_of(model: nn.Module, batch: int, training: bool, device: torch.device, dtype: torch.dtype) -> Task | None:
    """What attention is computed for in a timm ViT with our layers, or in what holds one; None where there is none."""
    own = [module for module in model.modules() if isinstance(module, Attention)]
    vit: Any = next((module for module in model.modules() if isinstance(module, VisionTransformer)), None)
    if not own or vit is None:
        return None
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    blocks = 1 if vit.grad_checkpointing else len(own)
    return Task(batch, tokens, own[0].num_heads, own[0].head_dim, blocks, training, device, dtype)


def choose_kernel(name: str, task: Task) -> str:
    """The kernel that `name` means for `task`.

    "auto" takes xformers where it runs, else sdpa, unless another kernel is more than 5 % faster: on CUDA sdpa, on a
    CPU the explicit one, where its attention weights fit in a quarter of the memory. What was timed once on a machine
    stands in the cache, so that noise does not decide differently the next time.

    Raises:
        UserError: a kernel asked for by name that cannot run here, with the reason.
    """
    if name not in ("auto", "xformers"):
        return name
    obstacle = xformers_obstacle(task.device, task.dtype, task.width)
    if obstacle and name == "xformers":
        raise UserError(f"model.attention xformers cannot run here: {obstacle}; use auto or sdpa")
    if name == "xformers":
        return name
    candidates = ["sdpa"] if obstacle else ["xformers", "sdpa"]
    if task.device.type == "cpu" and task.batch and task.fits():
        candidates.append("explicit")
    return _fastest(tuple(candidates), task) if task.batch and len(candidates) > 1 else candidates[0]


def settle_kernel(name: str, saved: str, task: Task | None, *models: nn.Module | None) -> str:
    """Chooses a run's attention kernel on rank 0 and sets it everywhere; a resumed run keeps its own, for its bits.

    Args:
        name: what the config asks for.
        saved: what this returned when the run began; empty of a run that begins.
        task: what attention is computed for; None where it is not ours.
        models: the model, and a moving average.

    Returns:
        The kernel and the type of device, as "explicit cpu", for the run's checkpoints.
    """
    if task is None:
        return ""
    kernel, _, device = saved.partition(" ")
    if name == "auto" and device == task.device.type and _runs(kernel, task):
        name = kernel
    rank, _ = dist.rank_and_size()
    kernel = dist.gather(choose_kernel(name, task) if rank == 0 else "")[0]
    for model in models:
        if model is not None:
            use_kernel(model, kernel)
    return f"{kernel} {task.device.type}"


def _runs(kernel: str, task: Task) -> bool:
    """Whether a run that may come from another machine can go on with its kernel."""
    if kernel == "xformers":
        return not xformers_obstacle(task.device, task.dtype, task.width)
    return kernel == "sdpa" or (kernel == "explicit" and task.fits())


def _fastest(names: tuple[str, ...], task: Task) -> str:
    """The fastest of them; the first, unless another one needs less than `_MARGIN` of its time."""
    sample = task.sample
    if sample is None:
        return names[0]
    key = f"{'/'.join(names)}: {_machine(task.device)}, {task.dtype}, {sample}, {'backward' * task.training}"
    path = cache_folder() / _FILE
    known = _read(path)
    if known.get(key) not in names:
        took = time_kernels(names, sample, task.device, task.dtype, training=task.training)
        best = min(took, key=lambda each: took[each])
        known = {**_read(path), key: best if took[best] < _MARGIN * took[names[0]] else names[0]}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: file.write(json.dumps(known, indent=1).encode()))
    return known[key]


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _machine(device: torch.device) -> str:
    """What of hardware and software decides which kernel is fast."""
    if device.type == "cuda":
        with contextlib.suppress(PackageNotFoundError):
            return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, xformers {version('xformers')}"
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open("rb") as file:
        for line in file:
            if line.startswith(b"model name"):
                return line.partition(b":")[2].strip().decode(errors="replace")
    return platform.processor() or platform.machine()


def forward_backward(
    name: str, joint: Float[Tensor, "B N 3 H E"], towards: Float[Tensor, "B N H E"]
) -> Float[Tensor, "B N 3 H E"]:
    """The gradient of queries, keys and values through this kernel; they lie in memory as `Attention` has them."""
    return torch.autograd.grad(_forward(name, joint), joint, towards)[0]


def _forward(name: str, joint: Float[Tensor, "B N 3 H E"]) -> Float[Tensor, "B N H E"]:
    q, k, v = (part.transpose(1, 2) for part in joint.unbind(2))
    return KERNELS[name](q, k, v, 0.0).transpose(1, 2)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What `work` takes on the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        work()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_kernels(
    names: Sequence[str],
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[Callable[[], object], torch.device], float] = seconds,
    rounds: int = _ROUNDS,
    training: bool = True,
) -> dict[str, float]:
    """What each kernel takes, in seconds: medians of `clock`, the kernels in turns.

    Args:
        names: of `KERNELS`; xformers after `xformers_obstacle` found none.
        shape: batch, tokens, heads and head width; queries, keys and values lie in memory as `Attention` has them.
        device, dtype: of queries, keys and values.
        clock: calls what it is given and says how long that took.
        rounds: calls of each kernel that count, fewer where they take long; two more come before them.
        training: forward and backward, not forward alone.
    """
    batch, tokens, heads, width = shape
    source = torch.Generator(device).manual_seed(0)  # the run's own stream of draws stays as it is
    joint = torch.randn(batch, tokens, 3, heads, width, generator=source, device=device, dtype=dtype)
    towards = torch.randn(batch, tokens, heads, width, generator=source, device=device, dtype=dtype)
    times: list[list[float]] = []
    with torch.set_grad_enabled(training):
        if training:
            joint.requires_grad_()
            works = [functools.partial(forward_backward, name, joint, towards) for name in names]
        else:
            works = [functools.partial(_forward, name, joint) for name in names]
        while len(times) < 2 + rounds and (len(times) < 3 or sum(map(sum, times)) < _SECONDS):
            times.append([clock(work, device) for work in works])
    return {name: statistics.median(column) for name, column in zip(names, zip(*times[2:], strict=True), strict=True)}
