"""What a run measures while it trains: mean figures over all ranks, and times."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpp import dist


class Meter:
    """Running sums and counts of figures, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add figures, each a (2,) tensor of a sum and a count."""
        new = {name: value.detach() for name, value in figures.items()}
        both = [name for name in new if name in self._sums]
        before, now = [self._sums[name] for name in both], [new[name] for name in both]
        # All at once, by one kernel of CUDA.
        sums = torch._foreach_add(before, now) if both else ()  # pyright: ignore[reportPrivateImportUsage]
        self._sums |= new | dict(zip(both, sums, strict=True))

    def read(self) -> dict[str, float]:
        """Return means over all ranks since the last reading, weighted by count, without names that counted nothing."""
        if not self._sums:
            return {}
        names = list(self._sums)
        total = dist.sum_over_ranks(torch.stack([self._sums[name].double() for name in names])).cpu()
        self._sums = {}
        return {name: float(s / n) for name, (s, n) in zip(names, total, strict=True) if n > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's sums."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """Take this rank's sums from those of all ranks; where their number has changed, rank 0 takes all."""
        rank, size = dist.rank_and_size()
        if len(states) == size:
            states = [states[rank]]
        elif rank:
            states = []
        self._sums = {}
        for state in states:
            self.add({name: value.to(device, copy=True) for name, value in state.items()})


class Clock:
    """Images per second, share of the time spent waiting for data, and time left."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, images: int) -> None:
        """Start counting at `images` images seen."""
        self._start = self._last = time.perf_counter()
        self._images = self._first_images = images
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """Add time in which the loop waited for the next batch."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Leave out time that was spent on evaluations and pictures."""
        self._start += seconds
        self._last += seconds

    def read(self, images: int, total_images: int) -> dict[str, float]:
        """Return times since the last reading, when `images` have been seen of `total_images`."""
        now = time.perf_counter()
        span = max(now - self._last, 1e-9)
        overall = (images - self._first_images) / max(now - self._start, 1e-9)
        figures = {
            "time/images_per_second": (images - self._images) / span,
            "time/data_wait": self._waited / span,
            "time/elapsed": now - self._start,
            "time/left": (total_images - images) / overall if overall else 0.0,
        }
        self._last, self._waited, self._images = now, 0.0, images
        return figures
