"""A page as one HTML file that needs nothing else, and its pictures as files.

The file opens from disk without a network, which its content security policy forbids as well. Without JavaScript, and
on paper, everything is there to be read; sliders then stand at their last stop, and paper has what is folded.
"""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mpp.report.page.parts import Gallery, Page, Picture, Sheet
from mpp.report.page.pixels import data_uri, draw_sheet, enlarged, png
from mpp.system.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Template

_WIDEST_CELL = 340  # CSS pixels of a picture in a gallery, at least, where it does not ask for less

Cell = Picture | tuple[Picture, ...] | Literal[""]


def render(page: Page) -> str:
    """The page as one HTML document in UTF-8.

    Raises:
        ValueError: a name that is there twice, or a sheet whose rows, titles or stops do not fit its columns.
    """
    _check(page)
    script, style = (files("mpp.report.page").joinpath(name).read_text("utf-8") for name in ("page.js", "page.css"))
    # Only this script may run, whatever a name in the page may hold.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(page=page, script=script, style=style, allowed=allowed)


def write_page(page: Page, path: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
        ValueError: as `render`.
        OSError: it cannot be written.
    """
    text = render(page).encode("utf-8", errors="replace")  # of a path that is no UTF-8
    write_whole(path, lambda file: file.write(text))


def write_pictures(page: Page, folder: Path) -> list[Path]:
    """Writes the pictures of `pictures_of` as SVG and PNG, and returns their paths.

    Raises:
        ValueError: as `render`.
        OSError: one cannot be written.
    """
    written = []
    for name, picture in pictures_of(page):
        content = picture.encode(errors="replace") if isinstance(picture, str) else png(picture)
        written.append(folder / name)
        write_whole(written[-1], lambda file, content=content: file.write(content))
    return written


def pictures_of(page: Page) -> Iterator[tuple[str, str | np.ndarray]]:
    """Every picture in the page's order: NAME.svg and its text, or NAME.png and its pixels, uint8 (H, W, 3 or 4).

    Small pixelated pictures are enlarged by a whole factor. A sheet becomes one PNG with its titles, at its last stop:
    SECTION_sheet.png, and SECTION_sheet_2.png where there is another; drawings in a sheet are files of their own.

    Raises:
        ValueError: as `render`.
    """
    _check(page)
    sheets = Counter[str]()
    for section, block in ((each, block) for each in page.sections for block in each.blocks):
        pictures = _last_pictures(block)
        for picture in pictures:
            if isinstance(picture.image, str):
                yield f"{picture.name}.svg", _svg(picture, "background: #fff")
            elif not isinstance(block, Sheet):
                yield f"{picture.name}.png", enlarged(picture)
        if isinstance(block, Sheet) and any(not isinstance(picture.image, str) for picture in pictures):
            name = f"{section.name.replace('-', '_')}_sheet"
            sheets[name] += 1
            yield f"{name}_{sheets[name]}.png" if sheets[name] > 1 else f"{name}.png", draw_sheet(block)


def _last_pictures(block: object) -> list[Picture]:
    """The pictures of a block, of those behind a slider the last."""
    if isinstance(block, Picture):
        return [block]
    if isinstance(block, Gallery):
        return list(block.pictures)
    if isinstance(block, Sheet):
        return [_stops(cell)[-1] for cell in chain(*block.rows) if cell]
    return []


def _stops(cell: Cell) -> tuple[Picture, ...]:
    """The pictures that a slider goes through in this cell; one where it does not change."""
    return cell if isinstance(cell, tuple) else (cell,) if cell else ()


def _check(page: Page) -> None:
    """Raises ValueError where the page cannot be written."""
    blocks = [block for section in page.sections for block in section.blocks]
    for sheet in blocks:
        if isinstance(sheet, Sheet):
            _check_sheet(sheet)
    _refuse_doubles("picture", (picture.name for block in blocks for picture in _all_pictures(block)))
    _refuse_doubles("section", (section.name for section in page.sections))


def _all_pictures(block: object) -> Iterator[Picture]:
    if isinstance(block, Sheet):
        yield from chain.from_iterable(_stops(cell) for cell in chain(*block.rows))
    else:
        yield from _last_pictures(block)


def _check_sheet(sheet: Sheet) -> None:
    widths = {len(row) for row in sheet.rows}
    if not sheet.columns or not sheet.rows or widths != {len(sheet.columns)}:
        raise ValueError(f"a sheet of {len(sheet.columns)} columns has {len(sheet.rows)} rows of {sorted(widths)}")
    if sheet.titles and len(sheet.titles) != len(sheet.rows):
        raise ValueError(f"a sheet of {len(sheet.rows)} rows has {len(sheet.titles)} titles")
    counts = {len(cell) for cell in chain(*sheet.rows) if isinstance(cell, tuple)}
    if counts - {len(sheet.stops)}:
        raise ValueError(f"a sheet of {len(sheet.stops)} stops has cells of {sorted(counts)} pictures")


def _refuse_doubles(kind: str, names: Iterator[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the page has two {kind}s of the name {name!r}: give each one of its own")
        seen.add(name)


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mpp.report.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "stops": _changing, "svg": lambda picture: Markup(_svg(picture))}
    environment.globals |= {"cell_width": _cell_width}
    environment.tests["drawing"] = lambda picture: isinstance(picture.image, str)
    return environment.get_template("page.html.jinja")


def _changing(cell: Cell) -> tuple[Picture, ...]:
    """As `_stops`, but one where all are the same picture, so that it is stored once."""
    pictures = _stops(cell)
    return pictures if len({(data_uri(picture), picture.caption) for picture in pictures}) > 1 else pictures[-1:]


def _cell_width(gallery: Gallery) -> int:
    """CSS pixels that a place in the gallery has at least."""
    return min(_WIDEST_CELL, max((picture.width or _WIDEST_CELL for picture in gallery.pictures), default=0))


def _svg(picture: Picture, style: str = "") -> str:
    """The SVG element, named for who does not see it, with ids that no other picture on the page has."""
    from markupsafe import escape

    assert isinstance(picture.image, str)
    text = picture.image[picture.image.index("<svg") :]
    prefix = re.sub(r"[^\w-]", "_", picture.name)
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{prefix}-", text)
    head, rest = text.split(">", 1)
    if style:
        head = re.sub(r' style="', f' style="{style}; ', head) if ' style="' in head else f'{head} style="{style}"'
    return f'{head} role="img" aria-label="{escape(picture.alt)}">{rest}'
