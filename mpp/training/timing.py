"""Times and what they were measured on."""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from mpp.system.cores import count_cores, processor

T = TypeVar("T")
K = TypeVar("K")

MEASURING = threading.RLock()
"""Held while steps are measured and torch's settings, which are the whole process's, are changed for it."""


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and the seconds that it took."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of one call, the mean of `calls`, with all that they queue on the device."""

    def repeat() -> None:
        for _ in range(calls):
            run()
        synchronise(device)

    synchronise(device)
    return timed(repeat)[1] / calls


def calls_lasting(seconds: float, run: Callable[[], object], device: torch.device) -> int:
    """Return how many calls take about so long, at least 1."""
    return max(1, math.ceil(seconds / seconds_a_call(run, device)))


def in_turns(sides: dict[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Measure all sides once a round, every other round backwards, as a machine's speed wanders."""
    found: dict[K, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            found[name].append(sides[name]())
    return found


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divide one by one."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: Sequence[float], unit: str) -> str:
    """Return the median, with the least and the most in brackets."""
    three = (float(value) for value in (np.median(values), min(values), max(values)))
    middle, least, most = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in three)
    return f"{middle}{unit} ({least} to {most})"


def hardware() -> str:
    """Return GPU, processor, threads, load and versions, on one line."""
    gpu = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{processor()}, {count_cores()} cores, "
        f"{torch.get_num_threads()} threads for torch, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
        f"NumPy {np.__version__}"
    )
