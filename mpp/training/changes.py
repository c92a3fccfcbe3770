"""What a run trains on has changed since it was stopped: refused, or what it means for the schedule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpp import dist
from mpp.data.sources.fingerprint import Contents
from mpp.errors import UserError
from mpp.training.loop import Schedule, State
from mpp.training.schedule import parse_duration
from mpp.training.settings import TrainConfig


def check_contents(now: Contents | None, saved: Mapping[str, Any] | None, run: Path, force: bool) -> list[str]:
    """Refuses to go on with other images than those that a checkpoint has noted, but by force; what has changed.

    Where none is noted, as by older versions, nothing has. To be called on all ranks together.

    Args:
        now: the images that there are.
        saved: `Contents` in plain values, from the checkpoint.
        run: the run's folder.
        force: go on.

    Raises:
        UserError: naming what has changed.
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
    """What it means for a run, whose config was `before` and whose images were `saved`, in a sentence."""
    images, size = Contents.from_dict(saved).images, schedule.batch_size
    now = state.contents.images if state.contents else images
    if images == now:
        return "the schedule stays as it is; from here on the run sees the images that there are now"
    old = parse_duration(before.length, "train.length").steps(before.batch_size, images)
    new, step = schedule.total_steps, schedule.step(state.images_seen)
    length = f"the run stays {new:,} steps long"
    if old != new:
        length = f"the run is {new:,} steps long instead of {old:,}, and its learning rate goes by that"
    epochs = f"an epoch is {now / size:,.1f} steps instead of {images / size:,.1f}"
    return f"{epochs}; {length}: step {step:,} is {step / new:.0%} of it (it was {step / old:.0%})"
