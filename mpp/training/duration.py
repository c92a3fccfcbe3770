"""Lengths of training as users write them, in steps, epochs, images or percent, and times in words. Free of torch."""

import math
import re
from dataclasses import dataclass

_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
_NUMBER = r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)"
_PATTERN = re.compile(rf"\s*{_NUMBER}\s*([kMB]?)\s*(?:(step|epoch|image)s?|%|percent)\s*", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """A length of training in the unit that the user wrote: steps, epochs, images or percent."""

    value: float
    unit: str

    def steps(self, batch_size: int, epoch_images: int, total_steps: int | None = None) -> int:
        """Return the nearest number of whole steps, at least 1 for a duration above 0; percent are of `total_steps`."""
        if self.unit == "percent":
            if total_steps is None:
                raise ValueError("a percentage needs the length of the run")
            exact = self.value / 100 * total_steps
        else:
            per_step = {"steps": 1.0, "epochs": batch_size / epoch_images, "images": float(batch_size)}
            exact = self.value / per_step[self.unit]
        return max(round(exact), 1) if self.value > 0 else 0


def parse_duration(text: str, name: str = "duration") -> Duration:
    """Read "1000 steps", "90 epochs", "1.28M images" or "5%"; ValueError names the field, the text and the forms."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{name} needs a number and a unit (1000 steps, 90 epochs, 1.28M images, 5%), got {text!r}")
    value = float(match[1].replace("_", "")) * _SCALE[match[2]]
    if math.isinf(value):
        raise ValueError(f"{name} is longer than any run, got {text!r}")
    return Duration(value, f"{match[3]}s" if match[3] else "percent")


def in_words(seconds: float) -> str:
    """Return a time as `48 s`, `12 min` or `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
