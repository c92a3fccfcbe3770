"""What a page is made of. Sections are built of these by whoever has something to show; `document` writes them out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        name: of its file, without ending, such as "attention_distance"; unique on the page.
        alt: what it shows, in a sentence, for who does not see it.
        image: pixels with three channels or four (alpha), or an SVG document.
        caption: a few words under it; may be empty.
        pixelated: small arrays of which each pixel means something: enlarged without smoothing, stored without loss.
        width: CSS pixels that it takes at most; None: as wide as its place.
    """

    name: str
    alt: str
    image: UInt8[np.ndarray, "height width channels"] | str
    caption: str = ""
    pixelated: bool = False
    width: int | None = None


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the rows, the others are aligned to the right.

    `folded` puts it behind a line that opens it, which is the caption. Cells of `prose` are words, not figures, and
    aligned to the left.
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
    """Small pictures in rows and columns with titles: versions of an image in a row.

    A cell may hold a sequence of pictures, one for each of `stops`: a slider goes through them, all cells together.
    `stops` are the words for the slider's positions, such as "step 400"; the last is shown first.
    `titles` name the rows and may be empty; "" in a cell's place leaves it blank. Sheets with neither titles nor stops
    stand beside each other where there is room.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Picture | tuple[Picture, ...] | Literal[""], ...], ...]
    titles: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    slider: str = ""
    """What the slider goes through, such as "training step"."""
    tile: int = 96
    """CSS pixels of a cell's width, at most."""


@dataclass(frozen=True)
class Text:
    """Plain sentences, or, with a `summary`, preformatted lines behind a line that opens them."""

    text: str
    summary: str = ""


Block = Picture | Table | Gallery | Sheet | Text


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor, in lower case with hyphens.
        title: its heading.
        reading: one sentence that says how to read it.
        blocks: what it shows.
        paper: the part of the paper that it follows, such as "section 4.5, figure 7 (left)"; may be empty.
    """

    name: str
    title: str
    reading: str
    blocks: tuple[Block, ...]
    paper: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: such as the name of the run.
        lead: a sentence or two under it.
        headline: the few figures that matter most: name -> value, shown large.
        sections: in the order in which they are read.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    headline: Mapping[str, str] = field(default_factory=dict)
