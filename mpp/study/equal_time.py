"""How many images each arm of a study may see in equal time.

arms -> the training step of each, as its run would make it -> seconds per image, side by side
     -> the first arm's images x its seconds, by the others' seconds -> equal_time.json, which is kept
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.dist import World
from mpp.errors import UserError, without_credentials
from mpp.pretraining.build import resolve_init
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import endless_step
from mpp.study.settings import Arm
from mpp.system.files import write_whole
from mpp.training.parallel import choose_device
from mpp.training.timing import MEASURING, ratios, synchronise, timed

EQUAL_TIME = "equal_time.json"
_ROUNDS, _WARM_UP, _SAMPLE_SECONDS = 7, 2, 0.5

Lengths = dict[str, dict[str, Any]]
"""Arm -> {"ratio": its seconds per image over the first arm's, "images": that it manages in equal time, "flags": that
set it apart}; in the file below "arms"."""


def equal_lengths(folder: Path, arms: Sequence[Arm], images: int) -> Lengths:
    """How many images each arm sees in the time that the first needs for `images`; measured once, then read.

    Raises:
        UserError: lengths of another first arm in the folder, or a file that cannot be read.
    """
    path = folder / EQUAL_TIME
    try:
        known: Lengths = json.loads(path.read_text("utf-8"))["arms"] if path.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read; delete it to measure again") from error
    flags = {arm.name: without_credentials(arm.flags) for arm in arms}
    default = arms[0].name
    first = {"ratio": 1.0, "images": images, "flags": flags[default]}
    # Files of an older version lack the flags.
    timed_arms = {name: {"flags": own} | known[name] for name, own in flags.items() if name in known}
    if known and timed_arms.get(default) != first:
        raise UserError(
            f"{path} is of another first arm, or of other flags or another length of it; choose another --run-dir"
        )
    missing = [a for a in arms[1:] if a.name not in timed_arms or timed_arms[a.name]["flags"] != flags[a.name]]
    if known and not missing:
        return known
    known[default] = first
    for arm, ratio in zip(missing, step_time_ratios([arm.pretrain for arm in [arms[0], *missing]]), strict=True):
        size = arm.pretrain.train.batch_size
        steps = max(1, round(images / ratio / size))
        known[arm.name] = {"ratio": ratio, "images": size * steps, "flags": flags[arm.name]}
    text = json.dumps({"arms": known}, indent=2) + "\n"
    write_whole(path, text)
    return known


def step_time_ratios(configs: Sequence[PretrainConfig]) -> list[float]:
    """Seconds per image of each training step but the first, over the first's: medians over rounds of all of them.

    Whole steps as the runs make them, with the optimiser, on images that lie on the device.
    """
    device = choose_device(configs[0].train.device, World(), "train.device")

    def seconds(step: Callable[[], None], times: int) -> float:
        def repeat() -> None:
            for _ in range(times):
                step()
            synchronise(device)

        return timed(repeat)[1]

    # Each is compiled for itself, however many there are.
    with MEASURING, torch._dynamo.config.patch(recompile_limit=8 * len(configs)):
        steps = [endless_step(resolve_init(config, World())[0], device)[1] for config in configs]
        counts = []
        for step in steps:
            seconds(step, _WARM_UP)
            counts.append(max(1, math.ceil(_SAMPLE_SECONDS / seconds(step, 1))))
        taken: list[list[float]] = [[] for _ in steps]
        for turn in range(_ROUNDS):
            for i in range(len(steps)) if turn % 2 else reversed(range(len(steps))):
                taken[i].append(seconds(steps[i], counts[i]) / counts[i] / configs[i].train.batch_size)
    torch.compiler.reset()
    return [float(np.median(ratios(of, taken[0]))) for of in taken[1:]]
