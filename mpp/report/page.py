"""The blocks that a page is made of. `html` writes a page to disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture."""

    name: str
    """Of its file, without ending, such as "attention_distance"; unique on the page."""
    alt: str
    """A sentence that describes it to readers who cannot see it."""
    image: UInt8[np.ndarray, "height width channels"] | str
    """Pixels with three channels or four (alpha), or an SVG document."""
    caption: str = ""
    pixelated: bool = False
    """Each pixel means something: enlarged without smoothing, stored without loss."""
    width: int | None = None
    """Largest width in CSS pixels; None: the whole column."""


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the rows, the others are aligned to the right.

    `folded` hides it behind its caption until a reader opens it. `prose` aligns the cells to the left.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    folded: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Gallery:
    """Pictures beside each other, as many in a row as fit."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Sheet:
    """Small pictures in rows and columns, such as the versions of an image in a row.

    A cell is a picture, "" for none, or one picture for each of `stops`, the positions of a slider such as "step 400";
    the last position is shown first. Sheets with neither row titles nor stops stand beside each other.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Picture | tuple[Picture, ...] | Literal[""], ...], ...]
    titles: tuple[str, ...] = ()
    """Of the rows."""
    stops: tuple[str, ...] = ()
    slider: str = ""
    """What the slider changes, such as "training step"."""
    tile: int = 96
    """Largest width of a cell in CSS pixels."""


@dataclass(frozen=True)
class Text:
    """Plain paragraphs, or, with a `summary`, preformatted lines that the summary opens."""

    text: str
    summary: str = ""


Block = Picture | Table | Gallery | Sheet | Text


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    """Its anchor, in lower case with hyphens."""
    title: str
    reading: str
    """One sentence that says how to read it."""
    blocks: tuple[Block, ...]
    paper: str = ""
    """The part of the paper that it follows, such as "section 4.5, figure 7 (left)"; may be empty."""


@dataclass(frozen=True)
class Page:
    """A whole page: title, a sentence or two under it, sections, the most important figures, what they mean."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    headline: Mapping[str, str] = field(default_factory=dict)
    verdict: tuple[str, ...] = ()
    """Sentences, which stand first."""
