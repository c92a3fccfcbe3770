"""What the labels of a source say, without reading an image."""

from dataclasses import dataclass

import numpy as np

from mpp.data.sources.base import Source
from mpp.data.sources.names import printable

_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev", "holdout"))
_HUGE, _TIMES = 0.5, 5  # a class of more than half of the images, and of five times the next one's


@dataclass(frozen=True)
class Classes:
    """Names and numbers of the classes, the largest first."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    unlabelled: int

    @classmethod
    def of(cls, source: Source) -> "Classes | None":
        """Of a source's labels; None where it has none."""
        labels = source.labels()
        if labels is None or not source.classes:
            return None
        counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
        order = np.argsort(-counts, kind="stable")
        names = tuple(source.classes[label] for label in order)
        return cls(names, tuple(counts[order].tolist()), int(np.count_nonzero(labels < 0)))

    def with_count(self, count: int) -> list[str]:
        """The names of the classes of so many images."""
        return [name for name, number in zip(self.names, self.counts, strict=True) if number == count]

    def warnings(self) -> list[str]:
        """What looks like a mistake, a line each."""
        found = []
        if splits := sorted(name for name in self.names if name.lower() in _SPLITS):
            found.append(f"classes called {', '.join(splits)}: if they are splits, give the folder of one of them")
        total = sum(self.counts)
        if len(self.counts) > 1 and self.counts[0] > max(_HUGE * total, _TIMES * self.counts[1]):
            found.append(f"the class {printable(self.names[0])} holds {self.counts[0] / total:.1%} of the images")
        return found
