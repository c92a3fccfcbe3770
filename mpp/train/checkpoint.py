"""Checkpoints that survive a crash at any moment.

A checkpoint is written to a temporary name, synced and renamed, so a file with its final name is always whole. It holds
tensors and plain values only and loads with `weights_only=True`.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpp.errors import RunError, UserError

FORMAT = "mpp checkpoint 1"
_NAME = re.compile(r"step_(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of one run, in `folder`.

    Args:
        folder: made at the first save.
        keep_last: number of newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of it are kept for good; 0: none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step_*.pt"))
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}.pt"

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of `step` and removes those that are no longer kept.

        Raises:
            RunError: where it cannot be written (a full disk, say); the earlier ones are untouched.
        """
        path = self.path(step)
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, "step": step, "state": dict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            reason = getattr(error, "strerror", None) or _cause(error)
            latest = self.latest()
            where = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
            raise RunError(
                f"cannot write the checkpoint {path}: {reason}; {where}; make room and run the same command again"
            ) from error
        self._clean(step)
        return path

    def _clean(self, newest: int) -> None:
        for step in self.steps()[: -self.keep_last]:
            if step != newest and not (self.keep_every and step % self.keep_every == 0):
                self.path(step).unlink(missing_ok=True)
        for stale in self.folder.glob("step_*.tmp"):  # of a run that was killed while writing
            stale.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved in `path`, on the CPU.

    Raises:
        UserError: a file that is truncated, foreign or of another format.
    """
    advice = "delete it to go on from an earlier one, or choose another run_dir"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, depending on where the bytes end
        raise UserError(f"cannot read the checkpoint {path}: it is truncated or not a checkpoint; {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "state" not in content:
        raise UserError(f"{path} is not a checkpoint of mpp ({FORMAT}); {advice}")
    return content["state"]


def _cause(error: BaseException) -> str:
    # torch wraps the file's own error in its context
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
    return str(error).split("\n")[0]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
