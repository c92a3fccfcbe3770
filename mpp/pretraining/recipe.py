"""The pretraining recipe: from a folder of unlabelled images to a checkpoint that timm loads.

open_source -> stream          augmented uint8 batches; which images and how, by (seed, epoch, index)
draw_corruption                for the whole global batch at once, by (seed, images seen)
MaskedPatchPrediction          loss and figures (mpp/objective/objective.py tells how)
fit                            updates, with rows, pictures, few-shot accuracy and checkpoints every so often
write_timm_folder              run_dir/model, for timm.create_model("local-dir:...")
"""

import contextlib
import math
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from mpp import dist
from mpp.dist import World
from mpp.downstream.verdict import FILE as VERDICT
from mpp.errors import RunError
from mpp.model.attention import use_kernel
from mpp.objective.objective import Survey
from mpp.pretraining.build import FIRST, PretrainingRun, build, weights_of
from mpp.pretraining.monitor import Monitor
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import training_step
from mpp.pretraining.summary import dry_run_report, summary, verdict_of
from mpp.pretraining.survey import survey_source, survey_whole_images, surveyed_images
from mpp.system.files import drop_aside
from mpp.training.checkpoint import Checkpoints
from mpp.training.earlier_run import MODEL
from mpp.training.loggers import check_installed
from mpp.training.loop import Every, NonFinite, State, fit
from mpp.training.micro_batch import try_micro_batch
from mpp.training.overview import overview
from mpp.training.provenance import read_starts
from mpp.training.rows import FILE as ROWS
from mpp.training.rows import read_rows
from mpp.training.run_folder import claiming, explained, processes, resume, train
from mpp.training.saving import Saving
from mpp.training.sharded import whole
from mpp.training.timing import synchronise
from mpp.weights.timm_folder import write_timm_folder


def run(config: PretrainConfig) -> int:
    """Pretrains, or resumes, as `config` says. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run that had to stop.
        TryLater: the images could not be read; the same command goes on once they can.
    """
    check_installed(config.log.to)  # before anything is written
    with processes(config) as (world, device), explained(config, device):
        if config.dry_run:
            return _dry_run(_build(config, world, device))
        with claiming(config, world) as claim:
            built = _build(config, world, device)
            checkpoints = built.checkpoints()
            claim()
            resumed = resume(built.config, built.state, built.schedule, checkpoints, world.main)
            built.settle_attention()
            with contextlib.closing(Monitor(built)) as monitor:
                return _train(built, checkpoints, monitor, resumed)


def _build(config: PretrainConfig, world: World, device: torch.device) -> PretrainingRun:
    """Builds the run and prints what it is."""
    run = build(config, world, device)
    encoder = run.model.encoder
    try_micro_batch(run, training_step(run), encoder.image_hw, encoder.in_chans)
    if world.main:
        model, (rows, columns) = run.config.model, encoder.grid
        name, images = f"{model.name}, {rows} x {columns} patches", ("images", run.source.describe())
        print(overview(run, name, encoder.image_hw, images), file=sys.stderr)
        for warning in (*run.source.warnings, *run.doubts()):
            print(f"WARNING: {warning}", file=sys.stderr)
    return run


def _train(run: PretrainingRun, checkpoints: Checkpoints, monitor: Monitor, resumed: int) -> int:
    total = run.schedule.total_steps
    if resumed >= total:
        monitor.say(f"{run.folder} is finished ({resumed} steps)")
        return _finish(run, monitor)
    run.train_source = run.decoded(run.source, monitor.say)
    monitor.set_model_aside()
    if run.world.main:
        (run.folder / VERDICT).unlink(missing_ok=True)  # of an earlier end, like the model
    save = Saving(run.schedule, checkpoints, monitor.log.flush, resumed or None)
    classes = len(run.source.classes) if run.source.classes is not None else None
    data = {"source": run.source.describe(), "images": len(run.source), "classes": classes}
    if resumed:
        run.record(resumed, data)
        monitor.say(f"resumed from {checkpoints.latest()} at step {resumed} of {total}")
        survey_whole_images(run)
    else:
        survey, _ = start(run, monitor)
        facts: dict[str, Any] = {"targets": survey.describe(), "warning": survey.warning, "doubts": run.doubts()}
        if run.config.init:
            export(run, FIRST)  # the original may be gone when somebody wants to compare
            if run.init_hash:  # else it had begun before, and its checkpoint has them
                facts["init"] = f"{run.config.init} (SHA-256 of its weights {run.init_hash})"
        run.record(0, data, **facts)
        save(run.state)
        save.wait()  # or the loader's processes, started meanwhile, would keep the file open
    every: list[Every] = [*monitor.every(), (run.steps("checkpoint.every"), save)]
    batches, step = run.batches(monitor.bad_files.add), training_step(run)
    try:
        status = train(run.state, run.wrapped, batches, step, run.schedule, every, save, monitor.say, [monitor.advance])
    except NonFinite as error:
        raise RunError(diagnose(run, error, checkpoints, monitor)) from error
    return status or _finish(run, monitor)


