"""Writes a page as one HTML file that needs nothing else, and its pictures as files.

The file opens from disk without a network, which its content security policy forbids as well. Without JavaScript, and
on paper, everything is readable: sliders then stand at their last stop, and what is folded is printed.
"""

import base64
import hashlib
import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpp.report.page import Block, Gallery, Page, Picture, Sheet
from mpp.system.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Template

_WIDEST_CELL = 340  # CSS pixels of a picture in a gallery, at least, where it does not ask for less
_LEAST_SIDE = 256  # pixels that a file of a pixelated picture has at least
_GAP, _LETTERS = 12, 20  # pixels in a sheet's file


def render(page: Page) -> str:
    """Returns the page as one HTML document in UTF-8.

    Raises:
        ValueError: two pictures of the same name.
    """
    names = Counter(
        picture.name for section in page.sections for block in section.blocks for picture in all_pictures(block)
    )
    if doubles := [name for name, number in names.items() if number > 1]:
        raise ValueError(f"the page has two pictures of the name {doubles[0]!r}: give each its own")
    script, style = (files("mpp.report").joinpath(name).read_text("utf-8") for name in ("page.js", "page.css"))
    # Only this script may run, whatever a name on the page contains.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(page=page, script=script, style=style, allowed=allowed)


def write_page(page: Page, path: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
        ValueError: as `render`.
        OSError: it cannot be written.
    """
    write_whole(path, render(page).encode("utf-8", errors="replace"))  # a path may be no UTF-8


def write_pictures(page: Page, folder: Path) -> list[Path]:
    """Writes the pictures of `pictures_of` and returns their paths.

    Raises:
        OSError: one cannot be written.
    """
    written = []
    for name, picture in pictures_of(page):
        written.append(folder / name)
        content = picture.encode(errors="replace") if isinstance(picture, str) else _encoded(picture, "PNG")
        write_whole(written[-1], content)
    return written


def pictures_of(page: Page) -> Iterator[tuple[str, str | np.ndarray]]:
    """Yields every picture in the page's order: NAME.svg and its text, or NAME.png and its pixels (H, W, 3 or 4) uint8.

    Small pixelated pictures are enlarged by a whole factor. The pixels of a sheet become one PNG with its titles, at
    its last stop: SECTION_sheet.png, and SECTION_sheet_2.png where there is another.
    """
    sheets = Counter[str]()
    for section, block in ((each, block) for each in page.sections for block in each.blocks):
        pictures = [*all_pictures(block)]
        if isinstance(block, Sheet):
            pictures = [_stops(cell)[-1] for cell in chain(*block.rows) if cell]
        for picture in pictures:
            if isinstance(picture.image, str):
                yield f"{picture.name}.svg", _svg(picture, "background: #fff")
            elif not isinstance(block, Sheet):
                factor = -(-_LEAST_SIDE // max(picture.image.shape[:2])) if picture.pixelated else 1
                yield f"{picture.name}.png", picture.image.repeat(factor, axis=0).repeat(factor, axis=1)
        if isinstance(block, Sheet) and any(not isinstance(picture.image, str) for picture in pictures):
            name = f"{section.name.replace('-', '_')}_sheet"
            sheets[name] += 1
            yield f"{name}_{sheets[name]}.png" if sheets[name] > 1 else f"{name}.png", _draw_sheet(block)


def all_pictures(block: Block) -> Iterator[Picture]:
    """All pictures of a block, with those behind a slider."""
    if isinstance(block, Picture):
        yield block
    elif isinstance(block, Gallery):
        yield from block.pictures
    elif isinstance(block, Sheet):
        yield from chain.from_iterable(map(_stops, chain(*block.rows)))


def _stops(cell: Picture | tuple[Picture, ...] | str) -> tuple[Picture, ...]:
    """The pictures of a cell; one where the slider does not change it."""
    if isinstance(cell, Picture):
        return (cell,)
    return cell if isinstance(cell, tuple) else ()


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mpp.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"data_uri": _data_uri, "stops": _stops, "svg": lambda picture: Markup(_svg(picture))}
    environment.globals |= {"cell_width": _cell_width}
    environment.tests["drawing"] = lambda picture: isinstance(picture.image, str)
    return environment.get_template("page.html.jinja")


def _cell_width(gallery: Gallery) -> int:
    """Least width of a picture in the gallery, in CSS pixels."""
    return min(_WIDEST_CELL, max((picture.width or _WIDEST_CELL for picture in gallery.pictures), default=0))


def _svg(picture: Picture, style: str = "") -> str:
    """The SVG element with the picture's `alt` as its label, and with ids that no other picture on the page has."""
    from markupsafe import escape

    assert isinstance(picture.image, str)
    prefix = re.sub(r"[^\w-]", "_", picture.name)
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{prefix}-", picture.image)
    text = text.replace(' style="', f' style="{style}; ', 1) if style else text
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.alt)}" ', 1)


def _data_uri(picture: Picture) -> str:
    """The pixels as a data URI: without loss where each means something, otherwise in the smaller format."""
    assert not isinstance(picture.image, str)
    kind, encoded = "png", _encoded(picture.image, "PNG")
    if not picture.pixelated:
        webp = _encoded(picture.image, "WEBP", quality=85)  # no visible difference in photographs at this size
        if len(webp) < len(encoded):
            kind, encoded = "webp", webp
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _encoded(pixels: np.ndarray, container: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, container, optimize=True, **options)
    return file.getvalue()


def _draw_sheet(sheet: Sheet) -> np.ndarray:
    """The sheet at its last stop on white, with the titles of its columns and rows, uint8 (H, W, 3)."""
    from matplotlib import get_data_path  # Pillow's own font has English letters alone

    side = 2 * sheet.tile  # two pixels of the file for a CSS pixel
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _LETTERS)
    tiles: list[list[Image.Image | None]] = []
    for row in sheet.rows:
        tiles.append([])
        for pictures in map(_stops, row):
            picture = pictures[-1] if pictures else None
            if picture is None or isinstance(picture.image, str):  # a drawing is a file of its own
                tiles[-1].append(None)
                continue
            image = Image.fromarray(picture.image).convert("RGBA")
            way = Image.Resampling.NEAREST if picture.pixelated else Image.Resampling.LANCZOS
            tiles[-1].append(image.resize((side, max(1, round(side * image.height / image.width))), way))
    heights = [max((tile.height for tile in row if tile), default=side) for row in tiles]
    left = _GAP + (round(max(map(font.getlength, sheet.titles))) + _GAP if sheet.titles else 0)
    heads = [textwrap.fill(title, max(1, int(side / (0.55 * _LETTERS)))) for title in sheet.columns]
    top = _GAP + round(1.3 * _LETTERS) * max(head.count("\n") + 1 for head in heads)
    size = (left + len(sheet.columns) * (side + _GAP), top + sum(heights) + _GAP * len(heights))
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    for column, head in enumerate(heads):
        middle = left + column * (side + _GAP) + side / 2
        pen.multiline_text((middle, _GAP / 2), head, fill="black", font=font, anchor="ma", align="center")
    y = top
    for number, (row, height) in enumerate(zip(tiles, heights, strict=True)):
        if sheet.titles:
            pen.text((_GAP, y + height / 2), sheet.titles[number], fill="black", font=font, anchor="lm")
        for column, tile in enumerate(row):
            if tile:
                drawn.paste(tile, (left + column * (side + _GAP), y), tile)
        y += height + _GAP
    return np.asarray(drawn)
