"""What a run writes down: metrics.jsonl, pictures, what its loggers take, and lines on the terminal.

Everything but times (`time/...`) is a function of the config, so a run that was killed and resumed ends with the same
rows: rows written after the checkpoint that a run resumes from are dropped, and the sums of an unfinished interval are
part of the checkpoint.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mpp import dist
from mpp.system.files import write_whole
from mpp.training.log_services import connect
from mpp.training.loggers import Logger, Service, Told, check_installed, flat, tag

_ROW = '{"step": '  # what each begins with


class Meter:
    """Running sums and counts of figures, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Adds figures, each a (2,) tensor of a sum and a count."""
        given = {name: value.detach() for name, value in figures.items()}
        known = [name for name in given if name in self._sums]
        before, now = ([of[name] for name in known] for of in (self._sums, given))
        # All at once, by one kernel of CUDA.
        sums = torch._foreach_add(before, now) if known else ()  # pyright: ignore[reportPrivateImportUsage]
        self._sums |= given | dict(zip(known, sums, strict=True))

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reading, weighted by count; names that counted nothing are left out."""
        if not self._sums:
            return {}
        names = list(self._sums)
        total = dist.sum_over_ranks(torch.stack([self._sums[name].double() for name in names])).cpu()
        self._sums = {}
        return {name: float(s / n) for name, (s, n) in zip(names, total, strict=True) if n > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's sums."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """This rank's sums among those of all ranks; where there are more now or fewer, rank 0 takes all."""
        rank, size = dist.rank_and_size()
        if len(states) == size:
            states = [states[rank]]
        elif rank:
            states = []
        self._sums = {}
        for state in states:
            self.add({name: value.to(device, copy=True) for name, value in state.items()})


class RunLog:
    """The files of one run; on ranks other than 0 and in dry runs (`folder` None) it writes nothing."""

    def __init__(
        self, folder: Path | None, resume_step: int = 0, to: Sequence[str] = ("tensorboard",), config: Any = None
    ) -> None:
        """Opens metrics.jsonl and the loggers that `to` names, and tells those the run's config, a dataclass.

        Raises:
            ConfigError: a logger is not installed.
        """
        check_installed(to)
        self.folder = folder
        self._loggers: list[Logger] = []
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = folder / "metrics.jsonl"
        kept, dropped = _keep_rows(self._rows, resume_step)
        self._loggers = [_logger(name, folder, resume_step, kept, dropped) for name in to]
        settings = list(flat(config)) if config is not None else []
        for logger in self._loggers:
            logger.settings(settings)

    def row(self, step: int, images: int, figures: Mapping[str, Any]) -> None:
        """Writes one row of figures."""
        if self.folder is None:
            return
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "images": images, **figures}) + "\n")
        shown = _finite(figures)
        for logger in self._loggers:
            logger.scalars(step, shown)

    def picture(
        self, name: str, step: int, picture: np.ndarray, text: Mapping[str, str] = MappingProxyType({})
    ) -> Path | None:
        """Writes a picture (H, W, 3) uint8 as PNG, with `text` as its tEXt entries, and to the loggers."""
        if self.folder is None:
            return None
        path = self.folder / "pictures" / f"{name}_{step:09d}.png"
        info = PngInfo()
        for key, value in text.items():
            info.add_text(key, value)
        write_whole(path, lambda file: Image.fromarray(picture).save(file, "PNG", pnginfo=info))
        self.show(name, step, picture)
        return path

    def show(self, name: str, step: int, picture: np.ndarray) -> None:
        """Shows a picture (H, W, 3) uint8 in the loggers alone."""
        for logger in self._loggers:
            logger.picture(name, step, picture)

    def features(
        self,
        name: str,
        features: np.ndarray,
        labels: Sequence[str] | None = None,
        thumbnails: np.ndarray | None = None,
    ) -> None:
        """Shows image features (M, D) in TensorBoard's projector, with labels and thumbnails (M, H, W, 3) uint8."""
        for logger in self._loggers:
            logger.features(name, features, labels, thumbnails)

    def flush(self) -> None:
        """Brings everything to disk as far as the operating system goes."""
        if self.folder is None:
            return
        for logger in self._loggers:
            logger.flush()
        with self._rows.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # in a `finally`, while the run's error is on its way
        for logger in self._loggers:
            logger.close(failed)


def _logger(name: str, folder: Path, resume_step: int, kept: Told, dropped: Told) -> Logger:
    if name == "tensorboard":
        from mpp.training.log_tensorboard import TensorBoard  # only now, as it takes a second

        return TensorBoard(folder, resume_step, kept)
    return Service(name, lambda: connect(name, folder), dropped)


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row that loggers can draw, by `tag`."""
    return {tag(name): v for name, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; of a line that a crash or a full disk cut short, what is whole after the cut."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    rows = (_row(line) or _row(line[max(0, line.rfind(_ROW)) :]) for line in lines)
    return [row for row in rows if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    """None for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _keep_rows(path: Path, last_step: int) -> tuple[Told, Told]:
    """Drops the rows after `last_step`; the figures of those that stay, and of those that went."""
    kept, dropped = [], []
    for row in read_rows(path):
        (kept if last_step and row["step"] <= last_step else dropped).append(row)
    text = "".join(json.dumps(row) + "\n" for row in kept).encode()
    # Rows must never be older than the checkpoint that they lead to, though the power fails.
    write_whole(path, lambda file: (file.write(text), file.flush(), os.fsync(file.fileno())))
    return [(row["step"], _finite(row)) for row in kept], [(row["step"], _finite(row)) for row in dropped]


class Clock:
    """Images per second, share of the time spent waiting for data, and time left."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._waited = 0.0
        self._images = self._first_images = 0

    def waited(self, seconds: float) -> None:
        """Adds time in which the loop waited for the next batch."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Leaves out time in which the run looked at itself instead of training."""
        self._start += seconds
        self._last += seconds

    def begin(self, images: int) -> None:
        """Starts counting at `images` images seen."""
        self._start = self._last = time.perf_counter()
        self._images = self._first_images = images

    def read(self, images: int, total_images: int) -> dict[str, float]:
        """Times since the last reading, when `images` have been seen of `total_images`."""
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


class Terminal:
    """Progress for a person: a bar on a terminal, plain lines elsewhere; silent on ranks other than 0."""

    def __init__(self, total_steps: int, done: int, on: bool = True) -> None:
        self.on = on
        self._total = total_steps
        self._bar: Any = None
        if on and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), "steps", TimeRemainingColumn(), "left")
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total_steps, completed=done)
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.on:
            print(text, file=sys.stderr, flush=True)

    def row(self, step: int, figures: Mapping[str, float], score: str) -> None:
        """The line of one row of metrics."""
        parts = [f"step {step}/{self._total}", f"loss {figures['loss']:.4f}"]
        unit = (lambda v: f"{v:.1%}") if score == "accuracy" else (lambda v: f"{v:.4f}")
        if score in figures:
            parts.append(f"{score} {unit(figures[score])}")
        trivial = [unit(value) for name, value in figures.items() if name.startswith(f"{score}_baseline_")]
        if trivial:
            parts.append(f"(baselines {', '.join(trivial)})")
        parts.append(f"lr {figures['lr']:.2e}")
        parts.append(f"{figures['time/images_per_second']:.0f} images/s")
        parts.append(f"data wait {figures['time/data_wait']:.0%}")
        parts.append(f"{_clock(figures['time/left'])} left")
        self.say("  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours}:{minutes % 60:02d}:{round(seconds) % 60:02d}"
