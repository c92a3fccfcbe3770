"""Reconstructions of some images, and a sheet of them: a row for each image, a column for each version, and a legend.

reconstruct(model, images, ...) -> Reconstruction    corrupted input, predictions, how right and how sure they are
draw_tiles(rows), draw_sheet(rows)                   the same as pixels to look at
read_sheet(path)                                     the tiles of a saved sheet: its file has the layout as text

No colour needs telling red from green: right is blue and wrong is orange; patches that were not corrupted are dark.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mpp.objective.masking import MASK, RANDOM, UNCHANGED, Corruption
from mpp.objective.objective import MaskedPatchPrediction, gather_patches
from mpp.objective.target import Target, cut_patches

TEXT_KEY = "mpp"  # of the layout, among the texts of a PNG
VERSIONS = ("original", "corrupted input", "predicted", "true")
GREY = 128  # a masked patch
OUTLINES = {RANDOM: (230, 0, 150), UNCHANGED: (0, 190, 255)}
NOT_CORRUPTED = (34, 34, 38)
WRONG_TO_RIGHT = ((230, 130, 0), (232, 232, 232), (0, 100, 190))
CONFIDENCE = ((80, 80, 88), (255, 240, 130))
LARGEST_ERROR = 0.25  # about the variance of pixels in [-1, 1]: errors from there on are drawn as wrong
_MARGIN, _HEADER, _LINE, _SMALLEST, _NARROWEST = 6, 22, 24, 144, 108

Images = UInt8[Tensor, "batch channels height width"]


class Reconstruction(NamedTuple):
    """Four versions of the same images, and figures for each patch.

    In `predicted` and `true` the corrupted patches are drawn as targets (bin centres or pixels), the rest as it is.
    """

    original: Images
    corrupted: Images
    """The model's input; masked patches are grey."""
    predicted: Images
    true: Images
    kinds: Int8[Tensor, "batch rows columns"]
    """0 for visible patches, else 1 + MASK, RANDOM or UNCHANGED."""
    right: Float[Tensor, "batch rows columns"]
    """Share of a patch's predictions that are right, for pixels their mean squared error; NaN where not corrupted."""
    confidence: Float[Tensor, "batch rows columns"]
    """Probability of the predicted class, the mean over a patch's predictions; NaN likewise, and for pixels."""
    score_name: str
    """Of `right`: accuracy or mse."""


