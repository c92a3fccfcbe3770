"""What is known of a set of images that is counted part by part: classes, sizes, and statistics of the colours."""

from collections import Counter
from typing import Any

import numpy as np

from mpp.data.statistics import ChannelStatistics, histogram


class Figures:
    """What is known of the images seen so far; its size does not grow with them. Merged in order, the same to the bit.

    Args:
        classes: how many there are.
        channels: of the pixels.
    """

    def __init__(self, classes: int, channels: int) -> None:
        self.class_counts = np.zeros(classes, dtype=np.int64)
        self.colours = ChannelStatistics(channels)
        self.heights: Counter[int] = Counter()
        self.widths: Counter[int] = Counter()

    def add(self, pixels: np.ndarray, label: int | None) -> None:
        """Counts an image: uint8 (H, W, channels) and its label, None or -1 where it has none."""
        height, width, _ = pixels.shape
        self.heights[height] += 1
        self.widths[width] += 1
        if label is not None and label >= 0:
            self.class_counts[label] += 1
        self.colours.add(histogram(pixels))

    def merge(self, other: "Figures") -> None:
        """Adds the images that another has counted."""
        self.class_counts += other.class_counts
        self.colours.merge(other.colours)
        self.heights += other.heights
        self.widths += other.widths

    @property
    def images(self) -> int:
        """How many there were."""
        return self.colours.images

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Of each channel, every image counting alike, on a 0 to 1 scale, to 6 digits."""
        mean, std = self.colours.mean_std()
        return mean.round(6).tolist(), std.round(6).tolist()

    def sizes(self) -> dict[str, dict[str, float]]:
        """Smallest, median and largest height and width in pixels."""
        return {name: _spread(counts) for name, counts in (("height", self.heights), ("width", self.widths))}

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, for JSON."""
        return {
            "class_counts": self.class_counts.tolist(),
            "colours": self.colours.to_dict(),
            "heights": sorted(self.heights.items()),
            "widths": sorted(self.widths.items()),
        }

    @staticmethod
    def from_dict(held: dict[str, Any]) -> "Figures":
        """Back from `to_dict`."""
        figures = Figures(len(held["class_counts"]), 0)
        figures.class_counts += np.array(held["class_counts"], dtype=np.int64)
        figures.colours = ChannelStatistics.from_dict(held["colours"])
        figures.heights.update(dict(held["heights"]))
        figures.widths.update(dict(held["widths"]))
        return figures


def _spread(counts: Counter[int]) -> dict[str, float]:
    sides = np.array(sorted(counts))
    upto = np.cumsum([counts[side] for side in sides.tolist()])
    middle = [int(sides[np.searchsorted(upto, place, side="right")]) for place in ((upto[-1] - 1) // 2, upto[-1] // 2)]
    return {"min": int(sides[0]), "median": sum(middle) / 2, "max": int(sides[-1])}
