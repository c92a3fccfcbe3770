"""Sections about the objective: reconstructions over the run, and the targets as colours (section 4.6, B.1.2)."""

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mpp.data.transform import normalise
from mpp.errors import UserError
from mpp.objective.masking import Corruption
from mpp.objective.objective import MaskedPatchPrediction, gather_patches
from mpp.objective.reconstruction import Tiles, draw_tiles, picture_of_targets, read_sheet, reconstruct, to_rgb
from mpp.objective.target import MOST_CLASSES, ColourTarget, Target, build_target
from mpp.pretraining.restore import restored
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import corruption_at
from mpp.report.charts import bar_chart
from mpp.report.inspection import BATCH, ImageBatch, enlarged, two_sheets
from mpp.report.page import Gallery, Picture, Section, Sheet, Table
from mpp.training.checkpoint import Checkpoints

PAPER = "section 4.6 and appendix B.1.2"
_MOST_STOPS = 12  # of the slider: each adds to the size of the page
_BARS = 64  # classes of the histogram
_ROWS, _HEIGHT, _WIDTH, _GAP = 40, 8, 240, 2  # of the confusion picture: true colours, and pixels of a row
_STEP = re.compile(r"reconstruction_(\d+)\.png")


class ReconstructionStep(NamedTuple):
    """Reconstructions at one step of a run: updates done, and the versions of each image."""

    step: int
    tiles: Tiles


