"""Checkpoints that survive a crash at any moment.

A checkpoint is written to a temporary name, synced and renamed, so what has its final name is always whole. It holds
tensors and plain values only and loads with `weights_only=True`: one file, or, of a state that is sharded over ranks, a
folder with that file for what is not sharded (see shard_files.py). Either loads into any number of processes.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException

from mpp import dist
from mpp.errors import RunError, UserError
from mpp.system.failure import lost_another
from mpp.system.files import remove
from mpp.training.shard_files import origin, read_shards, write_shards
from mpp.training.tensor_tree import Like, map_tensors, share

FORMAT = "mpp checkpoint 1"
_NAME = re.compile(r"step_(\d{9})(\.pt)?")
_PLAIN = "plain.pt"


class Checkpoints:
    """The checkpoints of one run, in `folder`, which the first save makes.

    The newest `keep_last` are kept, and for good those whose step is a multiple of `keep_every` (0: none).
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("step_*"))
        return sorted({int(match[1]) for match, path in named if match and (match[2] or path.is_dir())})

    def path(self, step: int, sharded: bool | None = None) -> Path:
        """Return where the checkpoint of `step` is, or will be, if it is sharded or not."""
        folder = self.folder / f"step_{step:09d}"
        return folder if sharded or (sharded is None and folder.is_dir()) else folder.with_suffix(".pt")

    def latest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, state: Mapping[str, Any], group: torch_dist.ProcessGroup | None = None) -> Path:
        """Write the checkpoint of `step` and remove those that are no longer kept.

        Of a sharded state all ranks of `group` write together; any other is for one rank to write. Raises RunError
        where it cannot be written (a full disk, say); the earlier ones are untouched.
        """
        path, main = self.path(step, sharded=group is not None), dist.rank_and_size()[0] == 0
        temporary = self.folder / f"step_{step:09d}.tmp"
        content: dict[str, Any] = {"format": FORMAT, "step": step, "state": dict(state)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if main:
                remove(temporary)  # of a run that was killed while writing
            if group is None:
                _write(temporary, content)
            else:
                rest = write_shards(temporary, content, group)
                if not main:
                    return path
                _write(temporary / _PLAIN, rest)
                _sync_folder(temporary)
            _replace(temporary, path)
            _sync_folder(self.folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, Exception) and lost_another(error):
                raise
            if main:
                remove(temporary)
            cause, latest = origin(error), self.latest()
            reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0]
            last_good = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
            raise RunError(
                f"cannot write the checkpoint {path}: {reason}; {last_good}; make room and run the same command again"
            ) from error
        self._clean(step)
        return path

    def _clean(self, newest: int) -> None:
        """Remove the checkpoints that are no longer kept; each that cannot be removed is left to the next save."""
        for step in self.steps()[: -self.keep_last]:
            if step != newest and not (self.keep_every and step % self.keep_every == 0):
                path = self.path(step)
                with contextlib.suppress(OSError):
                    if path.is_dir():  # whose removal takes a while, in which it must not pass for a checkpoint
                        path = path.rename(path.with_suffix(".old.tmp"))
                    remove(path)
        for stale in self.folder.glob("step_*.tmp"):  # of a run that was killed while writing
            remove(stale)


def load_checkpoint(path: Path, like: Like | None = None) -> dict[str, Any]:
    """Load the state saved in `path` on the CPU, but for the tensors that are to be `like` those of a sharded run.

    Tensors are the file's own bytes, mapped: what is not looked at is not read, and ranks on one machine share them.
    Copy what is to stay; the file may be removed meanwhile, but never written to. Raises UserError for a truncated or
    foreign one.
    """
    advice = "delete it to go on from an earlier one, or choose another run_dir"
    try:
        content = _read(path / _PLAIN if path.is_dir() else path)
        if isinstance(content, dict) and "sharded" in content:
            read_shards(path, content, lambda key: like(key[1:]) if like else None)
        elif like is not None and isinstance(content, dict):
            content["state"] = map_tensors(content["state"], lambda key, value: share(value, like(key)))
    except (Exception, CheckpointException) as error:  # torch raises many kinds, depending on where the bytes end
        raise UserError(f"cannot read the checkpoint {path}: it is truncated or not a checkpoint; {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "state" not in content:
        raise UserError(f"{path} is not a checkpoint of mpp ({FORMAT}); {advice}")
    return content["state"]


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # of a file system that maps no files


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _replace(new: Path, path: Path) -> None:
    """Give `new` its name; an earlier folder of that name (a run that started anew) is removed with what is stale."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = path.with_suffix(".old.tmp")
    remove(old)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
