"""What a pretraining run would draw from a source: the targets of its first crops, and how fast they come."""

import time
from typing import NamedTuple

import torch

from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.transform import TrainTransform
from mpp.objective.objective import Survey, survey_targets
from mpp.objective.target import Target
from mpp.pretraining.step import SURVEY_BATCH, SURVEY_IMAGES, survey_batches

_MORE = 8  # batches of each worker that are timed
_LONGEST = 20.0  # seconds of timing


class Crops(NamedTuple):
    """What was drawn."""

    survey: Survey
    rate: float
    """Training crops a second, with all the workers."""


def draw_crops(
    source: Source, config: DataConfig, reading: DecodeOptions, image_hw: tuple[int, int], target: Target, workers: int
) -> Crops:
    """Surveys the first 512 crops of a run of seed 0, and times the loader.

    Raises:
        BadImage: 20 images in a row could not be used.
    """
    transform = TrainTransform(config, image_hw, reading.channels)
    batches = survey_batches(source, transform, reading, 0, workers)
    try:
        # The first batch of each worker is there all at once, and late.
        first = [next(batches)["images"] for _ in range(max(1, workers))]
        start, timed = time.perf_counter(), 0
        while timed < _MORE * max(1, workers) or len(first) * SURVEY_BATCH < SURVEY_IMAGES:
            images = next(batches)["images"]
            timed += 1
            if len(first) * SURVEY_BATCH < SURVEY_IMAGES:
                first.append(images)
            elif time.perf_counter() - start > _LONGEST:
                break
        rate = timed * SURVEY_BATCH / (time.perf_counter() - start)
    finally:
        batches.close()
    return Crops(survey_targets(target, torch.cat(first)[:SURVEY_IMAGES]), rate)
