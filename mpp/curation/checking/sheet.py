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


def spread_over_classes(indices: np.ndarray, labels: np.ndarray | None, count: int) -> np.ndarray:
    """Positions of at most `count` images, as evenly over the labels as there are images, and over each of them.

    Args:
        indices: int64 (n,), which images there are.
        labels: int64 (n,), theirs, or None.
        count: how many.
    """
    if labels is None:
        return _evenly(len(indices), count)
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    if len(sizes) > count:
        chosen = _evenly(len(sizes), count)
        starts = np.cumsum(sizes) - sizes
        return order[starts[chosen]]
    shares = _shares(sizes, count)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return np.concatenate([part[_evenly(len(part), share)] for part, share in zip(parts, shares, strict=True)])


def _evenly(total: int, count: int) -> np.ndarray:
    count = min(total, count)
    return np.arange(count, dtype=np.int64) * total // max(1, count)


def _shares(sizes: np.ndarray, count: int) -> list[int]:
    """As equal as the sizes allow, `count` together."""
    shares, left = np.zeros(len(sizes), dtype=np.int64), min(count, int(sizes.sum()))
    while left:
        open_ = np.flatnonzero(shares < sizes)
        more = min(max(1, left // len(open_)), left)
        for part in open_[:left] if more == 1 else open_:
            give = min(more, int(sizes[part] - shares[part]), left)
            shares[part] += give
            left -= give
    return shares.tolist()


def draw_sheet(
    source: Source, reading: DecodeOptions, image_hw: tuple[int, int], indices: Sequence[int], labels: np.ndarray | None
) -> Image.Image:
    """An RGB picture of 8 x 12 tiles, fewer where there are fewer images.

    Args:
        source: what to read.
        reading: how files become pixels.
        image_hw: the model's input size.
        indices: which images.
        labels: int64, of the whole source, or None.
    """
    scale = TILE / max(image_hw)
    height, width = (max(1, round(side * scale)) for side in image_hw)
    columns = max(1, min(COLUMNS, len(indices)))
    rows = max(1, -(-len(indices) // COLUMNS))
    cell_h, cell_w = height + CAPTION + MARGIN, width + MARGIN
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), _font(11)
    transform = EvalTransform(image_hw)
    for number, index in enumerate(indices):
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
            text = _fitting(kind_of(error), font, width)
            pen.text((x + width / 2, y + height / 2), text, fill="black", font=font, anchor="mm")
        label = -1 if labels is None else int(labels[index])
        name = source.classes[label] if source.classes and label >= 0 else ""
        below = x + width / 2, y + height + CAPTION / 2
        pen.text(below, _fitting(printable(name), font, width), fill="black", font=font, anchor="mm")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, for Pillow's own font has no letter but the English ones."""
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the text as the width takes."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
