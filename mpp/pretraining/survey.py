"""What a pretraining run finds out of its images before it trains: the most frequent target, and its words."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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
from mpp.downstream.features import extract_by_all, in_order
from mpp.errors import RunError
from mpp.objective.image_words import KnownComponents
from mpp.objective.objective import Survey, survey_targets
from mpp.pretraining.build import PretrainingRun
from mpp.system.files import write_whole

Images = UInt8[Tensor, "images channels height width"]

SURVEY_IMAGES, SURVEY_BATCH = 512, 64
MOST_LEARNT, MOST_KNOWN = 2**14, 2**20
"""Images of a source, drawn by the seed, that the words of whole images are learnt from, and that have such words."""
FILE = "image_components.npz"
"""In the run's folder: what the words of its whole images are made of (float16), of which images, and their digest."""
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

    The images are seen as for an evaluation. A new run, which gives its `surveyed_images`, learns its components and
    the typical images, and keeps the components of its images in its folder. One that goes on reads them there, or
    finds them out once more where the file is gone or of other images. A `dry` run looks at a few images, and keeps
    nothing. Returns about how many seconds it takes to read all, 0 where none were read.
    """
    model, images = run.model, len(run.source)
    learnt, typical = model.image_components, model.image_words
    if learnt is None or typical is None:
        return 0.0
    digest = run.state.contents.digest if run.state.contents else ""
    kept = _read(run.folder / FILE, digest) if surveyed is None else None
    missing = dist.any_rank(kept is None)
    if kept is not None and not missing:
        run.components = kept.to(run.device)
        return 0.0
    order = np.random.default_rng(derive_seed(run.config.train.seed, _WHOLE)).permutation(images)
    some, others = order[: SURVEY_IMAGES if dry else MOST_LEARNT], order[MOST_LEARNT : 0 if dry else MOST_KNOWN]
    if surveyed is not None:
        learnt.words.learn(surveyed)
        _agreed(learnt.words)
    began = time.perf_counter()
    quarters, found = _by_all(run, learnt.quarters, some)
    if not len(found):
        raise RunError(f"none of {len(some)} images of {run.source.name} could be decoded")
    seconds = (time.perf_counter() - began) * min(images, MOST_KNOWN) / len(some)
    if surveyed is not None:
        learnt.learn(torch.from_numpy(quarters))
        run.exported.image_components.load_state_dict(_agreed(learnt))
    of_some = learnt.of(torch.from_numpy(quarters).to(run.device)).cpu()
    if surveyed is not None:
        typical.learn(of_some)
        run.exported.image_words.load_state_dict(_agreed(typical))
    parts = [(of_some.numpy(), found)]
    if len(others):
        parts.append(_by_all(run, lambda batch: learnt.of(learnt.quarters(batch)), others))
    rows, indices = in_order([part for part in parts if len(part[1])])
    rows = rows.clip(-_LARGEST, _LARGEST).astype(np.float16)
    run.components = KnownComponents(torch.from_numpy(indices), torch.from_numpy(rows)).to(run.device)
    if run.world.main and not dry:
        arrays = {"rows": rows, "indices": indices, "digest": digest}
        write_whole(run.folder / FILE, lambda file: np.savez(file, **arrays))
    return seconds


def _by_all(
    run: PretrainingRun, encode: Callable[[Tensor], Tensor], indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What all ranks together make of these images, and which of them could be decoded."""
    source, transform = run.train_source, EvalTransform(run.model.encoder.image_hw)
    indices, options = np.sort(indices), {"workers": run.workers, "refuse": False}
    return extract_by_all(encode, source, indices, transform, run.reading, run.device, **options)


def surveyed_images(run: PretrainingRun) -> Images:
    """The first augmented images of the run's source, those that it surveys."""
    batches = survey_batches(run.train_source, run.transform, run.reading, run.config.train.seed, run.workers)
    with closing(batches):
        return torch.cat([next(batches)["images"] for _ in range(SURVEY_IMAGES // SURVEY_BATCH)])


def _agreed(learnt: nn.Module) -> dict[str, Any]:
    """Lets it be what the first rank learnt, for processors may round differently; that state, on the CPU."""
    own = {name: value.cpu() for name, value in learnt.state_dict().items()} if dist.rank_and_size()[0] == 0 else None
    state = dist.gather(own)[0]
    learnt.load_state_dict(state)
    return state


def _read(path: Path, digest: str) -> KnownComponents | None:
    """The components of the images of this digest, as the run kept them; None where the file is gone, or of others."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            if str(arrays["digest"]) != digest:
                return None
            return KnownComponents(torch.from_numpy(arrays["indices"]), torch.from_numpy(arrays["rows"]))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return None


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
