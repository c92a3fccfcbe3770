"""The contact sheet: images as the model will see them, drawn evenly over the classes, with their names."""

from collections.abc import Sequence
from pathlib import Path

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


Tile = tuple[Source, int, str]
"""A source, the index of the image in it, and the words below."""


def draw_sheet(
    source: Source, reading: DecodeOptions, image_hw: tuple[int, int], indices: Sequence[int], labels: np.ndarray | None
) -> Image.Image:
    """An RGB picture of 8 x 12 tiles, fewer where there are fewer `indices`.

    `image_hw` is the model's input size; `labels` int64, of the whole source, or None.
    """
    names = source.classes if labels is not None else None
    shown = {index: names[int(labels[index])] if names and labels[index] >= 0 else "" for index in indices}
    return draw_tiles([(source, index, name) for index, name in shown.items()], reading, image_hw)


def draw_tiles(tiles: Sequence[Tile], reading: DecodeOptions, image_hw: tuple[int, int]) -> Image.Image:
    """An RGB picture of images of any sources, 12 a row, with their words."""
    scale = TILE / max(image_hw)
    height, width = (max(1, round(side * scale)) for side in image_hw)
    columns, rows = max(1, min(COLUMNS, len(tiles))), max(1, -(-len(tiles) // COLUMNS))
    cell_h, cell_w = height + CAPTION + MARGIN, width + MARGIN
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
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
    for number, (source, index, words) in enumerate(tiles):
        x, y = MARGIN + number % columns * cell_w, MARGIN + number // columns * cell_h
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
        write(printable(words), x + width / 2, y + height + CAPTION / 2)
    return sheet
