"""The page about a model: what its run folder tells, and what it shows of images (tools/visualize.py, ends of runs).

recipe -> run folder, weights, images -> sections -> report.html
"""

import contextlib
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mpp import dist
from mpp.data.loader import worker_count
from mpp.data.sources.base import count
from mpp.data.sources.opening import open_source
from mpp.data.transform import EvalTransform
from mpp.downstream.features import check_patches
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError, command
from mpp.pretraining.restore import first_weights, restored, weights_or_checkpoint
from mpp.pretraining.settings import PretrainConfig
from mpp.report.inspection.opening import Inspected, inspect, untrained
from mpp.report.page.document import pictures_of, write_page
from mpp.report.page.parts import Page, Section, Text
from mpp.report.run_page.reading import read_record
from mpp.report.run_page.sections import headline
from mpp.report.run_page.sections import sections as run_sections
from mpp.report.run_page.wording import UNTRAINED, beginning
from mpp.report.settings import VisualizeRecipe
from mpp.report.views.attention import distance_section, heads_section, rollout_section
from mpp.report.views.features import image_section, patch_section
from mpp.report.views.predictions import (
    checkpoints_of,
    drawn_moments,
    moments_of_checkpoints,
    reconstruction_section,
    target_section,
)
from mpp.report.views.seen import Images, Seen, draw_images
from mpp.report.views.weights import filter_section, position_section
from mpp.system.files import one_writer
from mpp.training.checkpoint import Checkpoints
from mpp.training.log import RunLog
from mpp.training.parallel import choose_device
from mpp.weights.base import Weights, is_vit

REPORT = "report.html"
_LAST = ("data", "how-it-was-made")  # sections of the run that come after the pictures


def tell_of_run(run_dir: str, device: str) -> None:
    """Writes report.html of a run that has ended, by rank 0, and shows its pictures in the run's loggers.

    What goes wrong is told, and does not fail the run.
    """
    if not dist.world_from_environment().main:
        return
    path = Path(run_dir) / REPORT
    try:
        with one_writer(path.parent, "the run folder"):
            page = build_page(VisualizeRecipe(init=run_dir, report=True, device=device))
            write_page(page, path)
            _show(page, path.parent)
    except Exception as error:  # the run has ended well, whatever becomes of its page
        reason = " ".join(str(error).split()) or type(error).__name__
        told = f"note: {path} could not be made or shown ({reason})"
        print(f"{told}; {command('visualize')} --init {shlex.quote(run_dir)} --report tries again", file=sys.stderr)
    else:
        print(f"page         {path}", flush=True)


def _show(page: Page, folder: Path) -> None:
    """The page's pictures of pixels in the loggers, under the last step; its charts are there as scalars."""
    config, step = read_record(folder).config, Checkpoints(folder / "checkpoints").steps()[-1]
    log = RunLog(folder, step, config.log.to, config)
    try:
        for name, pixels in pictures_of(page):
            if not isinstance(pixels, str):
                picture = Image.fromarray(pixels).convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                shown = Image.alpha_composite(white, picture).convert("RGB")
                log.show(f"report/{name.removesuffix('.png')}", step, np.asarray(shown))
    finally:
        log.close()


@dataclass(frozen=True)
class _Run:
    """A run folder, which checkpoint of it is meant, and its config; `one_of_many`: that checkpoint was named."""

    folder: Path
    checkpoint: Path | None
    config: PretrainConfig | FinetuneConfig
    one_of_many: bool


def run_of(spec: str) -> Path | None:
    """The run folder that `--init` names, itself or by one of its checkpoints; None for other weights."""
    path = Path(spec).expanduser()
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return folder if (folder / "config.yaml").is_file() else None


def build_page(recipe: VisualizeRecipe) -> Page:
    """The page that `recipe` asks for; writes nothing.

    Raises:
        UserError: weights, images or settings that cannot be used. Where a run's own images cannot be opened, or its
            model cannot be looked into, the page tells without pictures of the model, and why.
        RunError: images of which none can be decoded.
    """
    device = choose_device(recipe.device, dist.world_from_environment(), "device")
    for each in recipe.results:
        if not Path(each).expanduser().is_dir():
            raise UserError(f"--results {each}: there is no such folder")
    folder = run_of(recipe.init)
    run = _open_run(recipe.init, folder) if folder else None
    try:
        shown, lead = _look(recipe, run, device)
    except _Unseen as error:
        shown, lead = (), f"Without pictures of the model: {error}."
        print(f"note: {lead} With --data, other images are taken.", file=sys.stderr)
    if run is None:
        return Page(recipe.init, lead, shown)
    about = run_sections(run.folder, [Path(each).expanduser() for each in recipe.results])
    first = [section for section in about if section.name not in _LAST]
    last = [section for section in about if section.name in _LAST]
    title = run.folder.resolve().name
    if run.one_of_many and run.checkpoint:
        title = f"{title}, {run.checkpoint.stem}"
        lead = f"Pictures of the model at this checkpoint; figures and curves of the whole run. {lead}"
    return Page(title, lead, (*first, *shown, *last), headline(run.folder))


class _Unseen(UserError):
    """Why the model of a run cannot be looked at, where nobody asked for anything but the run itself."""


