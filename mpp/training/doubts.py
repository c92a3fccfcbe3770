"""Why a run cannot learn anything, or its figures cannot tell: said at its start, at its end and in its report."""

from mpp.data.sources.base import count
from mpp.training.optim import average_warning
from mpp.training.schedule import Schedule

_FEW_STEPS = 50


def doubts(schedule: Schedule, warmup: int, ema_decay: float, tested: int = 0, classes: int = 0) -> list[str]:
    """Why a run cannot learn, or its figures cannot tell; a sentence each, with what to change.

    `warmup` is in steps; `tested` images, of so many `classes`, where it has any.
    """
    steps, size, images = schedule.total_steps, schedule.batch_size, schedule.epoch_images
    highest = schedule.rate(min(warmup, steps - 1))
    found: list[str] = []
    if highest == 0:
        found.append(
            f"the learning rate is 0 in {'the only step' if steps == 1 else f'all {steps:,} steps'}, so nothing is "
            "learnt: take more steps, or --schedule.warmup '0 steps'"
        )
    elif warmup >= steps - 1 > 0:
        found.append("the learning rate still rises when the run ends: take more steps, or a shorter --schedule.warmup")
    if steps < _FEW_STEPS:
        found.append(
            f"{count(steps, 'step')} is too short a run to learn much: take --train.length '500 steps' or more"
        )
    if size > images:
        found.append(
            f"a batch of {size:,} has each of the {images:,} images {size / images:.3g} times: take a smaller "
            "--train.batch-size, or leave it to auto"
        )
    if average := average_warning(ema_decay, steps):
        found.append(average)
    if tested < classes:
        found.append(
            f"{count(tested, 'test image')} for {count(classes, 'class')} cannot tell one model from another: "
            "take more, by --test or a larger share of labels"
        )
    return found