@torch.inference_mode()
def reconstruct(
    model: MaskedPatchPrediction, images: Images, pixels: Float[Tensor, "b c h w"], corruption: Corruption
) -> Reconstruction:
    """The model's input and predictions for `images`; `pixels` are the same, normalised."""
    target, grid = model.target, model.encoder.grid
    picked, kinds, other, group = corruption
    patches = cut_patches(images, model.encoder.patch)
    own = gather_patches(patches, picked)
    pool = patches.reshape(len(images) // group, -1, *patches.shape[2:])
    replacement = gather_patches(pool, other.reshape(len(pool), -1)).view_as(own)
    kind = kinds[:, :, None, None, None]
    corrupted = torch.where(kind == MASK, GREY, torch.where(kind == RANDOM, replacement, own)).to(torch.uint8)
    output = model.predict(pixels, corruption).float()
    guess, values = target.guess(output), gather_patches(target.of(images), picked)

    def whole(drawn: Tensor) -> Tensor:
        at = picked[:, :, None, None, None].expand_as(drawn)
        return _join_patches(patches.scatter(1, at, drawn), grid)

    def by_patch(figures: Tensor, elsewhere: float) -> Tensor:
        return figures.new_full(patches.shape[:2], elsewhere).scatter(1, picked, figures).unflatten(1, grid)

    corrupted, predicted, true = map(whole, (corrupted, target.render(guess), target.render(values)))
    shown = by_patch((kinds + 1).to(torch.int8), 0.0)
    right, confidence = target.agreement(guess, values), target.confidence(output)
    right, confidence = by_patch(right, torch.nan), by_patch(confidence, torch.nan)
    return Reconstruction(images, corrupted, predicted, true, shown, right, confidence, target.score_name)


def picture_of_targets(target: Target, images: Images) -> Images:
    """The images with every patch drawn as its target."""
    grid = (images.shape[2] // target.patch[0], images.shape[3] // target.patch[1])
    return _join_patches(target.render(target.of(images)), grid)


def _join_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, _, channels, ph, pw = patches.shape
    image = patches.view(batch, *grid, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
    return image.reshape(batch, channels, grid[0] * ph, grid[1] * pw)


def to_rgb(image: UInt8[Tensor, "*batch channels height width"]) -> UInt8[np.ndarray, "*batch height width 3"]:
    """The first three channels, or one as grey."""
    channels = image.shape[-3]
    shown = image[..., :3, :, :] if channels >= 3 else image[..., :1, :, :].expand(*image.shape[:-3], 3, -1, -1)
    return shown.movedim(-3, -1).cpu().numpy()


class Tiles(NamedTuple):
    """The versions of each image, enlarged to be looked at, with their titles."""

    titles: tuple[str, ...]
    pixels: UInt8[np.ndarray, "images versions height width 3"]


class Layout(NamedTuple):
    """Where the tiles of a sheet are, in pixels: tile (i, j) begins at (top + i down, left + j across)."""

    titles: Sequence[str]
    images: int
    height: int
    width: int
    top: int
    left: int
    down: int
    across: int

    def area(self, image: int, version: int) -> tuple[slice, slice]:
        """Rows and columns of a tile."""
        top, left = self.top + image * self.down, self.left + version * self.across
        return slice(top, top + self.height), slice(left, left + self.width)


def draw_tiles(rows: Reconstruction) -> Tiles:
    """All versions of all images, enlarged by a whole number to at least 144 pixels."""
    height, width = rows.original.shape[2:]
    scale = max(1, -(-_SMALLEST // max(height, width)))
    patch = (scale * height // rows.kinds.shape[1], scale * width // rows.kinds.shape[2])
    kinds, right, confidence = (x.cpu().numpy() for x in (rows.kinds, rows.right, rows.confidence))
    tiles = {title: _enlarge(to_rgb(row), (scale, scale)) for title, row in zip(VERSIONS, rows[:4], strict=True)}
    for kind, colour in OUTLINES.items():
        for image, row, column in np.argwhere(kinds == kind + 1).tolist():
            top, left = row * patch[0], column * patch[1]
            _frame(tiles["corrupted input"][image, top : top + patch[0], left : left + patch[1]], colour)
    if rows.score_name == "mse":
        tiles["squared error"] = _enlarge(_scale(1 - right / LARGEST_ERROR, WRONG_TO_RIGHT), patch)
    else:
        tiles["right or wrong"] = _enlarge(_scale(right, WRONG_TO_RIGHT), patch)
        tiles["confidence"] = _enlarge(_scale(confidence, CONFIDENCE), patch)
    return Tiles(tuple(tiles), np.stack(list(tiles.values()), axis=1))


def draw_sheet(rows: Reconstruction) -> tuple[UInt8[np.ndarray, "height width 3"], str]:
    """All tiles on one picture, with titles and a legend; where they are, JSON for its PNG's text `TEXT_KEY`."""
    titles, tiles = draw_tiles(rows)
    images, versions, height, width, _ = tiles.shape
    across = max(width, _NARROWEST) + _MARGIN
    left = _MARGIN + (across - _MARGIN - width) // 2
    layout = Layout(titles, images, height, width, _HEADER, left, height + _MARGIN, across)
    sheet = np.full((_HEADER + layout.down * images, _MARGIN + across * versions, 3), 255, np.uint8)
    for image, version in np.ndindex(images, versions):
        sheet[layout.area(image, version)] = tiles[image, version]
    picture = Image.fromarray(sheet)
    pen = ImageDraw.Draw(picture)
    for version, title in enumerate(titles):
        middle = left + version * across + width / 2
        pen.text((middle, _HEADER / 2), title, fill="black", font=_font(), anchor="mm")
    legend = _draw_legend(rows.score_name, sheet.shape[1])
    return np.concatenate([np.asarray(picture), legend]), json.dumps(layout._asdict())


def read_sheet(path: Path) -> Tiles | None:
    """The tiles of a saved sheet, exactly as they were drawn; None for a picture without a layout.

    Raises:
        OSError: a file that is no picture, or cut short.
    """
    with Image.open(path) as file:
        text = file.info.get(TEXT_KEY)
        if text is None:
            return None
        layout, sheet = Layout(**json.loads(text)), np.asarray(file.convert("RGB"))
    tiles = [[sheet[layout.area(i, j)] for j in range(len(layout.titles))] for i in range(layout.images)]
    return Tiles(tuple(layout.titles), np.array(tiles))


def _enlarge(pictures: np.ndarray, times: tuple[int, int]) -> np.ndarray:
    return pictures.repeat(times[0], 1).repeat(times[1], 2)


def _scale(
    values: Float[np.ndarray, "*shape"], colours: Sequence[tuple[int, int, int]]
) -> UInt8[np.ndarray, "*shape 3"]:
    """Values from 0 to 1 on a scale of colours; NaN as a patch that is not corrupted."""
    stops = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, stops, channel) for channel in zip(*colours, strict=True)]
    known = ~np.isnan(values)[..., None]
    return np.where(known, np.stack(channels, axis=-1).round(), NOT_CORRUPTED).astype(np.uint8)


def _frame(area: np.ndarray, colour: tuple[int, int, int]) -> None:
    line = max(1, round(min(area.shape[:2]) / 8))
    area[:line] = area[-line:] = area[:, :line] = area[:, -line:] = colour


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(13)


def _draw_legend(score_name: str, width: int) -> np.ndarray:
    """A line for each colour: words before it, a field of it, and words after it."""
    side, length = 14, 56
    scale = np.tile(np.linspace(0, 1, length), (side, 1))
    random, unchanged = (np.full((side, side, 3), 255, np.uint8) for _ in range(2))
    _frame(random, OUTLINES[RANDOM])
    _frame(unchanged, OUTLINES[UNCHANGED])
    items = [
        ("", np.full((side, side, 3), GREY, np.uint8), "masked"),
        ("", random, "replaced by another patch"),
        ("", unchanged, "corrupted, but left unchanged"),
        ("", _scale(np.full((side, side), np.nan), CONFIDENCE), "not corrupted"),
    ]
    if score_name == "mse":
        items.append(("error 0", _scale(1 - scale, WRONG_TO_RIGHT), f"{LARGEST_ERROR} or more"))
    else:
        items.append(("wrong", _scale(scale, WRONG_TO_RIGHT), "right"))
        items.append(("confidence 0", _scale(scale, CONFIDENCE), "1"))
    picture = Image.new("RGB", (width, _LINE * len(items)), "white")
    pen = ImageDraw.Draw(picture)
    indent = _MARGIN + round(max(pen.textlength(before, _font()) for before, *_ in items))
    for line, (before, field, after) in enumerate(items):
        picture.paste(Image.fromarray(field), (indent + _MARGIN, line * _LINE + (_LINE - len(field)) // 2))
        for x, words, anchor in ((indent, before, "rm"), (indent + field.shape[1] + 2 * _MARGIN, after, "lm")):
            pen.text((x, (line + 0.5) * _LINE), words, fill="black", font=_font(), anchor=anchor)
    return np.asarray(picture)
