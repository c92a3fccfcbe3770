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
from dataclasses import replace

import torch

from mpp import dist
from mpp.config import to_yaml
from mpp.data.loader import cores_for
from mpp.data.sources.base import warnings_of
from mpp.dist import World
from mpp.errors import RunError
from mpp.model.attention import use_kernel
from mpp.objective.objective import Survey
from mpp.pretraining.build import (
    FIRST,
    Run,
    build,
    read_decoded,
    settle_attention,
    survey_source,
    training_batches,
    training_step,
    weights_of,
)
from mpp.pretraining.monitor import Watch
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.summary import dry_run_report, summary
from mpp.system.files import drop_aside, set_aside
from mpp.training.checkpoint import Checkpoints
from mpp.training.loggers import check_installed
from mpp.training.loop import Every, NonFinite, fit
from mpp.training.optim import average_warning
from mpp.training.provenance import record_start
from mpp.training.run_folder import MODEL, Claim, claiming, explained, processes, resume, train
from mpp.training.saving import Saving
from mpp.training.sharded import whole
from mpp.training.waiting import data_notes
from mpp.weights.timm_folder import write_timm_folder


def run(config: PretrainConfig) -> int:
    """Pretrains, or resumes, as `config` says. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run that had to stop.
        TryLater: a run that goes on when what its images are read from answers again.
    """
    check_installed(config.log.to)  # before anything is written
    with processes(config) as (world, device), explained(config, device):
        if config.dry_run:
            return _dry_run(_build(config, world, device))
        with claiming(config, world) as claim:
            return _run(_build(config, world, device), claim)


def _build(config: PretrainConfig, world: World, device: torch.device) -> Run:
    parts = build(config, world, device)
    if world.main:
        print(to_yaml(parts.config), file=sys.stderr, end="")
        print(f"source: {parts.source.describe()}", file=sys.stderr)
        for warning in warnings_of(parts.source):
            print(f"WARNING: {warning}", file=sys.stderr)
        if average := average_warning(parts.config.optim.ema_decay, parts.schedule.total_steps):
            print(f"WARNING: {average}", file=sys.stderr)
    return parts


def _run(parts: Run, claim: Claim) -> int:
    config = parts.config  # with what the weights of an init say
    keep_every = parts.steps(config.checkpoint.keep_every, "checkpoint.keep_every")
    checkpoints = Checkpoints(parts.folder / "checkpoints", config.checkpoint.keep_last, keep_every)
    claim()
    resumed = resume(config, parts.state, parts.schedule, checkpoints, parts.world.main)
    settle_attention(parts)
    watch = Watch(parts, resumed)
    try:
        return _train(parts, checkpoints, watch, resumed)
    finally:
        watch.close()


def _train(parts: Run, checkpoints: Checkpoints, watch: Watch, resumed: int) -> int:
    config, total = parts.config, parts.schedule.total_steps
    if resumed >= total:
        watch.say(f"{parts.folder} is finished ({resumed} steps)")
        return _finish(parts, watch)
    read_decoded(parts, watch.say)
    if parts.world.main and (before := set_aside(parts.folder / MODEL)):  # it would pass for the model of this run
        watch.say(f"the model of the run's earlier end is {before}, until there is a new one")
    save = Saving(parts.schedule, checkpoints, watch, resumed or None)
    if resumed:
        _record(parts, resumed)
        watch.say(f"resumed from {checkpoints.latest()} at step {resumed} of {total}")
    else:
        survey = start(parts, watch)
        facts = {"targets": survey.describe(), "warning": survey.warning}
        if config.init:
            export(parts, FIRST)  # it may be gone when somebody wants to compare
            facts["init"] = f"{config.init} (SHA-256 of its weights {parts.init_hash})"
        _record(parts, 0, **facts)
        save(parts.state)
        save.wait()  # or the loader's processes, started meanwhile, would hold the file open
    every: list[Every] = [*watch.every(), (parts.steps(config.checkpoint.every, "checkpoint.every"), save)]
    batches, step = training_batches(parts, watch.bad_files.add), training_step(parts)
    try:
        status = train(parts.state, parts.wrapped, batches, step, parts.schedule, every, save, watch, [watch.advance])
    except NonFinite as error:
        raise RunError(diagnose(parts, error, checkpoints, watch)) from error
    return status or _finish(parts, watch)


