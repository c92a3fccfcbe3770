"""The run that a folder holds already: its config and its images, against those that it is asked to go on with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mpp import dist
from mpp.config import differences, from_file, to_dict
from mpp.data.sources.contents import Contents
from mpp.errors import UserError
from mpp.training.checkpoint import Checkpoints
from mpp.training.duration import parse_duration
from mpp.training.loop import State
from mpp.training.schedule import Schedule
from mpp.training.settings import TrainConfig

MODEL = "model"
"""The folder, in a run's own, of the trained model."""
_NEW = "random:"  # before an init: its architecture with new weights
_BY_FORCE = ", or go on with the changed one by --resume force"
_SHAPES = ("name", "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
_FIXED = ("train.batch_size:", *(f"model.{name}:" for name in _SHAPES))  # else checkpoints would not fit


class RunConfig(Protocol):
    """What the configs of all runs have."""

    @property
    def run_dir(self) -> str: ...
    @property
    def resume(self) -> str: ...
    @property
    def train(self) -> TrainConfig: ...


C = TypeVar("C", bound=RunConfig)


def earlier(config: C) -> C | None:
    """Return the config of the run in config.run_dir; None where it has no checkpoint, and so nothing to go on with.

    None also without a folder, and for a dry run. Raises UserError for a folder of something else, or checkpoints
    without their config.
    """
    if not config.run_dir or getattr(config, "dry_run", False):
        return None
    folder = Path(config.run_dir)
    path = folder / "config.yaml"
    started = Checkpoints(folder / "checkpoints").latest() is not None
    if not path.exists():
        if started:
            raise UserError(f"{folder} has checkpoints but no config.yaml; choose another --run-dir")
        if (folder / MODEL).exists():  # it would be replaced
            raise UserError(f"{folder} holds a {MODEL} that no run wrote; choose another --run-dir")
        return None
    try:
        before = from_file(type(config), path)
    except UserError as error:  # also where nothing has started yet: the file is somebody else's
        raise UserError(f"{folder} holds a run of another kind; choose another --run-dir ({error})") from error
    return before if started else None


def same_init(was: str, began: str, now: str, folder: str) -> bool:
    """Whether two inits are the same weights, of a run that began in one folder and goes on in another: by whatever
    path, also where they moved together with the run."""
    if not was or not now or was.startswith(_NEW) != now.startswith(_NEW):
        return was == now
    one, other = (Path(init.removeprefix(_NEW)).expanduser() for init in (was, now))
    moved = other.exists() and os.path.relpath(one, began) == os.path.relpath(other, folder)
    return moved or os.path.realpath(one) == os.path.realpath(other)


def changes(old: RunConfig, new: RunConfig) -> list[str]:
    """Give the settings that changed since a run began, as `differences` does, but for another name of its init."""
    before, after = to_dict(old), to_dict(new)
    if after.get("init") and same_init(before["init"] or "", old.run_dir, after["init"], new.run_dir):
        after["init"] = before["init"]
    return differences(type(new), before, after)


def check_config(old: RunConfig, new: RunConfig) -> None:
    """Raise UserError, naming the changed settings, where they bar going on, as most do without --resume force."""
    changed = changes(old, new)
    if changed and new.resume != "force":
        by_force = "" if any(line.startswith(_FIXED) for line in changed) else _BY_FORCE
        raise UserError(
            f"{new.run_dir} holds a run with another config ({'; '.join(changed)}); choose another --run-dir{by_force}"
        )
    if new.train.batch_size not in ("auto", old.train.batch_size):  # steps, rows and checkpoints are counted in it
        raise UserError(
            f"train.batch_size cannot change within a run ({old.train.batch_size} -> {new.train.batch_size}); choose "
            "another --run-dir, or change --train.micro-batch"
        )


def check_contents(now: Contents | None, saved: Mapping[str, Any] | None, run: Path, force: bool) -> list[str]:
    """Return how the images differ from those noted in a checkpoint, if any are; raise UserError unless forced.

    Checkpoints of older versions note none. For all ranks to call together.
    """
    here = now.changes(Contents.from_dict(saved)) if now and saved else []
    changed = next((each for each in dist.gather(here) if each), [])
    if changed and not force:
        raise UserError(
            f"the images have changed since the last checkpoint of {run} ({'; '.join(changed)}): put back what there "
            "was, choose another --run-dir, or go on with what there is now by --resume force"
        )
    return changed


def schedule_change(before: TrainConfig, saved: Mapping[str, Any], state: State, schedule: Schedule) -> str:
    """Say what other images mean for the schedule of a run whose config was `before` and whose images were `saved`."""
    images, size = Contents.from_dict(saved).images, schedule.batch_size
    now = state.contents.images if state.contents else images
    if images == now:
        return "the schedule stays as it is; from here on the run sees the images that there are now"
    old = parse_duration(before.length, "train.length").steps(size, images)
    new, step = schedule.total_steps, schedule.step(state.images_seen)
    length = f"the run stays {new:,} steps long"
    if old != new:
        length = f"the run is {new:,} steps long instead of {old:,}, and its learning rate goes by that"
    epochs = f"an epoch is {now / size:,.1f} steps instead of {images / size:,.1f}"
    return f"{epochs}; {length}: step {step:,} is {step / new:.0%} of it (it was {step / old:.0%})"
