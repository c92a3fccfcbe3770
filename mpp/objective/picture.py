"""What the model makes of some images: its corrupted input, its predictions, and how right and how sure they are."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from mpp.objective.masking import MASK, RANDOM, Corruption
from mpp.objective.objective import E, MaskedPatchPrediction
from mpp.objective.target import Target

GREY = 128  # a masked patch


class Reconstruction(NamedTuple):
    """Four versions of the same images, each (batch, channels, height, width) uint8, and figures for each patch.

    In `predicted` and `true` the corrupted patches are drawn as targets (bin centres or pixels), the rest as it is.

    Attributes:
        original: the images.
        corrupted: what the model sees of them; masked patches are grey.
        predicted: its predictions.
        true: what they should be.
        kinds: 0 where a patch was left visible, else 1 + MASK, RANDOM or UNCHANGED.
        right: share of the patch's predictions that are right, for pixels their mean squared error; NaN where the
            patch is not corrupted.
        confidence: probability of the predicted class, the mean over the patch's predictions; NaN where the patch is
            not corrupted, and for pixels.
        score_name: what `right` is, "accuracy" or "mse".
    """

    original: UInt8[Tensor, "batch channels height width"]
    corrupted: UInt8[Tensor, "batch channels height width"]
    predicted: UInt8[Tensor, "batch channels height width"]
    true: UInt8[Tensor, "batch channels height width"]
    kinds: Int8[Tensor, "batch rows columns"]
    right: Float[Tensor, "batch rows columns"]
    confidence: Float[Tensor, "batch rows columns"]
    score_name: str


@torch.inference_mode()
def reconstruct(
    model: MaskedPatchPrediction[E],
    images: UInt8[Tensor, "batch channels height width"],
    pixels: Float[Tensor, "batch channels height width"],
    corruption: Corruption,
) -> Reconstruction:
    """What the model sees and predicts of `images`; `pixels` are the same, normalised."""
    target, grid = model.target, model.encoder.grid
    patches = _to_patches(images, model.encoder.patch)
    at = corruption.picked[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])
    own = patches.gather(1, at)
    pool = patches.reshape(len(images) // corruption.group, -1, *patches.shape[2:])
    take = corruption.other.reshape(len(pool), -1)[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])
    other = pool.gather(1, take).view_as(own)
    kinds = corruption.kinds[:, :, None, None, None]
    seen = torch.where(kinds == MASK, GREY, torch.where(kinds == RANDOM, other, own)).to(torch.uint8)
    output, values = model.predict(pixels, corruption).float(), target.of(images)
    truth = values.gather(1, corruption.picked[..., None].expand(-1, -1, values.shape[-1]))
    corrupted, predicted, true = (
        _from_patches(patches.scatter(1, at, x), grid) for x in (seen, target.colours(output), target.render(truth))
    )
    unknown = output.new_full(patches.shape[:2], torch.nan)
    right, confidence = (
        unknown.scatter(1, corruption.picked, x).unflatten(1, grid)
        for x in (target.score(output, truth), target.confidence(output))
    )
    numbers = torch.zeros(patches.shape[:2], dtype=torch.int8, device=images.device)
    numbers = numbers.scatter(1, corruption.picked, (corruption.kinds + 1).to(torch.int8)).unflatten(1, grid)
    return Reconstruction(images, corrupted, predicted, true, numbers, right, confidence, target.score_name)


def picture_of_targets(
    target: Target, images: UInt8[Tensor, "batch channels height width"]
) -> UInt8[Tensor, "batch channels height width"]:
    """The images with every patch drawn as its target."""
    grid = (images.shape[2] // target.patch[0], images.shape[3] // target.patch[1])
    return _from_patches(target.render(target.of(images)), grid)


def _to_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _from_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, _, channels, ph, pw = patches.shape
    image = patches.view(batch, *grid, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
    return image.reshape(batch, channels, grid[0] * ph, grid[1] * pw)


def to_rgb(image: UInt8[Tensor, "*batch channels height width"]) -> UInt8[np.ndarray, "*batch height width 3"]:
    """The first three channels, or one as grey."""
    channels = image.shape[-3]
    shown = image[..., :3, :, :] if channels >= 3 else image[..., :1, :, :].expand(*image.shape[:-3], 3, -1, -1)
    return shown.movedim(-3, -1).cpu().numpy()