def _finish(parts: Run, watch: Watch) -> int:
    export(parts)
    if parts.world.main:
        drop_aside(parts.folder / MODEL)
    watch.features()
    if parts.world.main:
        cores = cores_for(parts.world.local_size)
        notes = data_notes(parts.folder, parts.config.data, parts.workers, cores)
        watch.finish(summary(parts.folder, parts.model.target.score_name, notes, parts.config.init))
    return 0


def _record(parts: Run, step: int, **facts: str) -> None:
    source, config = parts.source, parts.config
    classes = len(source.classes) if source.classes is not None else None
    data = {"source": source.describe(), "images": len(source), "classes": classes}
    told = {
        "precision": parts.precision,
        "attention": parts.state.attention,
        "seed": config.train.seed,
        "data": data,
        **facts,
    }
    record_start(parts.folder, step, parts.device, told)


def start(parts: Run, watch: Watch) -> Survey:
    """What a fresh run does before its first update: looks at its targets and at itself as it begins."""
    survey = survey_source(parts)
    for model in (parts.model, parts.exported):
        model.frequent.copy_(survey.frequent)
    watch.say(survey.describe())
    if survey.warning:
        watch.say(f"WARNING: {survey.warning}")
    watch.initial()
    return survey


def diagnose(parts: Run, error: NonFinite, checkpoints: Checkpoints, watch: Watch) -> str:
    """Reads the offending batch again, tries it in fp32, writes that down, and says what to try."""
    loss = _loss_in_fp32(parts, error.step)
    advice = "try a lower --optim.lr, a longer --schedule.warmup or --optim.clip_norm 1"
    if loss is not None and parts.precision != "fp32" and math.isfinite(loss):
        advice = f"in fp32 the same batch gives {loss:.4f}: try --train.precision fp32 (or bf16, if this was fp16)"
    elif loss is not None:
        advice = f"fp32 is no better: {advice}"
    tried = {} if loss is None else {"fp32_loss": str(loss)}
    watch.event({"event": "non_finite", "precision": parts.precision, **tried}, error.step)
    return f"{error}; {advice} (with --resume force); the last good checkpoint is {checkpoints.latest()}"


def _loss_in_fp32(parts: Run, number: int) -> float | None:
    """The loss of the batch of update `number` over all ranks; None where it cannot be read again."""
    step, losses, unread = training_step(parts, "fp32"), [], False
    batches = training_batches(parts, start=(number - 1) * parts.schedule.batch_size)
    with contextlib.closing(batches), whole(parts.model) as model, torch.no_grad():
        use_kernel(model, "sdpa")  # not every kernel takes fp32
        for _ in range(parts.schedule.accumulate):
            try:
                batch = next(batches)
            except Exception:  # of many kinds; what ended the run is what there is to tell
                unread = True
                break
            losses.append(step(model, batch)[0].double())
    if dist.any_rank(unread):
        return None
    return float(dist.sum_over_ranks(torch.stack(losses).mean()) / parts.world.size)


def export(parts: Run, name: str = MODEL) -> None:
    """Writes run_dir/model, or the folder of that name: the averaged encoder if there is an average, else the other."""
    with whole(parts.exported) as model:
        if parts.world.main:
            folder = parts.folder / name
            write_timm_folder(weights_of(parts.config, model.encoder, str(folder)), folder)
    dist.barrier()


def _dry_run(parts: Run) -> int:
    settle_attention(parts)
    watch = Watch(parts, 0, dry=True)
    read_decoded(parts, watch.say)
    start(parts, watch)
    two = replace(parts.schedule, total_steps=2)
    batches = training_batches(parts)
    seconds: list[float] = []
    try:
        step, stopwatch = training_step(parts), watch.stopwatch(seconds)
        fit(parts.state, parts.wrapped, batches, step, two, each_step=[stopwatch])
    finally:
        batches.close()
    watch.close()
    if parts.world.main:
        print(dry_run_report(parts, seconds, watch))
    return 0