def _open_run(spec: str, folder: Path) -> _Run:
    """Raises UserError where it is no run of pretraining or fine-tuning, or has no such checkpoint."""
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"--init {spec}: there is no such checkpoint")
    alone = path != folder
    checkpoint = path if alone else Checkpoints(folder / "checkpoints").latest()
    return _Run(folder, checkpoint, read_record(folder).config, alone)


def _look(recipe: VisualizeRecipe, run: _Run | None, device: torch.device) -> tuple[tuple[Section, ...], str]:
    """All that is seen of the model, and a sentence about what it was looked at with."""
    seen = _see(recipe, run, device)
    weights, (rows, columns) = seen.model.weights, seen.model.encoder.grid
    parameters = sum(p.numel() for p in seen.model.encoder.parameters())
    size = " x ".join(map(str, seen.model.encoder.image_hw))
    what = f"{weights.name}, {parameters / 1e6:.1f} million parameters, {size} pixels, {rows} x {columns} patches"
    lead = f"{what}. Looked at with {count(len(seen.images.pixels), 'image')} of: {seen.images.of}."
    sections: list[Section] = []
    if run and run.checkpoint and isinstance(run.config, PretrainConfig):
        found = _of_objective(recipe, run, run.checkpoint, seen, device)
        sections += found
        lead += "" if found else " Predictions are not shown, for the run was for images of another size."
    sections += [make(seen) for make in (filter_section, position_section)]
    try:
        sections += [make(seen) for make in (distance_section, rollout_section, heads_section)]
    except UserError as error:  # the blocks of some of timm's ViTs have no attention weights to be had
        reading = "This model's blocks do not tell whom a patch attends to."
        sections.append(Section("attention", "Attention", reading, (Text(f"{error}."),)))
    sections += [make(seen) for make in (patch_section, image_section)]
    return tuple(sections), lead


def _see(recipe: VisualizeRecipe, run: _Run | None, device: torch.device) -> Seen:
    weights = weights_or_checkpoint(recipe.init)
    if run and not is_vit(weights.name):
        raise _Unseen(f"{weights.name} is no Vision Transformer")
    image_hw = (recipe.img_size[0], recipe.img_size[-1]) if recipe.img_size else None
    model = inspect(weights, device, image_hw, recipe.seed)
    if image_hw:
        check_patches(model.encoder.vit, image_hw, "img_size")
    start = _start(weights, run)
    twin = None if start is None else inspect(start, device, image_hw, recipe.seed)
    patch = recipe.patch or (model.encoder.grid[0] // 2, model.encoder.grid[1] // 2)
    if not all(0 <= place < size for place, size in zip(patch, model.encoder.grid, strict=True)):
        rows, columns = model.encoder.grid
        told = " ".join(map(str, patch))
        raise UserError(f"--patch {told}: there are {rows} rows and {columns} columns of patches, counted from 0")
    try:
        images = _images(recipe, run, recipe.data or (run.config.data.source if run else ""), model)
    except UserError as error:
        if recipe.data:
            raise
        raise _Unseen(str(error)) from error
    labelled = images
    if not (images.labels >= 0).any() and run and isinstance(run.config, PretrainConfig) and run.config.fewshot.data:
        with contextlib.suppress(UserError):  # a run that was copied may have left these behind
            labelled = _images(recipe, run, run.config.fewshot.data, model)
    names = {PretrainConfig: "pretrained", FinetuneConfig: "fine-tuned"}
    name = names[type(run.config)] if run else ("this model" if twin else UNTRAINED)
    shown, before = min(recipe.shown, len(images.pixels)), beginning(run.config) if run else UNTRAINED
    return Seen(name, model, twin, images, labelled, shown, (patch[0], patch[1]), before)


def _start(weights: Weights, run: _Run | None) -> Weights | None:
    """What stands beside the weights: of pretraining its very first ones, of others the architecture untrained."""
    if run and isinstance(run.config, PretrainConfig):
        with contextlib.suppress(UserError):  # a run that was copied may have left its init behind
            return first_weights(run.folder)
        return None
    return None if weights.state is None else untrained(weights)


def _images(recipe: VisualizeRecipe, run: _Run | None, source: str, model: Inspected) -> Images:
    download, keep = recipe.download, run.config.data.keep if run else False
    opened = open_source(source, download=download, keep=keep)
    number, workers = max(recipe.images, recipe.shown), worker_count(recipe.workers, 1)
    transform = EvalTransform(model.encoder.image_hw, model.weights.framing)
    most = max(recipe.max_image_mb, run.config.data.max_image_mb if run else 0)
    reading = replace(model.weights, max_image_mb=most).reading
    return draw_images(opened, number, transform, reading, recipe.seed, workers)


def _of_objective(
    recipe: VisualizeRecipe, run: _Run, checkpoint: Path, seen: Seen, device: torch.device
) -> list[Section]:
    """What the objective has to show; nothing where the images have another size than those of the run."""
    config, model = restored(checkpoint)
    if seen.model.encoder.image_hw != model.encoder.image_hw:
        return []
    model.to(device).eval()
    moments = [] if recipe.data or run.one_of_many else drawn_moments(run.folder)
    if not moments:
        paths = [checkpoint] if run.one_of_many else checkpoints_of(run.folder)
        moments = moments_of_checkpoints(paths, seen.drawn, device)
    section = target_section(config, model, seen.images.pixels, recipe.shown)
    return [reconstruction_section(moments, config), section]
