"""The page about a model (report.html), for the visualize tool and the end of each run; or about several runs.

recipe -> run folder, weights, images -> sections -> page
"""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mpp import dist
from mpp.data.sources.base import count
from mpp.data.sources.opening import open_source
from mpp.data.transform import EvalTransform
from mpp.data.workers import worker_count
from mpp.errors import RunError, UserError, command
from mpp.model.encoder import check_patches, is_vit
from mpp.pretraining.restore import first_weights, restored, weights_or_checkpoint
from mpp.pretraining.settings import PretrainConfig
from mpp.report.attention import distance_section, heads_section, rollout_section
from mpp.report.comparison import comparison
from mpp.report.curves import curves_section
from mpp.report.downstream import downstream_section
from mpp.report.features import image_section, patch_section
from mpp.report.filters import filter_section, position_section
from mpp.report.html import pictures_of, write_page, write_pictures
from mpp.report.inspection import Images, Inspected, InspectionContext, draw_images, inspect
from mpp.report.page import Page, Section, Text
from mpp.report.predictions import (
    checkpoints_of,
    drawn_steps,
    reconstructed_steps,
    reconstruction_section,
    target_section,
)
from mpp.report.provenance import data_section, making_section
from mpp.report.results import fewshot_section, finetune_section, headline, start_name, verdict
from mpp.report.run_record import RunRecord, read_run
from mpp.report.settings import VisualizeRecipe
from mpp.report.wording import UNTRAINED
from mpp.system.files import make_folder, one_writer, unmade_if_refused
from mpp.training.checkpoint import Checkpoints
from mpp.training.log import RunLog
from mpp.training.parallel import choose_device
from mpp.weights.base import Weights

REPORT = "report.html"
FIGURES = "figures"


def visualize(recipe: VisualizeRecipe) -> int:
    """Writes report.html, and the single pictures unless the report alone is asked for. Returns 0.

    Raises:
        UserError: bad input, before any file is written.
        RunError: no image can be decoded.
    """
    run = None if recipe.runs else _run_folder(recipe.init)
    if not recipe.out and run != Path(recipe.init).expanduser():
        raise UserError(f"nowhere to write to: --init {recipe.init} is no run folder; give --out, such as --out look")
    if not recipe.runs and not recipe.data and run is None:
        raise UserError(f"no images: --init {recipe.init} is no run; give --data, such as --data folder:/my/images")
    folder = Path(recipe.out or recipe.init).expanduser()
    with unmade_if_refused(folder):
        make_folder(folder, (REPORT,))
        page = comparison([Path(run).expanduser() for run in recipe.runs]) if recipe.runs else build_page(recipe)
    try:
        write_page(page, folder / REPORT)
        print(f"page         {folder / REPORT}")
        if not recipe.report:
            paths = write_pictures(page, folder / FIGURES)
            print(f"pictures     {folder / FIGURES}, {len(paths)} of them")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; make room or give another --out") from error
    return 0


def write_report(run_dir: str, device: str) -> None:
    """Writes report.html of a run that has ended, by rank 0, and shows its pictures in the run's loggers.

    An error is printed as a note and does not fail the run.
    """
    if not dist.world_from_environment().main:
        return
    path = Path(run_dir) / REPORT
    try:
        with one_writer(path.parent, "the run folder"):
            run = read_run(path.parent)
            page = build_page(VisualizeRecipe(init=run_dir, report=True, device=device), run)
            write_page(page, path)
            _log_pictures(page, run)
    except Exception as error:  # the run has ended well, whatever becomes of its page
        reason = " ".join(str(error).split()) or type(error).__name__
        retry = f"{command('visualize')} --init {shlex.quote(run_dir)} --report tries again"
        print(f"note: {path} could not be made or shown ({reason}); {retry}", file=sys.stderr)
    else:
        print(f"page         {path}", flush=True)


