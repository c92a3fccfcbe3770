"""Sections about the objective: reconstructions over the run, and the targets as colours (section 4.6, B.1.2)."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mpp.data.transform import normalise
from mpp.errors import UserError
from mpp.model.encoder import Encoder
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.picture import picture_of_targets, reconstruct, to_rgb
from mpp.objective.sheet import Tiles, draw_tiles, read_sheet
from mpp.objective.target import ColourTarget, Target, build_target
from mpp.pretraining.restore import restored
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import corruption_at
from mpp.report.inspection.colours import ColourCounts, order
from mpp.report.page.charts import bar_chart
from mpp.report.page.parts import Gallery, Picture, Section, Sheet, Table
from mpp.report.views.drawing import visible
from mpp.report.views.seen import batches, in_two
from mpp.training.checkpoint import Checkpoints

PAPER = "section 4.6 and appendix B.1.2"
_MOST_STOPS = 12  # of the slider: each adds to the size of the page
_BARS = 64  # classes of the histogram
_ROWS, _HEIGHT, _WIDTH, _GAP = 40, 8, 240, 2  # of the confusion picture: true colours, and pixels of a row
_STEP = re.compile(r"reconstruction_(\d+)\.png")


class Moment(NamedTuple):
    """Reconstructions at one step of a run.

    Attributes:
        step: updates done.
        tiles: the versions of each image.
    """

    step: int
    tiles: Tiles


def drawn_moments(folder: Path) -> list[Moment]:
    """The reconstructions that a run drew of itself, thinned out to a dozen with the first and the last."""
    paths = sorted((folder / "pictures").glob("reconstruction_*.png"))
    steps = [(int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name))]
    kept = [steps[i] for i in _spread(len(steps))]
    moments = []
    for step, path in kept:
        with contextlib.suppress(OSError):  # cut short, when a run was killed
            tiles = read_sheet(path)
            moments += [] if tiles is None else [Moment(step, tiles)]
    return [moment for moment in moments if moment.tiles.pixels.shape == moments[-1].tiles.pixels.shape]


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that a run still has, thinned out to a dozen with the first and the last."""
    checkpoints = Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    return [checkpoints.path(steps[i]) for i in _spread(len(steps))]


def moments_of_checkpoints(
    paths: Sequence[Path], images: UInt8[Tensor, "b c h w"], device: torch.device
) -> list[Moment]:
    """Reconstructions of these images by each checkpoint."""
    found = []
    for path in paths:
        config, model = restored(path)
        step = int("".join(filter(str.isdecimal, path.stem)) or 0)
        found.append(Moment(step, _reconstructed(config, model.to(device).eval(), images.to(device))))
    return found


def _spread(number: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, number - 1, min(number, _MOST_STOPS))}) if number else []


def _reconstructed(config: PretrainConfig, model: MaskedPatchPrediction[Encoder], images: Tensor) -> Tiles:
    corruption = corruption_at(config, model.encoder.grid, images.device, 0, len(images), len(images))
    return draw_tiles(reconstruct(model, images, normalise(images, config.data.mean, config.data.std), corruption))


def reconstruction_section(moments: list[Moment], config: PretrainConfig) -> Section:
    """Original, corrupted input, prediction, truth, right or wrong and confidence, with a slider over steps.

    Raises:
        ValueError: no moment.
    """
    last = moments[-1].tiles
    rows = []
    for image in range(len(last.pixels)):
        cells: list[Picture | tuple[Picture, ...]] = []
        for version, title in enumerate(last.titles):
            frames = [moment.tiles.pixels[image, version] for moment in moments]
            name = f"reconstruction_{image}_{title.replace(' ', '_')}"
            if all(np.array_equal(frame, frames[-1]) for frame in frames):
                cells.append(Picture(name, f"Image {image + 1}: {title}.", frames[-1]))
                continue
            cells.append(
                tuple(
                    Picture(f"{name}_{moment.step}", f"Image {image + 1}: {title} at step {moment.step:,}.", frame)
                    for moment, frame in zip(moments, frames, strict=True)
                )
            )
        rows.append(tuple(cells))
    stops = tuple(f"step {moment.step:,}" for moment in moments)
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
    moving = any(isinstance(cell, tuple) for row in rows for cell in row)
    sheet = Sheet(last.titles, tuple(rows), (), stops if moving else (), "training step", tile=144)
    return Section("reconstructions", "Reconstructions", reading, (sheet,), PAPER)


