"""How many images each arm of a study may see in equal time.

arms -> the training step of each, as its run would make it -> seconds per image, side by side
     -> the first arm's images x its seconds, by the others' seconds -> equal_time.json, which is kept
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
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
from mpp.training.settings import chosen
from mpp.training.timing import MEASURING, calls_lasting, in_turns, ratios, seconds_a_call

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
    default, flags = arms[0].name, {arm.name: without_credentials(arm.flags) for arm in arms}
    first = {"ratio": 1.0, "images": images, "flags": flags[default]}
    # Files of an older version lack the flags.
    before = {name: {"flags": own} | known[name] for name, own in flags.items() if name in known}
    if known and before.get(default) != first:
        raise UserError(
            f"{path} is of another first arm, or of other flags or another length of it; choose another --run-dir"
        )
    missing = [arm for arm in arms[1:] if arm.name not in before or before[arm.name]["flags"] != flags[arm.name]]
    if known and not missing:
        return known
    known[default] = first
    for arm, ratio in zip(missing, step_time_ratios([arm.pretrain for arm in [arms[0], *missing]]), strict=True):
        size = chosen(arm.pretrain.train.batch_size)
        steps = max(1, round(images / ratio / size))
        known[arm.name] = {"ratio": ratio, "images": size * steps, "flags": flags[arm.name]}
    write_whole(path, json.dumps({"arms": known}, indent=2) + "\n")
    return known


def step_time_ratios(configs: Sequence[PretrainConfig]) -> list[float]:
    """Seconds per image of each training step but the first, over the first's: medians over rounds of all of them.

    Whole steps as the runs make them, with the optimiser, on images that lie on the device.
    """
    device = choose_device(configs[0].train.device, World(), "train.device")
    sides: dict[int, Callable[[], float]] = {}
    # Each is compiled for itself, however many there are.
    with MEASURING, torch._dynamo.config.patch(recompile_limit=8 * len(configs)):
        for number, config in enumerate(configs):
            _, step = endless_step(resolve_init(config, World())[0], device)
            seconds_a_call(step, device, _WARM_UP)
            sides[number] = partial(seconds_a_call, step, device, calls_lasting(_SAMPLE_SECONDS, step, device))
        taken = in_turns(sides, _ROUNDS)
    torch.compiler.reset()
    images = [chosen(config.train.batch_size) for config in configs]
    return [float(np.median(ratios(taken[i], taken[0]))) * images[0] / images[i] for i in range(1, len(configs))]