def _log_pictures(page: Page, run: RunRecord) -> None:
    """Sends the page's pictures of pixels to the loggers, under the last step; its charts are there as scalars."""
    step = Checkpoints(run.folder / "checkpoints").steps()[-1]
    log = RunLog(run.folder, step, run.config.log.to, run.config)
    with contextlib.closing(log):
        for name, pixels in pictures_of(page):
            if not isinstance(pixels, str):
                picture = Image.fromarray(pixels).convert("RGBA")
                flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
                log.show(f"report/{name.removesuffix('.png')}", step, np.asarray(flat))


def _run_folder(init: str) -> Path | None:
    """The run folder that `init` names, itself or by one of its checkpoints; None for other weights."""
    path = Path(init).expanduser()
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return folder if (folder / "config.yaml").is_file() else None


def build_page(recipe: VisualizeRecipe, run: RunRecord | None = None) -> Page:
    """Builds the page that `recipe` asks for; writes nothing. `run` is the one that it names, if already read.

    Where a run's own images cannot be opened, or its model cannot be inspected, the page has no pictures of the model,
    and says why.

    Raises:
        UserError: weights, images or settings that cannot be used.
        RunError: no image can be decoded.
    """
    device = choose_device(recipe.device, dist.world_from_environment(), "device")
    results = [Path(each).expanduser() for each in recipe.results]
    for path in results:
        if not path.is_dir():
            raise UserError(f"--results {path}: there is no such folder")
    folder = _run_folder(recipe.init)
    if folder is None:
        shown, lead = _model_sections(recipe, None, None, device)
        return Page(recipe.init, lead, shown)
    path = Path(recipe.init).expanduser()
    if not path.exists():
        raise UserError(f"--init {recipe.init}: there is no such checkpoint")
    run = run or read_run(folder)
    checkpoint = Checkpoints(folder / "checkpoints").latest() if path == folder else path
    try:
        shown, lead = _model_sections(recipe, run, checkpoint, device)
    except _NotInspectable as error:
        shown, lead = (), f"Without pictures of the model: {error}."
        print(f"note: {lead} With --data, other images are taken.", file=sys.stderr)
    title = folder.resolve().name
    if path != folder:
        title = f"{title}, {path.stem}"
        lead = f"Pictures of the model at this checkpoint; figures and curves of the whole run. {lead}"
    first, last = run_sections(run, results)
    return Page(title, lead, (*first, *shown, *last), headline(run), verdict(run))


def run_sections(run: RunRecord, results: Sequence[Path] = ()) -> tuple[list[Section], list[Section]]:
    """The sections from the run folder alone that come before and after those about the model.

    `results` are more folders of fine-tuning runs, few-shot tables and studies than those beside the run.
    """
    downstream = downstream_section(run.folder, results) if run.pretraining else None
    first = [finetune_section(run), curves_section(run), fewshot_section(run), downstream]
    return [section for section in first if section], [data_section(run), making_section(run)]


class _NotInspectable(UserError):
    """Why the model of a run cannot be inspected, where nobody asked for anything but the run itself."""


def _model_sections(
    recipe: VisualizeRecipe, run: RunRecord | None, checkpoint: Path | None, device: torch.device
) -> tuple[tuple[Section, ...], str]:
    """All sections about the model, and a sentence about it and the images."""
    context = _open_context(recipe, run, device)
    encoder = context.model.encoder
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    size, grid = (" x ".join(map(str, pair)) for pair in (encoder.image_hw, encoder.grid))
    lead = (
        f"{context.model.weights.name}, {parameters:.1f} million parameters, {size} pixels, {grid} patches. "
        f"Looked at with {count(len(context.images.pixels), 'image')} of: {context.images.source}."
    )
    sections: list[Section] = []
    if run and checkpoint and isinstance(run.config, PretrainConfig):
        sections += _prediction_sections(recipe, run, checkpoint, context, device)
        lead += "" if sections else " Predictions are not shown, for the run was for images of another size."
    sections += [filter_section(context), position_section(context)]
    try:
        sections += [distance_section(context), rollout_section(context), heads_section(context)]
    except UserError as error:  # the attention weights of some of timm's ViTs are not available
        reading = "This model's blocks do not tell whom a patch attends to."
        sections.append(Section("attention", "Attention", reading, (Text(f"{error}."),)))
    return (*sections, patch_section(context), image_section(context)), lead


