"""Classes of images, by a fine-tuned model."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpp.data.loader import sequential
from mpp.data.sources.files import FileSource
from mpp.data.sources.names import is_hidden, is_image, printable
from mpp.data.transform import EvalTransform, normalise
from mpp.dist import World
from mpp.downstream.recipes import PredictRecipe
from mpp.downstream.scoring import shown
from mpp.errors import RunError, UserError, command
from mpp.model.choice import settle_kernel, task_of
from mpp.system.files import write_csv
from mpp.training.parallel import choose_device
from mpp.weights.base import build
from mpp.weights.opening import open_weights

_BATCH = 64


def predict(config: PredictRecipe) -> int:
    """Prints the best classes of each image, or writes them as CSV. Returns 0; images that do not decode are said.

    Raises:
        UserError: a model without a head, images that are not there.
        RunError: none of the images can be decoded.
    """
    paths = [path for image in config.images for path in _paths(image)]
    weights = replace(open_weights(config.init), max_image_mb=config.max_image_mb)
    if not weights.classes:
        todo = f"fine-tune it first ({command('finetune')})"
        raise UserError(f"--init {config.init} has no head to classify with: {todo}")
    device = choose_device(config.device, World(), "device")
    model = build(weights, device=device).eval()
    settle_kernel("auto", "", task_of(model, _BATCH, False, device, torch.float32), model)
    out = _make(config.out) if config.out else None
    source = FileSource("images", Path(), paths)
    transform = EvalTransform(weights.image_hw, weights.framing)
    batches = sequential(source, transform, weights.reading, range(len(paths)), batch_size=_BATCH, workers=0)
    rows: list[Sequence[Any]] = []
    failed = 0
    for batch in batches:
        for bad in batch["bad"]:
            failed += 1
            print(f"cannot be decoded: {bad}", file=sys.stderr)
        if len(batch["images"]):
            found = _probabilities(model, normalise(batch["images"].to(device), weights.mean, weights.std))
            best = np.argsort(-found, axis=1, kind="stable")[:, : config.top]
            for index, row, classes in zip(batch["index"].tolist(), found, best, strict=True):
                named = [(weights.classes[number], row[number]) for number in classes]
                rows.append([paths[index], *(cell for name, p in named for cell in (name, f"{p:.4f}"))])
                if not config.out:
                    told = ", ".join(f"{shown(name)} {p:.1%}" for name, p in named)
                    print(f"{printable(paths[index])}: {told}", flush=True)
    if not rows:
        raise RunError(f"none of the {failed} images could be decoded")
    if out is not None:
        _write(out, rows, min(config.top, len(weights.classes)))
    return 0


def _probabilities(model: torch.nn.Module, pixels: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(pixels).float().softmax(dim=1).cpu().numpy()


def _paths(image: str) -> list[str]:
    path = Path(image).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"there is no image {printable(image)}")
        return [str(path)]
    found = sorted(
        inner
        for inner in path.rglob("*")
        if is_image(inner.name) and not any(is_hidden(part) for part in inner.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"there is no image in the folder {printable(image)}")
    return [str(inner) for inner in found]


def _make(out: str) -> Path:
    """The path of the CSV file, in a folder that is there, before hours are spent on what goes into it."""
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --out {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write --out {path}; choose a file in a folder that can be written")
    return path


def _write(path: Path, rows: Sequence[Sequence[Any]], top: int) -> None:
    head = ["path", *(name for number in range(1, top + 1) for name in (f"class{number}", f"probability{number}"))]
    try:
        write_csv(path, [head, *rows])
    except OSError as error:
        raise RunError(f"cannot write --out {path}: {error.strerror}") from error
