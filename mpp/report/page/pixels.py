"""Pictures of pixels as files and as data in the page."""

import base64
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpp.report.page.parts import Picture, Sheet

_QUALITY = 85  # of WebP: no difference to be seen in photographs at the size of the screen
_LEAST_SIDE = 256  # pixels that a file of a pixelated picture has at least
_SHARP = 2  # pixels of a file for one CSS pixel
_GAP, _LETTERS = 12, 20  # pixels in the drawn sheet


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3 or 4) as a PNG."""
    return _encoded(pixels, "PNG", optimize=True)


def enlarged(picture: Picture) -> np.ndarray:
    """The pixels, of a small pixelated picture enlarged by a whole factor, so that it is seen outside a page."""
    assert not isinstance(picture.image, str)
    pixels = picture.image
    if picture.pixelated:
        factor = -(-_LEAST_SIDE // max(pixels.shape[:2]))
        pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return pixels


def data_uri(picture: Picture) -> str:
    """The pixels as an address that holds them: without loss where each means something, otherwise as is smallest."""
    assert not isinstance(picture.image, str)
    pixels = np.ascontiguousarray(picture.image)
    return _uri(pixels.tobytes(), pixels.shape, picture.pixelated)


@lru_cache(maxsize=64)
def _uri(content: bytes, shape: tuple[int, ...], pixelated: bool) -> str:
    """Pictures come more than once, such as the original of each checkpoint."""
    pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape)
    kind, encoded = "png", png(pixels)
    if not pixelated:
        webp = _encoded(pixels, "WEBP", quality=_QUALITY)
        if len(webp) < len(encoded):
            kind, encoded = "webp", webp
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _encoded(pixels: np.ndarray, container: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, container, **options)
    return file.getvalue()


def draw_sheet(sheet: Sheet) -> np.ndarray:
    """The sheet at its last stop on white, with the titles of its columns and rows, uint8 (H, W, 3)."""
    side = _SHARP * sheet.tile
    font = _font(_LETTERS)
    tiles = [
        [_tile(cell[-1] if isinstance(cell, tuple) else cell, side) if cell else None for cell in row]
        for row in sheet.rows
    ]
    heights = [max((tile.height for tile in row if tile), default=side) for row in tiles]
    left = _GAP + (round(max(font.getlength(title) for title in sheet.titles)) + _GAP if sheet.titles else 0)
    heads = [_wrapped(title, font, side) for title in sheet.columns]
    top = _GAP + round(1.3 * _LETTERS) * max(head.count("\n") + 1 for head in heads)
    size = (left + len(sheet.columns) * (side + _GAP), top + sum(heights) + _GAP * len(heights))
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    for column, head in enumerate(heads):
        at = left + column * (side + _GAP) + side / 2
        pen.multiline_text((at, _GAP / 2), head, fill="black", font=font, anchor="ma", align="center")
    y = top
    for number, (row, height) in enumerate(zip(tiles, heights, strict=True)):
        if sheet.titles:
            pen.text((_GAP, y + height / 2), sheet.titles[number], fill="black", font=font, anchor="lm")
        for column, tile in enumerate(row):
            if tile:
                drawn.paste(tile, (left + column * (side + _GAP), y), tile)
        y += height + _GAP
    return np.asarray(drawn)


def _tile(picture: Picture, width: int) -> Image.Image | None:
    """RGBA of that width; None for a drawing, which has no pixels."""
    if isinstance(picture.image, str):
        return None
    image = Image.fromarray(picture.image).convert("RGBA")
    way = Image.Resampling.NEAREST if picture.pixelated else Image.Resampling.LANCZOS
    return image.resize((width, max(1, round(width * image.height / image.width))), way)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The words in lines that fit the width, as far as a word does."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, for Pillow's own font has no letter but the English ones."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
