"""Contact sheets: images as the model sees them in rows, with a caption each."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from mpp.data.decoding import BadImage, open_picture
from mpp.data.reader import kind_of
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.sources.names import printable
from mpp.data.transform import EvalTransform
from mpp.objective.reconstruction import to_rgb

ROWS, COLUMNS = 8, 12
TILE = 128
"""Longest side of a tile in pixels."""
MARGIN, CAPTION = 6, 18
_GREY = (200, 200, 200)


def spread_over_classes(total: int, labels: np.ndarray | None, count: int) -> np.ndarray:
    """Positions of at most `count` of `total` images, evenly over labels, int64 (total,) or None, and within each."""
    if labels is None:
        count = min(total, count)
        return np.arange(count, dtype=np.int64) * total // max(1, count)
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    if len(sizes) > count:
        return order[starts[np.arange(count) * len(sizes) // count]]
    turn = np.arange(total) - np.repeat(starts, sizes)  # of each image within its class
    chosen = np.sort(np.argsort(turn, kind="stable")[:count])
    label = np.repeat(np.arange(len(sizes)), sizes)[chosen]
    shares = np.bincount(label, minlength=len(sizes))
    return order[starts[label] + turn[chosen] * sizes[label] // shares[label]]


class Tile(NamedTuple):
    """One image of a sheet, and what stands below it."""

    source: Source
    index: int
    caption: str


def draw_sheet(
    source: Source, reading: DecodeOptions, image_hw: tuple[int, int], indices: Sequence[int], labels: np.ndarray | None
) -> Image.Image:
    """An RGB picture of 8 x 12 tiles with the names of their classes, fewer where there are fewer `indices`.

    `image_hw` is the model's input size; `labels` int64, of the whole source, or None.
    """

    def tile(index: int) -> Tile:
        label = -1 if labels is None else int(labels[index])
        return Tile(source, index, source.classes[label] if source.classes and label >= 0 else "")

    return draw_tiles([tile(index) for index in indices], reading, image_hw)


def draw_tiles(tiles: Sequence[Tile], reading: DecodeOptions, image_hw: tuple[int, int]) -> Image.Image:
    """An RGB picture of these tiles, 12 a row."""
    return draw_rows([tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)], reading, image_hw)


def draw_rows(rows: Sequence[Sequence[Tile]], reading: DecodeOptions, image_hw: tuple[int, int]) -> Image.Image:
    """An RGB picture of rows of tiles, each the image as a model of the input size `image_hw` sees it.

    In the place of an image that cannot be used stands why.
    """
    scale = TILE / max(image_hw)
    height, width = (max(1, round(side * scale)) for side in image_hw)
    columns = max(1, *map(len, rows)) if rows else 1
    cell_h, cell_w = height + CAPTION + MARGIN, width + MARGIN
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, max(1, len(rows)) * cell_h + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    # Pillow's own font has no letters but the English ones.
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 11)

    def write(text: str, x: float, y: float) -> None:
        if font.getlength(text) > width:
            while text and font.getlength(text + "...") > width:
                text = text[:-1]
            text += "..."
        pen.text((x, y), text, fill="black", font=font, anchor="mm")

    transform = EvalTransform(image_hw)
    places = [(row, column, tile) for row, tiles in enumerate(rows) for column, tile in enumerate(tiles)]
    for row, column, (source, index, caption) in places:
        x, y = MARGIN + column * cell_w, MARGIN + row * cell_h
        try:
            (found,) = source.read_many([index], reading.max_bytes)
            if isinstance(found, OSError):
                raise found
            tile = Image.fromarray(to_rgb(transform(open_picture(found[0], reading))))
            # Small pixels are shown as they are; large images as they look.
            tile = tile.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, y))
        except (BadImage, OSError) as error:
            pen.rectangle((x, y, x + width - 1, y + height - 1), fill=_GREY)
            write(kind_of(error), x + width / 2, y + height / 2)
        write(printable(caption), x + width / 2, y + height + CAPTION / 2)
    return sheet
