"""The micro-batch of train.micro_batch auto on CUDA, found by trying: doubled until the memory is full, then back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from mpp import dist
from mpp.errors import RunError
from mpp.training.auto import BEGAN, Choice, divisor
from mpp.training.loop import Step
from mpp.training.optim import OPTIMISER_COPIES
from mpp.training.training_run import TrainingRun

_FIRST, _MOST = 8, 512
_SPARE = 1.1  # what compiled kernels, fragmentation and evaluation may take beyond a trial's peak


def try_micro_batch(run: TrainingRun, step: Step, image_hw: tuple[int, int], channels: int) -> None:
    """Replaces the chosen micro-batch of a run on CUDA by the largest that fits; config and schedule follow.

    Trials make forward and backward passes of random images, and leave weights and buffers as they were. Ranks that
    share out the model, and a run that goes on, keep what they have. Raises RunError where no image fits.
    """
    choice = next((each for each in run.choices if each.name == "train.micro_batch"), None)
    sharded = run.state.sharded
    if choice is None or choice.because == BEGAN or run.device.type != "cuda" or sharded:
        return
    share = run.schedule.batch_size // run.world.size
    loss: Any = getattr(run.config, "loss", None)
    least = 2 if loss is not None and (loss.mixup or loss.cutmix) else 1  # they take images in pairs
    size = largest(lambda size: _fits(run, step, size, image_hw, channels), min(share, _MOST), least)
    torch.cuda.reset_peak_memory_stats(run.device)  # else a dry run would report the trials' memory
    size = divisor(share, min(dist.gather(size)))
    tried = Choice(choice.name, str(size), f"found by trying on {torch.cuda.get_device_name(run.device)}")
    run.choices = tuple(tried if each is choice else each for each in run.choices)
    run.config = replace(run.config, train=replace(run.config.train, micro_batch=size))
    run.schedule = replace(run.schedule, micro_batch=size, accumulate=share // size)


def largest(fits: Callable[[int], bool], most: int, least: int = 1) -> int:
    """The largest of the powers of two, and `most`, that fits; all tried are multiples of `least` where `most` is one.

    Raises RunError where `least` does not fit.
    """
    size = min(_FIRST, most)
    first = size
    while not fits(size):
        if size <= least:
            images = "one image" if size == 1 else f"{size} images"
            raise RunError(f"out of memory with {images}: take a smaller model or --model.grad-checkpointing")
        size = max(size // 2 // least, 1) * least
    while first <= size < most and fits(min(2 * size, most)):
        size = min(2 * size, most)
    return size


def _fits(run: TrainingRun, step: Step, size: int, image_hw: tuple[int, int], channels: int) -> bool:
    """Whether a pass of so many images fits beside the optimiser's state, which comes with the first update."""
    model: Any = run.wrapped.module if isinstance(run.wrapped, DistributedDataParallel) else run.wrapped
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    buffers = [buffer.clone() for buffer in model.buffers()]
    numbers: dict[str, Any] = {"dtype": torch.int64, "device": run.device}
    reserved: list[torch.Tensor] = []
    try:
        torch.cuda.reset_peak_memory_stats(run.device)
        copies = range(OPTIMISER_COPIES[run.config.optim.name])
        reserved = [torch.empty_like(weight) for _ in copies for weight in weights]
        images = torch.zeros((size, channels, *image_hw), dtype=torch.uint8, device=run.device)
        index = torch.zeros(size, dtype=torch.int64)
        batch = {"images": images, "labels": torch.zeros(size, **numbers), "index": index, "position": 0, "slot": 0}
        with torch.compiler.set_stance("force_eager"):  # compiled once, for the size that is taken
            step(model, batch)[0].backward()
        peak = torch.cuda.max_memory_allocated(run.device)
        return peak * _SPARE < torch.cuda.get_device_properties(run.device).total_memory
    except torch.OutOfMemoryError:
        return False
    finally:
        reserved.clear()
        for weight in weights:
            weight.grad = None
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.cuda.empty_cache()
