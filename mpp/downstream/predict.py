"""The predict tool: classes of images, by a fine-tuned model."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.data.loader import sequential
from mpp.data.sources.base import Source
from mpp.data.sources.dicom import with_frames
from mpp.data.sources.files import FileSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.names import is_hidden, is_image, printable
from mpp.data.sources.opening import open_splits
from mpp.data.transform import EvalTransform, normalise
from mpp.data.workers import worker_count
from mpp.dist import World
from mpp.downstream.inference_settings import EmbedRecipe, PredictRecipe
from mpp.downstream.scoring import short_name
from mpp.errors import RunError, UserError, command
from mpp.model.kernel_choice import settle_kernel, task_of
from mpp.system.files import write_csv
from mpp.system.progress import Progress, say
from mpp.training.parallel import choose_device
from mpp.weights.base import Weights, build
from mpp.weights.opening import open_weights

_BATCH = 64


def predict(config: PredictRecipe) -> int:
    """Prints the best classes of each image, or writes them as CSV. Returns 0; stderr names images that do not decode.

    Raises:
        UserError: a model without a head, images that are not there.
        RunError: none of the images can be decoded.
    """
    source = as_one(open_by_split(config))
    weights = replace(open_weights(config.init), max_image_mb=config.max_image_mb)
    if not weights.classes:
        todo = f"fine-tune it first ({command('finetune')})"
        raise UserError(f"--init {config.init} has no head to classify with: {todo}")
    top = min(config.top, len(weights.classes))
    if not config.out:
        for path, best in _predictions(config, weights, source, top):
            classes = ", ".join(f"{short_name(name)} {probability:.1%}" for name, probability in best)
            print(f"{printable(path)}: {classes}", flush=True)
        return 0
    out = _writable(config.out)  # before hours are spent on what goes into it
    if weights.multi_label:  # a column for each class, in the model's order
        head = ["path", *weights.classes]
        found = _predictions(config, weights, source, len(weights.classes))
        of_classes = ((path, dict(best)) for path, best in found)
        rows = ([path, *(f"{p[name]:.4f}" for name in weights.classes or ())] for path, p in of_classes)
    else:
        head = ["path", *(f"{what}{number}" for number in range(1, top + 1) for what in ("class", "probability"))]
        found = _predictions(config, weights, source, top)
        rows = ([path, *(cell for name, p in best for cell in (name, f"{p:.4f}"))] for path, best in found)
    try:
        write_csv(out, itertools.chain([head], rows))
    except OSError as error:
        raise RunError(f"cannot write --out {out}: {error.strerror}") from error
    return 0


def _predictions(
    config: PredictRecipe, weights: Weights, source: Source, top: int
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Paths with the names and probabilities of their best classes; images that do not decode are named on stderr."""
    device = choose_device(config.device, World(), "device")
    model = build(weights, device=device).eval()
    settle_kernel("auto", "", task_of(model, _BATCH, False, device, torch.float32), model)
    transform = EvalTransform(weights.image_hw, weights.framing)
    # A few images are read sooner than loader processes start.
    workers = worker_count(-1, 1) if len(source) > 2 * _BATCH else 0
    batches = sequential(source, transform, weights.reading, range(len(source)), batch_size=_BATCH, workers=workers)
    names, decoded = weights.classes, 0
    assert names is not None
    with Progress("predicting", len(source), lines=bool(config.out)) as progress:  # else the predictions are lines
        for batch in batches:
            for bad in batch["bad"]:
                say(f"cannot be decoded: {bad}")
            if len(batch["images"]):
                with torch.inference_mode():
                    logits = model(normalise(batch["images"].to(device), weights.mean, weights.std))
                logits = logits.float()
                probability = (logits.sigmoid() if weights.multi_label else logits.softmax(dim=1)).cpu().numpy()
                best = np.argsort(-probability, axis=1, kind="stable")[:, :top]
                for index, row, classes in zip(batch["index"].tolist(), probability, best, strict=True):
                    path = source.location(index).removeprefix(f".{os.sep}")
                    yield path, [(names[number], float(row[number])) for number in classes]
                decoded += len(best)
            progress.add(len(batch["images"]) + len(batch["bad"]))
    if not decoded:
        raise RunError(f"none of the {len(source)} images could be decoded")


def open_by_split(config: PredictRecipe | EmbedRecipe) -> Mapping[Any, Source]:
    """Opens the images that the settings name, by split, "" for files. Raises UserError where there are none."""
    if config.images:
        return {"": open_images(config.images)}
    return dict(open_splits(config.data, config.download))


def as_one(splits: Mapping[Any, Source]) -> Source:
    """The images of all splits, one after the other."""
    sources = list(splits.values())
    return sources[0] if len(sources) == 1 else MixtureSource(sources[0].name, sources)


def open_images(images: Iterable[str]) -> Source:
    """Opens image files and folders of images, each frame an image. Raises UserError where there is none."""
    return with_frames(FileSource("images", Path(), [path for image in images for path in image_paths(image)]))


def image_paths(image: str) -> list[str]:
    """An image file, or the images of a folder, sorted. Raises UserError where there is none."""
    path = Path(image).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"there is no image {printable(image)}")
        return [str(path)]
    inside = sorted(
        inner
        for inner in path.rglob("*")
        if is_image(inner.name) and not any(is_hidden(part) for part in inner.relative_to(path).parts)
    )
    if not inside:
        raise UserError(f"there is no image in the folder {printable(image)}")
    return [str(inner) for inner in inside]


def _writable(out: str) -> Path:
    """Makes the folder of the CSV file and gives its path; raises UserError where it cannot be written."""
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --out {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write --out {path}; choose a file in a folder that can be written")
    return path
