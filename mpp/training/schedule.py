"""Durations and learning rates: pure functions of the step, free of torch.

A user writes durations as steps, epochs, images or percent; the loop sees steps only.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

_UNITS = {
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "image": "images",
    "images": "images",
    "%": "percent",
    "percent": "percent",
}
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
_PATTERN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([kMB]?)\s*(%|[a-z]+)\s*", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """A length of training in the unit that the user wrote: steps, epochs, images or percent."""

    value: float
    unit: str

    def steps(self, batch_size: int, epoch_images: int, total_steps: int | None = None) -> int:
        """The nearest number of whole steps, at least 1 for a duration above 0.

        Args:
            batch_size: images per step over all devices.
            epoch_images: images in an epoch.
            total_steps: length of the run, which percentages refer to.
        """
        if self.unit == "percent":
            if total_steps is None:
                raise ValueError("a percentage needs the length of the run")
            exact = self.value / 100 * total_steps
        else:
            per_step = {"steps": 1.0, "epochs": batch_size / epoch_images, "images": float(batch_size)}
            exact = self.value / per_step[self.unit]
        return max(round(exact), 1) if self.value > 0 else 0


def parse_duration(text: str, name: str = "duration") -> Duration:
    """Reads "1000 steps", "90 epochs", "1.28M images" or "5%".

    Raises:
        ValueError: with the field's `name`, the text and the accepted forms.
    """
    match = _PATTERN.fullmatch(text)
    unit = _UNITS.get(match[3]) if match else None
    if match is None or unit is None:
        raise ValueError(f"{name} needs a number and a unit (1000 steps, 90 epochs, 1.28M images, 5%), got {text!r}")
    return Duration(float(match[1].replace("_", "")) * _SCALE[match[2]], unit)


def is_due(step: int, period: int, total_steps: int) -> bool:
    """Whether something done every `period` steps is due after `step` steps: at multiples and at the very end."""
    return step == total_steps or (period > 0 and step > 0 and step % period == 0)


def learning_rate(
    kind: str, base: float, total_steps: int, warmup: int = 0, cooldown: int = 0, timescale: int = 10_000
) -> Callable[[int], float]:
    """Learning rate of the update that follows `step` finished steps, for step = 0, ..., total_steps.

    cosine and linear decay from the end of the warm-up to 0 at `total_steps`, as in the paper's code
    (vision_transformer, `create_learning_rate_schedule`); rsqrt and the cooldown are big_vision's.

    Raises:
        ValueError: where warm-up and cooldown leave nothing between them.
    """
    if warmup + cooldown > total_steps:
        raise ValueError(
            f"warm-up ({warmup} steps) and cooldown ({cooldown}) are longer than the run ({total_steps} steps)"
        )

    def rate(step: int) -> float:
        progress = min(max((step - warmup) / max(total_steps - warmup, 1), 0.0), 1.0)
        if kind == "cosine":
            relative = 0.5 * (1 + math.cos(math.pi * progress))
        elif kind == "linear":
            relative = 1 - progress
        elif kind == "rsqrt":
            relative = 1 / math.sqrt(1 + max(step - warmup, 0) / timescale)
        elif kind == "constant":
            relative = 1.0
        else:
            raise ValueError(f"no schedule {kind!r}; there are cosine, linear, constant and rsqrt")
        if warmup:
            relative *= min(step / warmup, 1.0)
        if cooldown:
            relative *= min((total_steps - step) / cooldown, 1.0)
        return base * relative

    return rate