def _finish(run: PretrainingRun, monitor: Monitor) -> int:
    export(run)
    if run.world.main:
        drop_aside(run.folder / MODEL)
    monitor.project_features()
    if run.world.main:
        monitor.terminal.close()
        score, notes, rows = run.model.target.score_name, run.data_notes(), read_rows(run.folder / ROWS)
        if not any(score in row for row in rows):
            print(f"note: {run.folder / ROWS} has no figures any more, so that nothing can be said of them")
            return 0
        verdict = verdict_of(rows, read_starts(run.folder), score, run.config.init)
        verdict.write(run.folder, [*run.doubts(), *notes])
        print(summary(run.folder, score, verdict, notes, run.config.init, run.doubts()))
    return 0


def start(run: PretrainingRun, monitor: Monitor, dry: bool = False) -> tuple[Survey, float]:
    """Surveys the targets of a new run and its whole images, which takes so many seconds; shows its untrained model."""
    images = surveyed_images(run)
    survey, seconds = survey_source(run, images), survey_whole_images(run, images, dry)
    monitor.say(survey.describe())
    if survey.warning:
        monitor.say(f"WARNING: {survey.warning}")
    monitor.initial()
    return survey, seconds


def export(run: PretrainingRun, name: str = MODEL) -> None:
    """Writes the encoder that is exported to run_dir/model, or the folder of that name; on all ranks together."""
    with whole(run.exported) as model:
        if run.world.main:
            folder = run.folder / name
            write_timm_folder(weights_of(run.config, model.encoder, str(folder)), folder)
    dist.barrier()


def diagnose(run: PretrainingRun, error: NonFinite, checkpoints: Checkpoints, monitor: Monitor) -> str:
    """Tries the batch of a loss that is not finite again in fp32, logs the result, and says what to try."""
    loss = _loss_in_fp32(run, error.step)
    advice = "try a lower --optim.lr, a longer --schedule.warmup or --optim.clip_norm 1"
    if loss is not None and run.precision != "fp32" and math.isfinite(loss):
        advice = f"in fp32 the same batch gives {loss:.4f}: try --train.precision fp32 (or bf16, if this was fp16)"
    elif loss is not None:
        advice = f"fp32 is no better: {advice}"
    tried = {} if loss is None else {"fp32_loss": str(loss)}
    event = {"event": "non_finite", "precision": run.precision, **tried}
    monitor.log.row(error.step, run.state.images_seen, event)
    return f"{error}; {advice} (with --resume force); the last good checkpoint is {checkpoints.latest()}"


def _loss_in_fp32(run: PretrainingRun, number: int) -> float | None:
    """The loss of the batch of update `number` over all ranks; None where it cannot be read again."""
    step, losses, unread = training_step(run, "fp32"), [], False
    batches = run.batches(start=(number - 1) * run.schedule.batch_size)
    with contextlib.closing(batches), whole(run.model) as model, torch.no_grad():
        use_kernel(model, "sdpa")  # not every kernel takes fp32
        for _ in range(run.schedule.accumulate):
            try:
                batch = next(batches)
            except Exception:  # of many kinds; the user hears of the loss, which ended the run
                unread = True
                break
            losses.append(step(model, batch)[0].double())
    if dist.any_rank(unread):
        return None
    return float(dist.sum_over_ranks(torch.stack(losses).mean()) / run.world.size)


def _dry_run(run: PretrainingRun) -> int:
    """Makes two steps and one evaluation, and prints what the whole run would cost."""
    run.settle_attention()
    with contextlib.closing(Monitor(run, dry=True)) as monitor:
        run.train_source = run.decoded(run.source, monitor.say, make=False)
        _, before = start(run, monitor, dry=True)
        ends: list[float] = []

        def note_end(state: State) -> None:
            synchronise(run.device)
            ends.append(time.perf_counter())

        with contextlib.closing(run.batches()) as batches:
            two = replace(run.schedule, total_steps=2)
            fit(run.state, run.wrapped, batches, training_step(run), two, each_step=[note_end])
    if run.world.main:
        print(dry_run_report(run, ends[1] - ends[0], before, monitor))
    return 0