def _open_context(recipe: VisualizeRecipe, run: RunRecord | None, device: torch.device) -> InspectionContext:
    weights = weights_or_checkpoint(recipe.init)
    if run and not is_vit(weights.name):
        raise _NotInspectable(f"{weights.name} is no Vision Transformer")
    image_hw = (recipe.img_size[0], recipe.img_size[-1]) if recipe.img_size else None
    model = inspect(weights, device, image_hw, recipe.seed)
    if image_hw:
        check_patches(model.encoder.vit, image_hw, "img_size")
    first = _first_weights(weights, run)
    twin = None if first is None else inspect(first, device, image_hw, recipe.seed)
    rows, columns = model.encoder.grid
    row, column = recipe.patch or (rows // 2, columns // 2)
    if row >= rows or column >= columns:
        raise UserError(
            f"--patch {row} {column}: there are {rows} rows and {columns} columns of patches, counted from 0"
        )
    try:
        images = _open_images(recipe, run, recipe.data or (run.config.data.source if run else ""), model)
    except UserError as error:
        if recipe.data:
            raise
        raise _NotInspectable(str(error)) from error
    labelled = images
    pretraining = run.config if run and isinstance(run.config, PretrainConfig) else None
    if pretraining and pretraining.fewshot.data and not (images.labels >= 0).any():
        with contextlib.suppress(UserError):  # a run that was copied may have left these behind
            labelled = _open_images(recipe, run, pretraining.fewshot.data, model)
    if run:
        name, twin_name = "pretrained" if pretraining else "fine-tuned", start_name(run.config)
    else:
        name, twin_name = "this model" if twin else UNTRAINED, UNTRAINED
    shown = min(recipe.shown, len(images.pixels))
    return InspectionContext(name, model, twin, images, labelled, shown, (row, column), twin_name)


def _first_weights(weights: Weights, run: RunRecord | None) -> Weights | None:
    """Weights of the twin: of a pretraining its very first ones, of others the architecture untrained."""
    if not (run and run.pretraining):
        return None if weights.state is None else weights.untrained()
    try:
        return first_weights(run.folder)
    except UserError:  # a run that was copied may have left its init behind
        return None


def _open_images(recipe: VisualizeRecipe, run: RunRecord | None, source: str, model: Inspected) -> Images:
    opened = open_source(source, download=recipe.download, keep=run.config.data.keep if run else False)
    transform = EvalTransform(model.encoder.image_hw, model.weights.framing)
    most = max(recipe.max_image_mb, run.config.data.max_image_mb if run else 0)
    reading = replace(model.weights, max_image_mb=most).reading
    number, workers = max(recipe.images, recipe.shown), worker_count(recipe.workers, 1)
    return draw_images(opened, number, transform, reading, recipe.seed, workers)


def _prediction_sections(
    recipe: VisualizeRecipe, run: RunRecord, checkpoint: Path, context: InspectionContext, device: torch.device
) -> list[Section]:
    """The sections about the objective; none where the images have another size than those of the run."""
    config, model = restored(checkpoint)
    if context.model.encoder.image_hw != model.encoder.image_hw:
        return []
    model.to(device).eval()
    single = Path(recipe.init).expanduser() != run.folder  # one checkpoint of many was named
    steps = [] if recipe.data or single else drawn_steps(run.folder)
    if not steps:
        paths = [checkpoint] if single else checkpoints_of(run.folder)
        steps = reconstructed_steps(paths, context.drawn, device)
    section = target_section(config, model, context.images.pixels, recipe.shown)
    return [reconstruction_section(steps, config), section]