def target_section(
    config: PretrainConfig, model: MaskedPatchPrediction[Encoder], images: Tensor, shown: int
) -> Section:
    """What is to be predicted: the three targets of the paper, how often each colour occurs, what it is taken for."""
    device = next(model.parameters()).device
    counts, position = ColourCounts(model.target), 0
    for part in batches(images):
        part = part.to(device)
        corruption = corruption_at(config, model.encoder.grid, device, position, len(part), len(part))
        position += len(part)
        counts.add(model, part, normalise(part, config.data.mean, config.data.std), corruption)
    colours, true = counts.colours, counts.true
    cells = isinstance(model.target, ColourTarget) and model.target.cells > 1
    what = "cells of patches" if cells else "patches"
    ranked = order(counts)
    ranked = ranked[true[ranked] > 0]
    total = true.sum()
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
        (
            "#{:02x}{:02x}{:02x}".format(*colours[i]),
            f"{true[i] / total:.2%}",
            f"{counts.accuracy[i]:.1%}",
        )
        for i in ranked[:20]
    )
    table = Table(("colour", f"share of the {what}", "predicted right"), rows, "The most frequent colours", folded=True)
    reading = (
        f"Bars show how often each colour is to be predicted ({_counted(model.target, what)}); in the confusion "
        "picture each row is a true colour (the square at its left), and its bar is divided among the colours that the "
        "model predicts for it, in their own colours, so a good model's rows have the colour of their square."
    )
    blocks = (
        *_targets(config, model.encoder.patch, images[:shown]),
        Gallery((histogram, _confusion(counts, ranked, what))),
        table,
    )
    return Section("targets", "Targets and confusion", reading, blocks, PAPER)


def _counted(target: Target, what: str) -> str:
    """What a colour of the histogram is."""
    if not isinstance(target, ColourTarget):
        return "the mean colour of each corrupted patch in 3 bits, for this run predicts pixels"
    if not target.joint:
        return f"the first channels of the corrupted {what} together, which this run predicts one by one"
    return f"one of {target.classes}, for each of the corrupted {what}"


def _confusion(counts: ColourCounts, ranked: np.ndarray, what: str) -> Picture:
    shown = ranked[:_ROWS]
    picture = np.zeros((len(shown) * (_HEIGHT + _GAP) - _GAP, 2 * _HEIGHT + _WIDTH, 4), dtype=np.uint8)
    for number, true in enumerate(shown):
        line = picture[number * (_HEIGHT + _GAP) :][:_HEIGHT]
        line[:, :_HEIGHT] = (*counts.colours[true], 255)
        predicted, found = counts.predicted_for(int(true))
        edges = np.round(np.concatenate([[0], np.cumsum(found)]) / found.sum() * _WIDTH).astype(int)
        for guess, begin, end in zip(predicted, edges[:-1], edges[1:], strict=True):
            line[:, 2 * _HEIGHT + begin : 2 * _HEIGHT + end] = (*counts.colours[guess], 255)
    right = counts.right.sum() / counts.true.sum()
    return Picture(
        "confusion",
        f"Confusion of the {len(shown)} most frequent colours; of all {what} {right:.1%} are predicted right.",
        picture,
        f"Confusion: the {len(shown)} most frequent true colours (squares), and what is predicted for them (bars).",
        pixelated=True,
        width=460,
    )


def _targets(config: PretrainConfig, patch: tuple[int, int], images: Tensor) -> tuple[Sheet, ...]:
    """The three targets of the paper, drawn of the same images."""
    names = {"mean_colour": "mean colour", "colour_4x4": "4x4 colours", "pixels": "pixels"}
    drawn = {"image": to_rgb(images)}
    for name, title in names.items():
        try:
            target = build_target(name, patch, images.shape[1], config.objective.bits)
        except UserError:  # patches that do not divide into 4 x 4 cells
            continue
        drawn[title] = to_rgb(picture_of_targets(target, images))
    own = names[config.objective.target]
    columns = tuple(f"{title} (this run's)" if title == own else title for title in drawn)
    rows = [
        tuple(
            Picture(f"target_{number}_{title.replace(' ', '_')}", f"Image {number + 1}: {title}.", visible(of[number]))
            for title, of in drawn.items()
        )
        for number in range(min(len(images), 4))
    ]
    return in_two(columns, rows, 100)
