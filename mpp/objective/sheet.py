"""A sheet of reconstructions: a row for each image, a column for each version of it, and a legend.

Colours are told apart without red and green: right is blue and wrong is orange; patches that were not corrupted are
dark. The sheet's layout goes into the picture's file as text, so that its tiles can be had again from there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8, UInt8
from PIL import Image, ImageDraw, ImageFont

from mpp.objective.masking import RANDOM, UNCHANGED
from mpp.objective.picture import GREY, Reconstruction, to_rgb

TEXT_KEY = "mpp"  # of the layout, among the texts of a PNG
VERSIONS = ("original", "corrupted input", "predicted", "true")
OUTLINES = {RANDOM: (230, 0, 150), UNCHANGED: (0, 190, 255)}
NOT_CORRUPTED = (34, 34, 38)
WRONG_TO_RIGHT = ((230, 130, 0), (232, 232, 232), (0, 100, 190))
CONFIDENCE = ((80, 80, 88), (255, 240, 130))
LARGEST_ERROR = 0.25  # about the variance of pixels in [-1, 1]: errors from there on are drawn as wrong
_MARGIN, _HEADER, _LINE, _SMALLEST, _NARROWEST = 6, 22, 24, 144, 108


class Sheet(NamedTuple):
    """A picture and where its tiles are.

    Attributes:
        picture: the whole sheet.
        layout: JSON to be written into a PNG as the text `TEXT_KEY`, for `read_sheet`.
    """

    picture: UInt8[np.ndarray, "height width 3"]
    layout: str


class Tiles(NamedTuple):
    """The versions of each image, enlarged to be seen.

    Attributes:
        titles: of the versions.
        pixels: of every version of every image.
    """

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

    def place(self, image: int, version: int) -> tuple[slice, slice]:
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
    _outline(tiles["corrupted input"], kinds, patch)
    if rows.score_name == "mse":
        tiles["squared error"] = _enlarge(_graded(1 - right / LARGEST_ERROR, WRONG_TO_RIGHT), patch)
    else:
        tiles["right or wrong"] = _enlarge(_graded(right, WRONG_TO_RIGHT), patch)
        tiles["confidence"] = _enlarge(_graded(confidence, CONFIDENCE), patch)
    return Tiles(tuple(tiles), np.stack(list(tiles.values()), axis=1))


def draw_sheet(rows: Reconstruction) -> Sheet:
    """All tiles on one picture, with titles and a legend."""
    titles, tiles = draw_tiles(rows)
    images, versions, height, width, _ = tiles.shape
    across = max(width, _NARROWEST) + _MARGIN
    left = _MARGIN + (across - _MARGIN - width) // 2
    layout = Layout(titles, images, height, width, _HEADER, left, height + _MARGIN, across)
    sheet = np.full((_HEADER + layout.down * images, _MARGIN + across * versions, 3), 255, np.uint8)
    for image, version in np.ndindex(images, versions):
        sheet[layout.place(image, version)] = tiles[image, version]
    picture = Image.fromarray(sheet)
    pen = ImageDraw.Draw(picture)
    for version, title in enumerate(titles):
        middle = left + version * across + width / 2
        pen.text((middle, _HEADER / 2), title, fill="black", font=_font(), anchor="mm")
    legend = _legend(rows.score_name, sheet.shape[1])
    return Sheet(np.concatenate([np.asarray(picture), legend]), json.dumps(layout._asdict()))


def read_sheet(path: Path) -> Tiles | None:
    """The tiles of a saved sheet, exactly as they were drawn; None for a picture that says no layout.

    Raises:
        OSError: a file that is no picture, or cut short.
    """
    with Image.open(path) as file:
        text = file.info.get(TEXT_KEY)
        if text is None:
            return None
        layout, sheet = Layout(**json.loads(text)), np.asarray(file.convert("RGB"))
    tiles = [[sheet[layout.place(i, j)] for j in range(len(layout.titles))] for i in range(layout.images)]
    return Tiles(tuple(layout.titles), np.array(tiles))


def _enlarge(pictures: np.ndarray, times: tuple[int, int]) -> np.ndarray:
    return pictures.repeat(times[0], 1).repeat(times[1], 2)


def _graded(
    values: Float[np.ndarray, "*shape"], colours: Sequence[tuple[int, int, int]]
) -> UInt8[np.ndarray, "*shape 3"]:
    """Values from 0 to 1 on a scale of colours; NaN as what is not corrupted."""
    stops = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, stops, channel) for channel in zip(*colours, strict=True)]
    known = ~np.isnan(values)[..., None]
    return np.where(known, np.stack(channels, axis=-1).round(), NOT_CORRUPTED).astype(np.uint8)


def _outline(tiles: np.ndarray, kinds: Int8[np.ndarray, "batch rows columns"], patch: tuple[int, int]) -> None:
    """Frames random and unchanged patches."""
    for kind, colour in OUTLINES.items():
        for image, row, column in np.argwhere(kinds == kind + 1).tolist():
            top, left = row * patch[0], column * patch[1]
            _frame(tiles[image, top : top + patch[0], left : left + patch[1]], colour)


def _frame(area: np.ndarray, colour: tuple[int, int, int]) -> None:
    line = max(1, round(min(area.shape[:2]) / 8))
    area[:line] = area[-line:] = area[:, :line] = area[:, -line:] = colour


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(13)


def _legend(score_name: str, width: int) -> np.ndarray:
    """Lines of small fields of colour with words before and after them, as many in a line as fit."""
    items = _legend_items(score_name)
    pen, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), _font()
    places, x, y = [], _MARGIN, 0
    for before, field, after in items:
        start = pen.textlength(before, font) + _MARGIN if before else 0
        length = start + field.shape[1] + _MARGIN + pen.textlength(after, font)
        if x > _MARGIN and x + length > width:
            x, y = _MARGIN, y + _LINE
        places.append((round(x), round(x + start), y))
        x += length + 3 * _MARGIN
    picture = Image.new("RGB", (width, y + _LINE), "white")
    pen = ImageDraw.Draw(picture)
    for (before, field, after), (x, middle, y) in zip(items, places, strict=True):
        pen.text((x, y + _LINE / 2), before, fill="black", font=font, anchor="lm")
        picture.paste(Image.fromarray(field), (middle, y + (_LINE - len(field)) // 2))
        end = middle + field.shape[1] + _MARGIN
        pen.text((end, y + _LINE / 2), after, fill="black", font=font, anchor="lm")
    return np.asarray(picture)


def _legend_items(score_name: str) -> list[tuple[str, np.ndarray, str]]:
    """Words before, a field of colour, and words after it."""
    side, length = 14, 56
    scale = np.tile(np.linspace(0, 1, length), (side, 1))
    random, unchanged = (np.full((side, side, 3), 255, np.uint8) for _ in range(2))
    _frame(random, OUTLINES[RANDOM])
    _frame(unchanged, OUTLINES[UNCHANGED])
    items = [
        ("", np.full((side, side, 3), GREY, np.uint8), "masked"),
        ("", random, "replaced by another patch"),
        ("", unchanged, "corrupted, but left unchanged"),
        ("", _graded(np.full((side, side), np.nan), CONFIDENCE), "not corrupted"),
    ]
    if score_name == "mse":
        return [*items, ("error 0", _graded(1 - scale, WRONG_TO_RIGHT), f"{LARGEST_ERROR} or more")]
    return [
        *items,
        ("wrong", _graded(scale, WRONG_TO_RIGHT), "right"),
        ("confidence 0", _graded(scale, CONFIDENCE), "1"),
    ]
