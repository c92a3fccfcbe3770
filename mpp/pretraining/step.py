"""The training step of pretraining: what it corrupts, and the step alone for timing.

Every random draw derives from the seed and a position: (seed, epoch, index) for augmentation, (seed, images seen) for
the corruption of a global batch.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mpp.data.feed import DeviceBatch
from mpp.data.seeds import derive_seed
from mpp.data.settings import DataConfig
from mpp.dist import World
from mpp.objective.image_words import COMPONENTS
from mpp.objective.masking import Corruption, draw_corruption, pick_patches
from mpp.objective.objective import Figures
from mpp.pretraining.build import PretrainingRun, build
from mpp.pretraining.settings import FewshotConfig, PretrainConfig
from mpp.training.parallel import autocast
from mpp.training.settings import ScheduleConfig

_CORRUPTION, _DROPOUT = 1, 2  # survey.py has the others, so that no two kinds of draws share a seed


def training_step(
    run: PretrainingRun, precision: str | None = None
) -> Callable[[nn.Module, Any], tuple[Tensor, Figures]]:
    """The step of `fit`: corrupts a micro-batch, and returns its loss and figures."""
    config, precision = run.config, precision or run.precision
    drawn: dict[int, Corruption] = {}  # of the global batch that is worked at

    def step(model: nn.Module, batch: DeviceBatch) -> tuple[Tensor, Figures]:
        position, slot, images = batch["position"], batch["slot"], batch["images"]
        if position not in drawn:
            drawn.clear()
            drawn[position] = draw(run, position, run.schedule.batch_size)
        corruption = drawn[position].rows(slot, slot + len(images))
        if config.model.drop_path:
            torch.manual_seed(derive_seed(config.train.seed, _DROPOUT, position, slot))
        with autocast(precision, run.device):
            return model(images, corruption, components_of(run, batch["index"]))

    return step


def components_of(run: PretrainingRun, index: Int64[Tensor, " batch"]) -> Float[Tensor, "batch components"] | None:
    """What the words of whole images are made of: a row for each of these images, NaN where it is not known; None where
    the objective does not predict them."""
    if run.model.image_words is None:
        return None
    if run.components is None:  # a trial before the training
        return torch.full((len(index), COMPONENTS), torch.nan, device=run.device)
    return run.components.of(index)


def draw(run: PretrainingRun, position: int, batch: int) -> Corruption:
    """The corruption of the whole global batch that starts at `position` images seen."""
    group = run.micro_batch if batch % run.micro_batch == 0 else batch
    return corruption_at(run.config, run.model.encoder.grid, run.device, position, batch, group)


def corruption_at(
    config: PretrainConfig, grid: tuple[int, int], device: torch.device, position: int, batch: int, group: int = 1
) -> Corruption:
    """The corruption of `batch` images from `position` images seen on, in a run of this config.

    Random replacements come from `group` consecutive images where the config takes them from the batch.
    """
    objective = config.objective
    generator = torch.Generator(device)
    generator.manual_seed(derive_seed(config.train.seed, _CORRUPTION, position))
    picked = pick_patches(batch, grid, objective.ratio, generator, objective.picking)
    within = group if objective.random_from == "batch" else 1
    return draw_corruption(picked, grid[0] * grid[1], generator, objective.split, within)


def endless_step(config: PretrainConfig, device: torch.device) -> tuple[PretrainingRun, Callable[[], None]]:
    """A run, and a function that makes its next update, for timing.

    Step and update are the run's own; images (random ones, on the device) and learning rate are always the same.
    """
    channels, (height, width) = config.model.in_chans, config.model.image_hw
    with tempfile.TemporaryDirectory() as folder:  # the source is opened, and not read
        path = Path(folder) / "images.npy"
        np.save(path, np.zeros((1, height, width, channels), dtype=np.uint8))
        data = DataConfig(source=f"array:{path}", mean=config.data.mean, std=config.data.std)
        train = replace(config.train, length="1M steps")
        plain = replace(config, data=data, train=train, schedule=ScheduleConfig(), fewshot=FewshotConfig())
        run = build(plain, World(), device)
    run.settle_attention()
    return run, run.endless_updates(training_step(run), (channels, height, width))
