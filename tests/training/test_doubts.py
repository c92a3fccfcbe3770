"""Why a run cannot learn: each reason alone, and none for a run that can."""

import pytest

from mpp.training.doubts import doubts
from mpp.training.schedule import Schedule, learning_rate


@pytest.mark.parametrize(
    ("steps", "size", "warmup", "decay", "tested", "classes", "said"),
    [
        (500, 16, 25, 0.98, 8, 2, []),
        (1, 16, 1, 0.0, 8, 2, ["is 0 in the only step", "1 step is too short"]),
        (60, 16, 60, 0.0, 8, 2, ["still rises when the run ends"]),
        (49, 16, 2, 0.0, 8, 2, ["49 steps is too short"]),
        (500, 64, 25, 0.0, 8, 2, ["a batch of 64 has each of the 40 images 1.6 times"]),
        (500, 16, 25, 0.9998, 8, 2, ["still the weights after the first step"]),
        (500, 16, 25, 0.0, 3, 4, ["3 test images for 4 classes"]),
    ],
)
def test_each_reason_is_said(
    steps: int, size: int, warmup: int, decay: float, tested: int, classes: int, said: list[str]
) -> None:
    schedule = Schedule(steps, size, 1, learning_rate("cosine", 0.1, steps, warmup), epoch_images=40)
    found = doubts(schedule, warmup, decay, tested, classes)
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))
