"""Counts of a set of images that add up exactly, in any order: classes, sizes, and a histogram of each channel."""

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

_LEVELS = np.arange(256)


class Figures:
    """What is known of the images seen so far; its size does not grow with them.

    Args:
        classes: how many there are.
        channels: of the pixels.
    """

    def __init__(self, classes: int, channels: int) -> None:
        self.images = 0
        self.class_counts = np.zeros(classes, dtype=np.int64)
        self.histogram = np.zeros((channels, 256), dtype=np.int64)
        self.heights: Counter[int] = Counter()
        self.widths: Counter[int] = Counter()

    def add(self, pixels: np.ndarray, label: int | None) -> None:
        """Counts an image: uint8 (H, W, channels) and its label, None or -1 where it has none."""
        height, width, channels = pixels.shape
        self.images += 1
        self.heights[height] += 1
        self.widths[width] += 1
        if label is not None and label >= 0:
            self.class_counts[label] += 1
        # Pillow counts two to three times as fast as numpy.bincount.
        if channels == 3:
            self.histogram += np.reshape(Image.fromarray(pixels).histogram(), (3, 256))
            return
        for channel in range(channels):
            self.histogram[channel] += Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])).histogram()

    def merge(self, other: "Figures") -> None:
        """Adds the images that another has counted."""
        self.images += other.images
        self.class_counts += other.class_counts
        self.histogram += other.histogram
        self.heights += other.heights
        self.widths += other.widths

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels, on a 0 to 1 scale, to 6 digits."""
        pixels = max(1, int(self.histogram[0].sum()))
        mean = self.histogram @ _LEVELS / pixels
        variance = (self.histogram * (_LEVELS - mean[:, None]) ** 2).sum(axis=1) / pixels
        return (mean / 255).round(6).tolist(), (np.sqrt(variance) / 255).round(6).tolist()

    def sizes(self) -> dict[str, dict[str, float]]:
        """Smallest, median and largest height and width in pixels."""
        return {name: _spread(counts) for name, counts in (("height", self.heights), ("width", self.widths))}

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, for JSON."""
        return {
            "images": self.images,
            "class_counts": self.class_counts.tolist(),
            "histogram": self.histogram.tolist(),
            "heights": sorted(self.heights.items()),
            "widths": sorted(self.widths.items()),
        }

    @staticmethod
    def from_dict(held: dict[str, Any]) -> "Figures":
        """Back from `to_dict`."""
        figures = Figures(len(held["class_counts"]), len(held["histogram"]))
        figures.images = held["images"]
        figures.class_counts += np.array(held["class_counts"], dtype=np.int64)
        figures.histogram += held["histogram"]
        figures.heights.update(dict(held["heights"]))
        figures.widths.update(dict(held["widths"]))
        return figures


def _spread(counts: Counter[int]) -> dict[str, float]:
    sides = np.array(sorted(counts))
    upto = np.cumsum([counts[side] for side in sides.tolist()])
    middle = [int(sides[np.searchsorted(upto, place, side="right")]) for place in ((upto[-1] - 1) // 2, upto[-1] // 2)]
    return {"min": int(sides[0]), "median": sum(middle) / 2, "max": int(sides[-1])}
