"""python tools/bench.py attention: the kernels that `model.attention` chooses from, for the token counts of usual ViTs.

Timed as the model calls them: queries, keys and values are views of one projection, and its gradient is the result.
"""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.settings import AttentionBench
from mpp.dist import World
from mpp.model.attention import xformers_obstacle
from mpp.model.kernel_choice import Task, choose_kernel, forward_backward
from mpp.training.parallel import DTYPES, choose_device, choose_precision
from mpp.training.timing import MEASURING, hardware, ratios, spread, synchronise

_SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SHORTEST = 0.02  # seconds; shorter spans are mostly the clock and the launch


@dataclass(frozen=True)
class AttentionRow:
    """One kernel at one size."""

    size: str
    """Image side / patch side."""
    tokens: int
    """In an image, the class token included."""
    batch: int
    kernel: str
    seconds: tuple[float, ...]
    """Of forward and backward, one a round."""
    flops: float
    """Of the four products forward and backward, not counting what a kernel computes again."""
    chosen: bool
    """Whether `model.attention auto` takes it here."""
    left_out: str = ""
    """Why it was not measured."""


def attention(config: AttentionBench) -> int:
    """Measures and prints; returns the exit code."""
    device = choose_device(config.device, World(), "device")
    print(hardware())
    print(
        f"{config.heads} heads of {config.width}, {config.tokens:,} tokens in a batch, "
        f"{choose_precision(config.precision, device, 'precision')} on {device}; forward and backward, "
        f"median (least to most) of {config.repeats}"
    )
    rows = measure(config)
    for size in config.sizes:
        of_size = [row for row in rows if row.size == size]
        print(f"\n{size}: {of_size[0].tokens:,} tokens, {of_size[0].batch:,} images")
        reference = of_size[0].seconds
        for row in of_size:
            if row.left_out:
                print(f"  {row.kernel:16} left out: {row.left_out}")
                continue
            speed = [row.flops / seconds / 1e12 for seconds in row.seconds]
            mark = "  <- auto" if row.chosen else ""
            print(
                f"  {row.kernel:16} {spread([1e3 * s for s in row.seconds], ' ms'):>28} "
                f"{spread(speed, ' TFLOP/s'):>34} {spread(ratios(reference, row.seconds), ' x'):>26}{mark}"
            )
        print(f"  x: faster than {of_size[0].kernel}")
    return 0


def measure(config: AttentionBench) -> list[AttentionRow]:
    """Every kernel at every size; those of a size in turns.

    Raises:
        UserError: a device that is not there.
    """
    device = choose_device(config.device, World(), "device")
    dtype = DTYPES[choose_precision(config.precision, device, "precision")]
    return [row for size in config.sizes for row in _of_size(size, config, device, dtype)]


def _of_size(size: str, config: AttentionBench, device: torch.device, dtype: torch.dtype) -> list[AttentionRow]:
    side, patch = map(int, size.split("/"))
    tokens = (side // patch) ** 2 + 1
    batch = max(config.tokens // tokens, 1)
    shape = (batch, tokens, 3, config.heads, config.width)
    joint = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(batch, tokens, config.heads, config.width, device=device, dtype=dtype)
    runs: dict[str, Callable[[], object]] = {}
    obstacles: dict[str, str] = {}
    for kernel in ("xformers", "sdpa", *_SDPA, "explicit"):
        obstacle = xformers_obstacle(device, dtype, config.width) if kernel == "xformers" else None
        if obstacle is None:
            run, obstacle = _tried(kernel, joint, gradient)
        if obstacle is None:
            runs[kernel] = run
        else:
            obstacles[kernel] = obstacle
    times = _in_turns(runs, config.repeats, device)
    chosen = choose_kernel("auto", Task(batch, tokens, config.heads, config.width, 12, True, device, dtype))
    # Two products forward; backward they are computed again, and each gives two more: 2.5 times the forward pass.
    flops = 3.5 * 4 * batch * config.heads * tokens**2 * config.width
    return [
        AttentionRow(size, tokens, batch, kernel, tuple(times[kernel]), flops, kernel == chosen) for kernel in times
    ] + [AttentionRow(size, tokens, batch, kernel, (), flops, False, why) for kernel, why in obstacles.items()]


def _tried(kernel: str, joint: Tensor, gradient: Tensor) -> tuple[Callable[[], object], str | None]:
    """One forward and backward pass by this kernel, and why it cannot run here, if so."""

    def run() -> Tensor:
        only: AbstractContextManager[object] = sdpa_kernel(_SDPA[kernel]) if kernel in _SDPA else nullcontext()
        with only:
            return forward_backward("sdpa" if kernel in _SDPA else kernel, joint, gradient)

    try:
        # PyTorch says by warnings why a kernel does not take this.
        with MEASURING, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(told[-1].message) if told else str(error)
        return run, (reason or type(error).__name__).splitlines()[0].partition(" (Triggered")[0].partition(". ")[0]
    return run, None


def _in_turns(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one call of each, over as many calls as make a span that can be timed."""
    calls = {name: max(1, math.ceil(_SHORTEST / _seconds(run, 1, device))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_seconds(run, calls[name], device))
    return times


def _seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one call, the mean of `calls`."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / calls
