"""What a pretraining run finds out of its images before it trains: the most frequent target, and its words."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from mpp import dist
from mpp.data.loader import stream
from mpp.data.reader import Batch
from mpp.data.seeds import derive_seed
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.transform import EvalTransform, Transform
from mpp.downstream.features import extract_by_all
from mpp.objective.image_words import COMPONENTS, ImageComponents
from mpp.objective.objective import Survey, survey_targets
from mpp.pretraining.build import PretrainingRun
from mpp.system.files import write_whole

Images = UInt8[Tensor, "images channels height width"]

SURVEY_IMAGES, SURVEY_BATCH = 512, 64
MOST_LEARNT, MOST_KNOWN = 2**14, 2**20
"""Images of a source, drawn by the seed, that the words of whole images are learnt from, and that have such words."""
FILE = "image_components.npy"
"""In the run's folder, float16 (images, components): what the words of its whole images are made of."""
_LARGEST = float(np.finfo(np.float16).max)
_SURVEY, _WHOLE = 3, 4  # step.py has the others


def survey_source(run: PretrainingRun, images: Images) -> Survey:
    """Surveys the targets of these `surveyed_images`, and lets the model learn from them what it needs before its first
    step: the most frequent target and its visual words.
    """
    survey = survey_targets(run.model.target, images)
    models: tuple[Any, ...] = run.model, run.exported
    for model in models:
        model.frequent.copy_(survey.frequent)
    if run.model.words is not None:
        run.model.words.learn(images)
        run.exported.words.load_state_dict(_agreed(run.model.words))
    return survey


def survey_whole_images(run: PretrainingRun, surveyed: Images | None = None, dry: bool = False) -> float:
    """Finds out what the words of the run's whole images are made of, by all ranks together, where the objective
    predicts them.

    The images are seen as for an evaluation. A new run, which gives its `surveyed_images`, learns the typical ones and
    keeps what it found in its folder; one that goes on reads it there, or finds it out once more where the file is
    gone. A `dry` run looks at a few images, and keeps nothing. Returns the seconds that reading all takes, as far as
    images were read.
    """
    model, images = run.model, len(run.source)
    if model.image_words is None:
        return 0.0
    kept = _read(run.folder / FILE, images) if surveyed is None else None
    missing = dist.any_rank(kept is None)
    if kept is not None and not missing:
        run.components = kept.to(run.device)
        return 0.0
    order = np.random.default_rng(derive_seed(run.config.train.seed, _WHOLE)).permutation(images)
    some, others = order[: SURVEY_IMAGES if dry else MOST_LEARNT], order[MOST_LEARNT : 0 if dry else MOST_KNOWN]
    learnt, typical = _components(run), model.image_words
    learnt.words.learn(surveyed_images(run) if surveyed is None else surveyed)
    _agreed(learnt.words)
    began = time.perf_counter()
    quarters, found = _by_all(run, learnt.quarters, some)
    seconds = (time.perf_counter() - began) * min(images, MOST_KNOWN) / len(some)
    learnt.learn(torch.from_numpy(quarters))
    _agreed(learnt)
    of_some = learnt.of(torch.from_numpy(quarters).to(run.device)).cpu()
    if surveyed is not None:
        typical.learn(of_some)
        run.exported.image_words.load_state_dict(_agreed(typical))
    components = np.full((images, COMPONENTS), np.nan, dtype=np.float16)
    components[found] = of_some.clip(-_LARGEST, _LARGEST)
    if len(others):
        of_others, found = _by_all(run, lambda batch: learnt.of(learnt.quarters(batch)), others)
        components[found] = of_others.clip(-_LARGEST, _LARGEST)
    run.components = torch.from_numpy(components).to(run.device)
    if run.world.main and not dry:
        write_whole(run.folder / FILE, lambda file: np.save(file, components))
    return seconds


def _components(run: PretrainingRun) -> ImageComponents:
    """What the components of its images are found by, before anything is learnt."""
    encoder, data = run.model.encoder, run.config.data
    flips = data.vflip > 0, data.hflip > 0
    return ImageComponents(encoder.grid, encoder.patch, run.config.model.in_chans, flips).to(run.device)


def _by_all(
    run: PretrainingRun, encode: Callable[[Tensor], Tensor], indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What all ranks together make of these images, and which of them could be decoded."""
    source, transform = run.train_source, EvalTransform(run.model.encoder.image_hw)
    return extract_by_all(encode, source, np.sort(indices), transform, run.reading, run.device, workers=run.workers)


def surveyed_images(run: PretrainingRun) -> Images:
    """The first augmented images of the run's source, those that it surveys."""
    batches = survey_batches(run.train_source, run.transform, run.reading, run.config.train.seed, run.workers)
    with closing(batches):
        return torch.cat([next(batches)["images"] for _ in range(SURVEY_IMAGES // SURVEY_BATCH)])


def _agreed(learnt: nn.Module) -> dict[str, Any]:
    """Lets it be what the first rank learnt, for processors may round differently; that state."""
    state = dist.gather(learnt.state_dict())[0]
    learnt.load_state_dict(state)
    return state


def _read(path: Path, images: int) -> Tensor | None:
    """The components of so many images, as the run kept them; None where the file is gone, or not of these."""
    try:
        components = np.load(path)
    except (OSError, EOFError, ValueError):
        return None
    fits = components.dtype == np.float16 and components.shape == (images, COMPONENTS)
    return torch.from_numpy(components) if fits else None


def survey_batches(
    source: Source, transform: Transform, reading: DecodeOptions, seed: int, workers: int
) -> Generator[Batch]:
    """The endless batches of a source whose first ones a run of this seed surveys."""
    return stream(
        source,
        transform,
        reading,
        seed=derive_seed(seed, _SURVEY) % 2**31,
        batch_size=SURVEY_IMAGES,
        micro_batch=SURVEY_BATCH,
        start=0,
        workers=workers,
    )
