"""Images made for the pre-flight, and its report read."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, **options)
    return path


def pictures(folder: Path, number: int) -> Path:
    """Make 0.png, 1.png, ... of noise, 40 x 40."""
    for each in range(number):
        save(folder / f"{each}.png", noise(40, 40))
    return folder


def under(lines: list[str], title: str) -> list[str]:
    """What the report says under a title."""
    found: list[str] = []
    inside = False
    for line in lines:
        inside = line.startswith(f"{title:<13}") or (inside and line.startswith(" " * 13))
        if inside:
            found.append(line[13:])
    return found
