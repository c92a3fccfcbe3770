"""python tools/bench.py gpu: what only a CUDA device can show, in a few minutes, as one table to keep.

The training step and its memory (step.py), the attention kernels (attention.py), and training batches
decoded on the device beside the loader's (data.py).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from simplejpeg import encode_jpeg

from benchmarks import attention as kernels
from benchmarks import step as steps
from benchmarks.data import device_rates
from benchmarks.settings import AttentionBench, DataBench, GpuBench, StepBench
from benchmarks.step import OURS, StepRow
from mpp.errors import UserError
from mpp.training.timing import hardware, spread


def gpu(config: GpuBench) -> int:
    """Measures and prints one table; returns the exit code.

    Raises:
        UserError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("bench gpu needs a CUDA device, and this torch sees none; without one: bench step, bench plan")
    rows: list[StepRow] = []
    step = StepBench(batch=config.batch, device="cuda", repeats=config.repeats, data="")
    for number, name in enumerate(config.models):
        rows += steps.measure(replace(step, models=(name,), peers="off" if number else "on"))
    lines = [*step_lines(rows), *_attention_lines(), *_data_lines(config)]
    width = max(len(what) for what, _ in lines)
    print(hardware())
    print(f"median (least to most) of {config.repeats}\n")
    for what, figure in lines:
        print(f"{what:{width}}  {figure}")
    return 0


def step_lines(rows: list[StepRow]) -> Iterator[tuple[str, str]]:
    """What was measured, and the figure: speed and memory of every side, and the parts of our own step."""
    for row in rows:
        if row.left_out:
            yield f"{row.model}, {row.side}", f"left out: {row.left_out}"
            continue
        title = f"{row.model}, {row.side}, {row.precision}{', compiled' * row.compiled}, batch {row.batch}"
        share = f", {np.median(row.shares):.1%} of the matrix product's rate" if row.shares else ""
        memory = f"{(row.state_bytes + row.step_bytes) / 2**30:.2f} GiB"
        slower = "" if row.side == OURS else f", mpp {spread(row.faster, ' x')}"
        yield title, f"{spread(row.images_per_second, ' images/s')}{share}, {memory}{slower}"
        whole = sum(seconds for _, seconds in row.parts)
        if whole:
            yield "  its parts", ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in row.parts)


def _attention_lines() -> Iterator[tuple[str, str]]:
    for row in kernels.measure(AttentionBench(device="cuda", precision="bf16", repeats=5)):
        if not row.left_out:
            yield f"attention {row.size}, {row.tokens} tokens, {row.kernel}", row.rate + ", auto" * row.chosen


def _data_lines(config: GpuBench) -> Iterator[tuple[str, str]]:
    rates = device_rates(_photographs(64), DataBench(workers=config.workers, repeats=config.repeats))
    for name, rate in rates.items():
        yield f"batches of 224 x 224, {name}, {config.workers} workers", spread(rate, " images/s")


def _photographs(number: int) -> list[bytes]:
    """JPEGs of 500 x 375 made of coarse and fine noise, about as large as photographs of that size."""
    generator = torch.Generator().manual_seed(0)
    total = torch.full((number, 3, 375, 500), 128.0)
    for size, strength in ((4, 40.0), (16, 20.0), (64, 12.0)):
        coarse = torch.randn(number, 3, size, size, generator=generator) * strength
        total += torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")
    images = total.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [encode_jpeg(image, quality=90) for image in images]
