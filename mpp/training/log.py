"""What a run writes down: metrics.jsonl, pictures, what its loggers take, and lines on the terminal.

Everything but times (`time/...`) is a function of the config, so a run that was killed and resumed ends with the same
rows: rows after the checkpoint that it resumes from are dropped, and the sums of an unfinished interval are part of
the checkpoint.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mpp.errors import without_credentials
from mpp.system.files import write_whole
from mpp.system.progress import Progress, clock, say
from mpp.training.loggers import Logger, check_installed, open_logger, settings_of, tag
from mpp.training.rows import FILE, drop_rows


class RunLog:
    """The files of one run; on ranks other than 0 and in dry runs (`folder` None) it writes nothing.

    TensorBoard's files are the run's own and share its fate. A service (wandb, mlflow) must not end a run: its first
    failure is printed, and the run goes on without it.
    """

    def __init__(
        self, folder: Path | None, resume_step: int = 0, to: Sequence[str] = ("tensorboard",), config: Any = None
    ) -> None:
        """Open metrics.jsonl and the loggers that `to` names, which get `config`, a dataclass.

        Raises ConfigError where one is not installed.
        """
        check_installed(to)
        self.folder = folder
        self._loggers: dict[str, Logger] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = folder / FILE
        kept, dropped = ([(row["step"], _numbers(row)) for row in rows] for rows in drop_rows(self._rows, resume_step))
        settings = [*settings_of(config)] if config is not None else []

        def start(name: str) -> None:
            logger = open_logger(name, folder, resume_step, kept, dropped)
            logger.settings(settings)
            self._loggers[name] = logger

        for name in to:
            self._try(name, lambda name=name: start(name))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in [*self._loggers.items()]:
            self._try(name, lambda logger=logger: call(logger))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if name == "tensorboard":
                raise
            self._loggers.pop(name, None)
            reason = without_credentials(" ".join(str(error).split()) or type(error).__name__)[:300]
            print(f"log.to {name}: {reason.rstrip('.')}; the run goes on without it", file=sys.stderr, flush=True)

    def row(self, step: int, images: int, figures: Mapping[str, Any]) -> None:
        """Write one row of figures."""
        if self.folder is None:
            return
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "images": images, **figures}) + "\n")
        numbers = _numbers(figures)
        self._each(lambda logger: logger.scalars(step, numbers))

    def picture(self, name: str, step: int, picture: np.ndarray, text: Mapping[str, str] | None = None) -> Path | None:
        """Write a picture (H, W, 3) uint8 as PNG, with `text` as its tEXt entries, and to the loggers."""
        if self.folder is None:
            return None
        path = self.folder / "pictures" / f"{name}_{step:09d}.png"
        info = PngInfo()
        for key, value in (text or {}).items():
            info.add_text(key, value)
        write_whole(path, lambda file: Image.fromarray(picture).save(file, "PNG", pnginfo=info))
        self.show(name, step, picture)
        return path

    def show(self, name: str, step: int, picture: np.ndarray) -> None:
        """Show a picture (H, W, 3) uint8 in the loggers alone."""
        self._each(lambda logger: logger.picture(name, step, picture))

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None = None, thumbnails: np.ndarray | None = None
    ) -> None:
        """Show image features (M, D) in TensorBoard's projector, with labels and thumbnails (M, H, W, 3) uint8."""
        self._each(lambda logger: logger.features(name, features, labels, thumbnails))

    def flush(self) -> None:
        """Bring everything to disk as far as the operating system goes."""
        if self.folder is None:
            return
        self._each(lambda logger: logger.flush())
        with self._rows.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # in a `finally`, while the run's error is on its way
        self._each(lambda logger: logger.close(failed))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, by `tag`."""
    return {tag(name): v for name, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}


class Terminal:
    """Progress for a person: a bar on a terminal, plain lines elsewhere; silent on ranks other than 0."""

    def __init__(self, total_steps: int, done: int, on: bool = True) -> None:
        self.on, self._total = on, total_steps
        self._progress = Progress("training", total_steps, "steps", done=done, after=0, lines=False, on=on)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._progress.to(step)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.on:
            say(text)

    def row(self, step: int, figures: Mapping[str, float], score: str) -> None:
        """Print the line of one row of metrics."""
        form = ".1%" if score == "accuracy" else ".4f"
        parts = [f"step {step}/{self._total}", f"loss {figures['loss']:.4f}"]
        if score in figures:
            parts.append(f"{score} {figures[score]:{form}}")
        baselines = [f"{v:{form}}" for name, v in figures.items() if name.startswith(f"{score}_baseline_")]
        if baselines:
            parts.append(f"(baselines {', '.join(baselines)})")
        parts.append(f"lr {figures['lr']:.2e}")
        parts.append(f"{figures['time/images_per_second']:.0f} images/s")
        parts.append(f"data wait {figures['time/data_wait']:.0%}")
        parts.append(f"{clock(figures['time/left'])} left")
        self.say("  ".join(parts))

    def close(self) -> None:
        self._progress.close()
