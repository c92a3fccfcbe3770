"""Mean and standard deviation of images, each of which counts alike: the --data.mean and --data.std of a training."""

from typing import Any

import numpy as np
from PIL import Image

_POWERS = np.arange(256.0) ** [[1], [2]]
_FEW = 10_000  # values that NumPy counts faster than Pillow
_FLAT = 1e-4  # a smaller standard deviation cannot be divided by


class ChannelStatistics:
    """Sums over images of their mean pixel and mean squared pixel.

    A training sees crops of one size, so a large image counts as much as a small one. The sums are floating point:
    added up in the same order they are the same to the bit.
    """

    def __init__(self, channels: int) -> None:
        self.images = 0
        self.sums = np.zeros((2, channels))

    def add(self, counts: np.ndarray) -> None:
        """Adds an image by its `histogram`, int64 (channels, 256)."""
        self.images += 1
        self.sums += (_POWERS @ counts.T) / counts[0].sum()

    def merge(self, other: "ChannelStatistics") -> None:
        """Adds the images of another."""
        self.images += other.images
        self.sums += other.sums

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each channel, float64 (channels,), of pixels scaled to 0 to 1; 0 where there was no image."""
        mean, square = self.sums / max(1, self.images) / [[255.0], [255.0**2]]
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, which keeps every bit of them."""
        return {"images": self.images, "sums": self.sums.tolist()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ChannelStatistics":
        """Restores what `to_dict` gave."""
        statistics = ChannelStatistics(len(values["sums"][0]))
        statistics.images, statistics.sums = values["images"], np.array(values["sums"])
        return statistics


def can_divide(std: np.ndarray | list[float]) -> bool:
    """Whether every channel varies, so that its standard deviation can be taken for --data.std."""
    return min(std) >= _FLAT


def histogram(pixels: np.ndarray) -> np.ndarray:
    """How often each of the 256 levels occurs: uint8 (H, W, C) to int64 (C, 256)."""
    channels = pixels.shape[2]
    if pixels.size <= _FEW:
        together = pixels.reshape(-1, channels) + np.arange(0, 256 * channels, 256)
        return np.bincount(together.ravel(), minlength=256 * channels).reshape(channels, 256)
    # Pillow counts two to three times as fast as numpy.bincount, and three channels at once.
    if channels == 3:
        return np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0))
    return np.array([plane.histogram() for plane in planes], dtype=np.int64)