def drawn_steps(folder: Path) -> list[ReconstructionStep]:
    """The reconstructions that a run drew of itself, thinned out to a dozen with the first and the last."""
    paths = sorted((folder / "pictures").glob("reconstruction_*.png"))
    found = []
    for step, path in _thinned([(int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name))]):
        with contextlib.suppress(OSError):  # cut short, when a run was killed
            tiles = read_sheet(path)
            found += [] if tiles is None else [ReconstructionStep(step, tiles)]
    return [each for each in found if each.tiles.pixels.shape == found[-1].tiles.pixels.shape]


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that a run still has, thinned out to a dozen with the first and the last."""
    checkpoints = Checkpoints(folder / "checkpoints")
    return [checkpoints.path(step) for step in _thinned(checkpoints.steps())]


def reconstructed_steps(paths: Sequence[Path], images: ImageBatch, device: torch.device) -> list[ReconstructionStep]:
    """Reconstructions of these images by each checkpoint."""
    found = []
    images = images.to(device)
    for path in paths:
        config, model = restored(path)
        model.to(device).eval()
        corruption = corruption_at(config, model.encoder.grid, device, 0, len(images), len(images))
        pixels = normalise(images, config.data.mean, config.data.std)
        step = int("".join(filter(str.isdecimal, path.stem)) or 0)
        found.append(ReconstructionStep(step, draw_tiles(reconstruct(model, images, pixels, corruption))))
    return found


def _thinned(values: list) -> list:
    chosen = np.linspace(0, len(values) - 1, min(len(values), _MOST_STOPS)).round().astype(int) if values else ()
    return [values[i] for i in dict.fromkeys(chosen)]


def reconstruction_section(steps: list[ReconstructionStep], config: PretrainConfig) -> Section:
    """Versions of each image from the original to the confidence, with a slider over the steps, one or more."""
    last = steps[-1].tiles
    rows = []
    for i in range(len(last.pixels)):
        cells: list[Picture | tuple[Picture, ...]] = []
        for version, title in enumerate(last.titles):
            frames = {each.step: each.tiles.pixels[i, version] for each in steps}
            name, alt = f"reconstruction_{i}_{title.replace(' ', '_')}", f"Image {i + 1}: {title}"
            moving = [Picture(f"{name}_{step}", f"{alt} at step {step:,}.", frame) for step, frame in frames.items()]
            still = all(np.array_equal(frame, last.pixels[i, version]) for frame in frames.values())
            cells.append(Picture(name, f"{alt}.", last.pixels[i, version]) if still else tuple(moving))
        rows.append(tuple(cells))
    reading = (
        f"{config.objective.ratio:.0%} of an image's patches are corrupted (second column: grey ones are hidden behind "
        "the [mask] embedding, magenta frames mark those swapped for another patch, light blue ones those left as they "
        "are), and the model predicts each of them: compare the third column with the fourth; "
        + (
            "the last column is bluer the smaller the squared error (orange from 0.25 on) and dark where nothing was "
            "to be predicted."
            if last.titles[-1] == "squared error"
            else "then blue patches are right and orange ones wrong, and the yellower, the surer the model was."
        )
    )
    changing = any(isinstance(cell, tuple) for row in rows for cell in row)
    stops = tuple(f"step {each.step:,}" for each in steps) if changing else ()
    sheet = Sheet(last.titles, tuple(rows), (), stops, "training step", tile=144)
    return Section("reconstructions", "Reconstructions", reading, (sheet,), PAPER)


class ColourCounts:
    """Counts of true and predicted colours of all corrupted patches, batch by batch.

    Colours are the model's own classes where those are colours: mean_colour and colour_4x4 with all channels in one
    class. Else they are classes of the first three channels (of one, where there are fewer) of the predictions drawn as
    pixels: of a target of pixels the mean colour of the patch in 3 bits, of predictions by channel each cell in the
    target's bits, or as many as make 4096 classes. `classes` is their number, 2^(bits * channels).
    """

    def __init__(self, target: Target) -> None:
        self.channels = 3 if target.channels >= 3 else 1
        self.bits, cells = 3, 1
        if isinstance(target, ColourTarget):
            self.channels = target.channels if target.joint else self.channels
            self.bits, cells = target.bits, target.cells
        self.bits = min(self.bits, (MOST_CLASSES.bit_length() - 1) // self.channels)
        self._colours = ColourTarget(target.patch, self.channels, self.bits, cells)
        self.classes = self._colours.classes
        self._counts = Counter[int]()  # of true * classes + predicted

    @torch.inference_mode()
    def add(
        self,
        model: MaskedPatchPrediction,
        images: ImageBatch,
        pixels: Float[Tensor, "batch channels height width"],
        corruption: Corruption,
    ) -> None:
        """Counts a batch of predictions; `pixels` are the images, normalised."""
        guess = model.target.render(model.target.guess(model.predict(pixels, corruption)))
        predicted = self._colours.of(guess.flatten(0, 1)[:, : self.channels])[:, 0]
        true = gather_patches(self._colours.of(images[:, : self.channels]), corruption.picked)
        pairs, counts = (true.flatten() * self.classes + predicted.flatten()).unique(return_counts=True)
        self._counts.update(dict(zip(pairs.tolist(), counts.tolist(), strict=True)))

    @property
    def pairs(self) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
        """True class, predicted class, and how often they met, of those that did, ascending."""
        found = np.array(sorted(self._counts.items()), dtype=np.int64).reshape(-1, 2)
        return found[:, 0] // self.classes, found[:, 0] % self.classes, found[:, 1]

    @property
    def true(self) -> Int64[np.ndarray, " classes"]:
        """How often each colour was to be predicted."""
        true, _, counts = self.pairs
        return np.bincount(true, counts, self.classes).astype(np.int64)

    @property
    def right(self) -> Int64[np.ndarray, " classes"]:
        """How often each colour was predicted where it was true."""
        true, predicted, counts = self.pairs
        return np.bincount(true, counts * (true == predicted), self.classes).astype(np.int64)

    @property
    def colours(self) -> UInt8[np.ndarray, "classes 3"]:
        """Each class as a colour, the centres of its bins; of one or two channels as grey, of more the first three."""
        target = ColourTarget((1, 1), self.channels, self.bits)
        return to_rgb(target.render(torch.arange(self.classes)[None, :, None])[0])[:, 0, 0]


def target_section(config: PretrainConfig, model: MaskedPatchPrediction, images: Tensor, shown: int) -> Section:
    """The three targets of the paper, how often each colour occurs, and what is predicted for it."""
    device = next(model.parameters()).device
    counts, position = ColourCounts(model.target), 0
    for part in images.split(BATCH):
        part = part.to(device)
        corruption = corruption_at(config, model.encoder.grid, device, position, len(part), len(part))
        position += len(part)
        counts.add(model, part, normalise(part, config.data.mean, config.data.std), corruption)
    colours, true, right = counts.colours, counts.true, counts.right
    what = "cells of patches" if isinstance(model.target, ColourTarget) and model.target.cells > 1 else "patches"
    total = true.sum()
    _, guesses, met = counts.pairs
    # The most frequent first, of equal ones those that are predicted more often.
    ranked = np.lexsort((-np.bincount(guesses, met, counts.classes), -true))[: (true > 0).sum()]
    most = ranked[:_BARS]
    histogram = bar_chart(
        "target_histogram",
        f"{len(ranked)} of {len(colours)} colours occur among {total:,} corrupted {what}; the most frequent makes "
        f"{true[ranked[0]] / total:.1%}.",
        100 * true[most] / total,
        colours[most],
        x=f"the {len(most)} most frequent colours, in their own colour" if len(most) < len(ranked) else "colour",
        y=f"share of the {what} (%)",
        caption="Targets: how often each colour occurs.",
    )
    rows = tuple(
        ("#{:02x}{:02x}{:02x}".format(*colours[i]), f"{true[i] / total:.2%}", f"{right[i] / true[i]:.1%}")
        for i in ranked[:20]
    )
    table = Table(("colour", f"share of the {what}", "predicted right"), rows, "The most frequent colours", folded=True)
    reading = (
        f"Bars show how often each colour is to be predicted ({_counted(model.target, what)}); in the confusion "
        "picture each row is a true colour (the square at its left), and its bar is divided among the colours that the "
        "model predicts for it, in their own colours, so a good model's rows have the colour of their square."
    )
    drawn = Gallery((histogram, _confusion(counts, ranked[:_ROWS], f"of all {what} {right.sum() / total:.1%}")))
    sheets = _targets(config, model.encoder.patch, images[:shown])
    return Section("targets", "Targets and confusion", reading, (*sheets, drawn, table), PAPER)


def _counted(target: Target, what: str) -> str:
    """What a colour of the histogram is."""
    if not isinstance(target, ColourTarget):
        return "the mean colour of each corrupted patch in 3 bits, for this run predicts pixels"
    if not target.joint:
        return f"the first channels of the corrupted {what} together, which this run predicts one by one"
    return f"one of {target.classes}, for each of the corrupted {what}"


def _confusion(counts: ColourCounts, shown: np.ndarray, share_right: str) -> Picture:
    colours = np.pad(counts.colours, ((0, 0), (0, 1)), constant_values=255)
    picture = np.zeros((len(shown), _HEIGHT + _GAP, 2 * _HEIGHT + _WIDTH, 4), dtype=np.uint8)
    true, predicted, met = counts.pairs
    for row, colour in zip(picture[:, :_HEIGHT], shown, strict=True):
        row[:, :_HEIGHT] = colours[colour]
        own = np.flatnonzero(true == colour)
        own = own[np.argsort(-met[own], kind="stable")]  # the most frequent first
        edges = np.round(np.cumsum([0, *met[own]]) / met[own].sum() * _WIDTH).astype(int)
        row[:, 2 * _HEIGHT :] = colours[predicted[own]].repeat(np.diff(edges), axis=0)
    alt = f"Confusion of the {len(shown)} most frequent colours; {share_right} are predicted right."
    caption = (
        f"Confusion: the {len(shown)} most frequent true colours (squares), and what is predicted for them (bars)."
    )
    pixels = picture.reshape(-1, *picture.shape[2:])[:-_GAP]
    return Picture("confusion", alt, pixels, caption, pixelated=True, width=460)


def _targets(config: PretrainConfig, patch: tuple[int, int], images: Tensor) -> tuple[Sheet, ...]:
    """The three targets of the paper, drawn of the same images."""
    names = {"mean_colour": "mean colour", "colour_4x4": "4x4 colours", "pixels": "pixels"}
    drawn = {"image": to_rgb(images)}
    for name, title in names.items():
        with contextlib.suppress(UserError):  # patches that do not divide into 4 x 4 cells
            target = build_target(name, patch, images.shape[1], config.objective.bits)
            drawn[title] = to_rgb(picture_of_targets(target, images))
    own = names[config.objective.target]
    columns = tuple(f"{title} (this run's)" if title == own else title for title in drawn)
    rows = []
    for i in range(min(len(images), 4)):
        cells = [(f"target_{i}_{title.replace(' ', '_')}", title, enlarged(of[i])) for title, of in drawn.items()]
        rows.append(tuple(Picture(name, f"Image {i + 1}: {title}.", pixels) for name, title, pixels in cells))
    return two_sheets(columns, rows, 100)
