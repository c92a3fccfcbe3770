"""python tools/bench.py attention: the kernels that `model.attention` chooses from, for the token counts of usual ViTs.

Timed as the model calls them: queries, keys and values are views of one projection, and its gradient is the result.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.settings import AttentionBench
from mpp.dist import World
from mpp.model.attention import xformers_obstacle
from mpp.model.kernel_choice import Task, choose_kernel, forward_backward
from mpp.training.parallel import DTYPES, choose_device, choose_precision
from mpp.training.timing import MEASURING, calls_lasting, hardware, in_turns, ratios, seconds_a_call, spread

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

    @property
    def rate(self) -> str:
        return spread([self.flops / seconds / 1e12 for seconds in self.seconds], " TFLOP/s")


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
        first = of_size[0]
        print(f"\n{size}: {first.tokens:,} tokens, {first.batch:,} images")
        for row in of_size:
            if row.left_out:
                print(f"  {row.kernel:16} left out: {row.left_out}")
                continue
            times = spread([1e3 * seconds for seconds in row.seconds], " ms")
            faster = spread(ratios(first.seconds, row.seconds), " x")
            print(f"  {row.kernel:16} {times:>28} {row.rate:>34} {faster:>26}{'  <- auto' * row.chosen}")
        print(f"  x: faster than {first.kernel}")
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
    sides: dict[str, Callable[[], float]] = {}
    obstacles: dict[str, str] = {}
    for kernel in ("xformers", "sdpa", *_SDPA, "explicit"):
        run = partial(_run, kernel, joint, gradient)
        obstacle = xformers_obstacle(device, dtype, config.width) if kernel == "xformers" else None
        if obstacle := obstacle or _obstacle(run):
            obstacles[kernel] = obstacle
        else:
            sides[kernel] = partial(seconds_a_call, run, device, calls_lasting(_SHORTEST, run, device))
    times = in_turns(sides, config.repeats)
    chosen = choose_kernel("auto", Task(batch, tokens, config.heads, config.width, 12, True, device, dtype))
    # Two products forward; backward they are computed again, and each gives two more: 2.5 times the forward pass.
    flops = 3.5 * 4 * batch * config.heads * tokens**2 * config.width
    row = partial(AttentionRow, size, tokens, batch)
    return [row(kernel, tuple(of), flops, kernel == chosen) for kernel, of in times.items()] + [
        row(kernel, (), flops, False, why) for kernel, why in obstacles.items()
    ]


def _run(kernel: str, joint: Tensor, gradient: Tensor) -> Tensor:
    """One forward and backward pass."""
    only: AbstractContextManager[object] = sdpa_kernel(_SDPA[kernel]) if kernel in _SDPA else nullcontext()
    with only:
        return forward_backward("sdpa" if kernel in _SDPA else kernel, joint, gradient)


def _obstacle(run: Callable[[], object]) -> str | None:
    """Why it cannot run here, if so."""
    try:
        # PyTorch says by warnings why a kernel does not take this.
        with MEASURING, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(caught[-1].message) if caught else str(error)
        return (reason or type(error).__name__).splitlines()[0].partition(" (Triggered")[0].partition(". ")[0]
    return None
