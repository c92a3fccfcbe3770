"""The course of a run in steps, and its learning rate: pure functions of the step, free of torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from mpp.errors import UserError
from mpp.training.duration import parse_duration
from mpp.training.settings import ScheduleConfig, TrainConfig, chosen


@dataclass(frozen=True)
class Schedule:
    """The course of a run in steps.

    Attributes:
        total_steps: updates in all.
        batch_size: images per update over all devices.
        accumulate: micro-batches per update and device.
        rate: learning rate of the update after `step` finished ones.
        clip_norm: largest global gradient norm; 0: unclipped.
        micro_batch: images per device in one forward pass.
        epoch_images: images in an epoch.
    """

    total_steps: int
    batch_size: int
    accumulate: int
    rate: Callable[[int], float]
    clip_norm: float = 0.0
    micro_batch: int = 1
    epoch_images: int = 1

    def step(self, images_seen: int) -> int:
        """Return the number of finished updates."""
        return images_seen // self.batch_size

    def steps(self, duration: str, name: str) -> int:
        """Convert a duration of the config to steps; an empty one to 0."""
        if not duration:
            return 0
        return parse_duration(duration, name).steps(self.batch_size, self.epoch_images, self.total_steps)


def build_schedule(
    train: TrainConfig, plan: ScheduleConfig, lr: float, clip_norm: float, epoch_images: int, world_size: int
) -> Schedule:
    """Build the schedule of a run with epochs of `epoch_images` and base learning rate `lr`.

    Raises UserError for a batch that the processes cannot share equally, or warm-up and cooldown longer than the run.
    """
    size, most = chosen(train.batch_size), chosen(train.micro_batch)
    if size % world_size:
        raise UserError(f"train.batch_size {size} is not a multiple of the {world_size} processes")
    share = size // world_size
    micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    total = parse_duration(train.length, "train.length").steps(size, epoch_images)
    names = ("warmup", "cooldown", "timescale")
    parts = [parse_duration(getattr(plan, name), f"schedule.{name}") for name in names]
    warmup, cooldown, timescale = (part.steps(size, epoch_images, total) for part in parts)
    if all(part.unit == "percent" for part in parts[:2]) and parts[0].value + parts[1].value <= 100:
        cooldown = min(cooldown, total - warmup)  # both may have been rounded up
    try:
        rate = learning_rate(plan.kind, lr, total, warmup, cooldown, timescale)
    except ValueError as error:
        raise UserError(f"schedule: {error}") from error
    return Schedule(total, size, share // micro, rate, clip_norm, micro, epoch_images)


def is_due(step: int, period: int, total_steps: int) -> bool:
    """Return whether something done every `period` steps is due after `step`: at multiples and at the very end."""
    return step == total_steps or (period > 0 and step > 0 and step % period == 0)


def learning_rate(
    kind: str, base: float, total_steps: int, warmup: int = 0, cooldown: int = 0, timescale: int = 10_000
) -> Callable[[int], float]:
    """Return the learning rate of the update that follows `step` finished steps, for step = 0, ..., total_steps.

    cosine and linear decay from the end of the warm-up to 0 at `total_steps`, as in the paper's code
    (vision_transformer, `create_learning_rate_schedule`); rsqrt and the cooldown are big_vision's. Raises ValueError
    for warm-up and cooldown longer than the run.
    """
    if warmup + cooldown > total_steps:
        raise ValueError(
            f"warm-up ({warmup} steps) and cooldown ({cooldown}) are longer than the run ({total_steps} steps)"
        )

    def rate(step: int) -> float:
        progress = min(max((step - warmup) / max(total_steps - warmup, 1), 0.0), 1.0)
        relative = 1.0
        if kind == "cosine":
            relative = 0.5 * (1 + math.cos(math.pi * progress))
        elif kind == "linear":
            relative = 1 - progress
        elif kind == "rsqrt":
            relative = 1 / math.sqrt(1 + max(step - warmup, 0) / timescale)
        if warmup:
            relative *= min(step / warmup, 1.0)
        if cooldown:
            relative *= min((total_steps - step) / cooldown, 1.0)
        return base * relative

    return rate
