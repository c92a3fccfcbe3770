"""What is looked at: a model, the same one untrained, and images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mpp.data.loader import sequential
from mpp.data.settings import Reading
from mpp.data.sources.base import Source
from mpp.data.transform import EvalTransform
from mpp.downstream.features import EVALUATION_BATCH
from mpp.errors import RunError
from mpp.report.inspection.opening import Inspected
from mpp.report.page.parts import Picture, Sheet
from mpp.report.run_page.wording import UNTRAINED

_BATCH = 32


class Images(NamedTuple):
    """Images of a source, as a model takes them in.

    Attributes:
        pixels: (M, C, H, W) uint8.
        labels: (M,) int64, -1 where there is none.
        classes: names by label; None: unlabelled.
        of: one line about the source.
    """

    pixels: UInt8[Tensor, "m channels height width"]
    labels: Int64[np.ndarray, " m"]
    classes: tuple[str, ...] | None
    of: str


def draw_images(
    source: Source, number: int, transform: EvalTransform, reading: Reading, seed: int, workers: int
) -> Images:
    """So many images of the source, drawn by the seed, all of them where there are fewer; bad ones are left out.

    Raises:
        RunError: where that leaves none.
    """
    indices = np.random.default_rng(seed).choice(len(source), min(number, len(source)), replace=False)
    batches = sequential(source, transform, reading, indices, batch_size=EVALUATION_BATCH, workers=workers)
    held = [(batch["images"], batch["label"]) for batch in batches if len(batch["images"])]
    if not held:
        raise RunError(f"none of {len(indices)} images of {source.name} could be decoded")
    labels = torch.cat([label for _, label in held]).numpy()
    return Images(torch.cat([images for images, _ in held]), labels, source.classes, source.describe())


@dataclass(frozen=True, eq=False)
class Seen:
    """A model and what it is looked at with.

    Attributes:
        name: what the pictures call it, such as "pretrained".
        model: itself.
        twin: the same architecture untrained, or what a run went on from; None: the model itself is
            untrained, or what it went on from is gone.
        images: to look with.
        labelled: for what needs labels; the same images where those have labels.
        shown: number of images that are drawn.
        patch: row and column of the patch whose attention is drawn.
    """

    name: str
    model: Inspected
    twin: Inspected | None
    images: Images
    labelled: Images
    shown: int
    patch: tuple[int, int]
    beginning: str = UNTRAINED
    """What the pictures call the twin."""

    @property
    def sides(self) -> list[tuple[str, Inspected]]:
        """The model, and its twin if it has one, by name."""
        both = [(self.name, self.model)]
        return both if self.twin is None else [*both, (self.beginning, self.twin)]

    @property
    def drawn(self) -> UInt8[Tensor, "shown channels height width"]:
        """The images that are drawn."""
        return self.images.pixels[: self.shown]

    @cached_property
    def features(self) -> list[tuple[str, Float[np.ndarray, "m dim"]]]:
        """Pooled features of the labelled images, by side."""
        parts = list(batches(self.labelled.pixels))
        return [(name, torch.cat([side.features(part).cpu() for part in parts]).numpy()) for name, side in self.sides]


def batches(images: Tensor) -> Iterator[Tensor]:
    """The images a few at a time."""
    yield from images.split(_BATCH)


def by_side(
    prefix: str,
    images: Sequence[np.ndarray],
    sides: Sequence[tuple[str, Sequence[np.ndarray]]],
    told: str,
    pixelated: bool = False,
) -> tuple[Sheet, ...]:
    """Each image in a row with what each side makes of it, as sheets.

    Args:
        prefix: of the pictures' names.
        images: (H, W, 3) uint8.
        sides: name, and a picture for each image.
        told: what such a picture shows, with {} for the name of its side; it follows "Image 3".
        pixelated: see `Picture`; the images themselves are not.
    """
    rows = []
    for number, image in enumerate(images):
        cells = [Picture(f"{prefix}_{number}", f"Image {number + 1}.", image)]
        for side, (name, drawn) in enumerate(sides):
            alt = f"Image {number + 1}{told.format(name)}."
            cells.append(Picture(f"{prefix}_{number}_{side}", alt, drawn[number], pixelated=pixelated))
        rows.append(tuple(cells))
    return in_two(("image", *(name for name, _ in sides)), rows, 136)


def in_two(columns: tuple[str, ...], rows: Sequence[tuple[Picture, ...]], tile: int) -> tuple[Sheet, ...]:
    """The rows as two sheets that stand beside each other where there is room; as one where they are few."""
    half = -(-len(rows) // 2) if len(rows) > 3 else len(rows)
    return tuple(Sheet(columns, tuple(part), tile=tile) for part in (rows[:half], rows[half:]) if part)
