"""The pretrainings of a study: their configs and lengths, and how many images each may see in equal time.

arms -> the training step of each, built as its run would build it -> seconds per image, side by side
     -> the first arm's images x its seconds, by the others' seconds -> equal_time.json, which is kept
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.config import differences, from_file, to_dict
from mpp.data.sources.opening import open_source
from mpp.dist import World
from mpp.errors import UserError, without_credentials
from mpp.pretraining.build import resolve_init
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import endless_step
from mpp.study.settings import Arm, StudyConfig
from mpp.system.files import write_whole
from mpp.training.duration import parse_duration
from mpp.training.parallel import choose_device
from mpp.training.timing import MEASURING, ratios, synchronise, timed

EQUAL_TIME = "equal_time.json"
_ROUNDS, _WARM_UP, _SAMPLE_SECONDS = 7, 2, 0.5

Lengths = dict[str, dict[str, Any]]
"""Arm -> {"ratio": its seconds per image over the first arm's, "images": that it manages in equal time, "flags": that
set it apart}; in the file below "arms"."""


@dataclass(frozen=True)
class Pretraining:
    """One run: an arm with a seed."""

    arm: Arm
    seed: int
    config: PretrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def settled(self) -> PretrainConfig:
        """The config with what the weights say that the run goes on from, if it does."""
        return resolve_init(self.config, World())[0]

    @property
    def finished(self) -> bool:
        """Whether the run has ended, as this config says; without opening its images or building its model."""
        told = self.folder / "config.yaml"
        if not told.is_file() or not (self.folder / "model" / "config.json").is_file():
            return False
        return not differences(PretrainConfig, to_dict(from_file(PretrainConfig, told)), to_dict(self.settled))


def pretrainings(config: StudyConfig, lengths: Mapping[str, Mapping[str, Any]]) -> list[Pretraining]:
    """All runs: every arm with the first seed, then with the next. None where weights are taken instead.

    `lengths` are those of equal time, of which an arm with a length of its own has no need.
    """
    if config.init:
        return []
    found: list[Pretraining] = []
    for seed in config.pretrain_seeds:
        for number, arm in enumerate(config.told_arms()):
            told = arm.pretrain
            timed = number and arm.name in lengths and told.train.length == config.pretrain.train.length
            length = f"{lengths[arm.name]['images']} images" if timed else told.train.length
            folder = Path(config.run_dir) / "pretrain" / arm.folder / f"seed_{seed}"
            download = config.download or told.data.download
            data = replace(told.data, source=told.data.source or config.data, download=download)
            train = replace(told.train, length=length, seed=seed)
            found.append(Pretraining(arm, seed, replace(told, run_dir=str(folder), data=data, train=train)))
    return found


def images_of(config: PretrainConfig) -> int:
    """How many images the run sees, in whole steps."""
    length, size, data = parse_duration(config.train.length, "train.length"), config.train.batch_size, config.data
    epoch = len(open_source(data.source, download=data.download, keep=data.keep)) if length.unit == "epochs" else size
    return size * length.steps(size, epoch)


def equal_lengths(folder: Path, arms: Sequence[Arm], images: int) -> Lengths:
    """How many images each arm sees in the time that the first needs for `images`; measured once, then read.

    Raises:
        UserError: lengths of another first arm in the folder, or a file that is none.
    """
    path = folder / EQUAL_TIME
    try:
        known: Lengths = json.loads(path.read_text("utf-8"))["arms"] if path.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read; delete it to measure again") from error
    flags = {arm.name: without_credentials(arm.flags) for arm in arms}
    first = {"ratio": 1.0, "images": images, "flags": flags[arms[0].name]}
    # Those of an older version tell no flags.
    timed = {name: {"flags": told} | known[name] for name, told in flags.items() if name in known}
    if known and timed.get(arms[0].name) != first:
        raise UserError(
            f"{path} is of another first arm, or of other flags or another length of it; choose another --run-dir"
        )
    missing = [arm for arm in arms[1:] if arm.name not in timed or timed[arm.name]["flags"] != flags[arm.name]]
    if known and not missing:
        return known
    known[arms[0].name] = first
    for arm, ratio in zip(missing, step_time_ratios([arm.pretrain for arm in [arms[0], *missing]]), strict=True):
        size = arm.pretrain.train.batch_size
        seen = size * max(1, round(images / ratio / size))
        known[arm.name] = {"ratio": ratio, "images": seen, "flags": flags[arm.name]}
    text = json.dumps({"arms": known}, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return known


def step_time_ratios(configs: Sequence[PretrainConfig]) -> list[float]:
    """Seconds per image of each training step but the first's, over the first's: medians over rounds of all of them.

    Whole steps as the runs make them, with the optimiser, on images that lie on the device.
    """
    device = choose_device(configs[0].train.device, World(), "train.device")
    # Each is compiled for itself, however many there are.
    with MEASURING, torch._dynamo.config.patch(recompile_limit=8 * len(configs)):
        steps = [endless_step(resolve_init(config, World())[0], device)[1] for config in configs]
        counts = [_warmed_up(step, device) for step in steps]
        seconds: list[list[float]] = [[] for _ in steps]
        for turn in range(_ROUNDS):
            order = range(len(steps)) if turn % 2 else reversed(range(len(steps)))
            for i in order:
                taken = _seconds(steps[i], counts[i], device)
                seconds[i].append(taken / counts[i] / configs[i].train.batch_size)
    torch.compiler.reset()
    return [float(np.median(ratios(of, seconds[0]))) for of in seconds[1:]]


def _warmed_up(step: Callable[[], None], device: torch.device) -> int:
    """How many steps make a sample that is long enough."""
    _seconds(step, _WARM_UP, device)
    return max(1, math.ceil(_SAMPLE_SECONDS / _seconds(step, 1, device)))


def _seconds(step: Callable[[], None], times: int, device: torch.device) -> float:
    def run() -> None:
        for _ in range(times):
            step()
        synchronise(device)

    return timed(run)[1]
