"""Pictures of what the model predicts: original, corrupted input, predicted colours, true colours, side by side."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mpp.objective.masking import MASK, RANDOM, Corruption
from mpp.objective.objective import E, MaskedPatchPrediction

TITLES = ("original", "corrupted input", "predicted", "true")
_GREY, _MARGIN, _HEADER, _SMALLEST = 128, 6, 22, 144


class Reconstruction(NamedTuple):
    """Four versions of the same images, each (batch, channels, height, width) uint8.

    In `predicted` and `true` the corrupted patches are drawn as targets (bin centres or pixels), the rest as it is.
    """

    original: UInt8[Tensor, "batch channels height width"]
    corrupted: UInt8[Tensor, "batch channels height width"]
    predicted: UInt8[Tensor, "batch channels height width"]
    true: UInt8[Tensor, "batch channels height width"]


@torch.inference_mode()
def reconstruct(
    model: MaskedPatchPrediction[E],
    images: UInt8[Tensor, "batch channels height width"],
    pixels: Tensor,
    corruption: Corruption,
) -> Reconstruction:
    """What the model sees and predicts; masked patches are drawn grey."""
    patch = model.encoder.patch
    patches = _to_patches(images, patch)
    at = corruption.picked[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])
    own = patches.gather(1, at)
    pool = patches.reshape(len(images) // corruption.group, -1, *patches.shape[2:])
    take = corruption.other.reshape(len(pool), -1)[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])
    other = pool.gather(1, take).view_as(own)
    kinds = corruption.kinds[:, :, None, None, None]
    seen = torch.where(kinds == MASK, _GREY, torch.where(kinds == RANDOM, other, own)).to(torch.uint8)
    guess = model.target.colours(model.predict(pixels, corruption))
    truth = model.target.render(model.target.of(images)).gather(1, at)
    drawn = [_from_patches(patches.scatter(1, at, x), model.encoder.grid) for x in (seen, guess, truth)]
    return Reconstruction(images, *drawn)


def _to_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _from_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, _, channels, ph, pw = patches.shape
    image = patches.view(batch, *grid, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
    return image.reshape(batch, channels, grid[0] * ph, grid[1] * pw)


def draw_sheet(rows: Reconstruction, columns: int = 2) -> UInt8[np.ndarray, "height width 3"]:
    """A picture of all images: `columns` groups of the four versions beside each other, with titles."""
    batch, _, height, width = rows.original.shape
    scale = max(1, -(-_SMALLEST // max(height, width)))
    cell_h, cell_w = height * scale + _MARGIN, width * scale + _MARGIN
    columns = min(columns, batch)
    lines = -(-batch // columns)
    group_w = len(rows) * cell_w + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * group_w, lines * cell_h + _HEADER), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column in range(columns):
        for number, title in enumerate(TITLES):
            x = column * group_w + _MARGIN + number * cell_w
            pen.text((x + width * scale / 2, _HEADER / 2), title, fill="black", font=font, anchor="mm")
    for index in range(batch):
        for number, version in enumerate(rows):
            tile = Image.fromarray(to_rgb(version[index]))
            tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            x = index % columns * group_w + _MARGIN + number * cell_w
            sheet.paste(tile, (x, _HEADER + index // columns * cell_h))
    return np.asarray(sheet)


def to_rgb(image: UInt8[Tensor, "channels height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """The first three channels, or one as grey."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).cpu().numpy()
