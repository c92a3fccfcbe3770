"""The training step of a run without its data, as often as it is called: for measuring how long it takes."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.optim import Optimizer

from mpp.data.feed import Placed
from mpp.data.settings import DataConfig
from mpp.dist import World
from mpp.downstream.settings import FewshotConfig
from mpp.pretraining.build import Run, build, settle_attention, training_step
from mpp.pretraining.settings import PretrainConfig
from mpp.training.loop import FiniteGuard, update
from mpp.training.settings import ScheduleConfig


def endless_step(config: PretrainConfig, device: torch.device) -> tuple[Run, Callable[[], None]]:
    """The parts of a run, and its next update, as often as it is called.

    The step and the update are the run's own. Only the images are always the same random ones, which no source is
    read for, and so is the learning rate.
    """
    channels, (height, width) = config.model.in_chans, config.model.image_hw
    with tempfile.TemporaryDirectory() as folder:  # the source is opened, and not read
        path = Path(folder) / "images.npy"
        np.save(path, np.zeros((1, height, width, channels), dtype=np.uint8))
        data = DataConfig(source=f"array:{path}", mean=config.data.mean, std=config.data.std)
        train = replace(config.train, length="1M steps")
        plain = replace(config, data=data, train=train, schedule=ScheduleConfig(), fewshot=FewshotConfig())
        parts = build(plain, World(), device)
    settle_attention(parts)
    generator = torch.Generator().manual_seed(0)
    shape = (parts.micro_batch, channels, height, width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    labels = torch.full((parts.micro_batch,), -1, device=device)

    def batches() -> Iterator[Placed]:
        while True:
            for slot in range(0, config.train.batch_size, parts.micro_batch):
                yield {"images": images, "labels": labels, "position": parts.state.images_seen, "slot": slot}

    constant_rate(parts.state.optimizer)
    endless, step, guard, numbers = batches(), training_step(parts), FiniteGuard(parts.state), count(1)

    def run() -> None:
        update(parts.state, parts.wrapped, endless, step, parts.schedule, guard, next(numbers))
        parts.state.images_seen += config.train.batch_size

    return parts, run


def constant_rate(optimizer: Optimizer) -> None:
    """The rate is the loop's to set, which is not run here."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
