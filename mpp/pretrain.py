"""The pretraining recipe: from a folder of unlabelled images to a checkpoint that timm loads.

open_source -> stream          augmented uint8 batches; which images and how, by (seed, epoch, index)
draw_corruption                for the whole global batch at once, by (seed, images seen)
MaskedPatchPrediction          loss and figures (mpp/objective/objective.py tells how)
fit                            updates, with rows, pictures, few-shot accuracy and checkpoints every so often
save_timm_folder               run_dir/model, for timm.create_model("local-dir:...")
"""

import errno
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mpp import dist
from mpp.config import differences, from_file, to_dict, to_yaml
from mpp.dist import World
from mpp.errors import RunError, UserError
from mpp.model.weights import save_timm_folder
from mpp.parts import Run, build, survey_source, training_batches, training_step
from mpp.recipes import PretrainConfig
from mpp.report import dry_run_report, summary
from mpp.train.checkpoint import Checkpoints, load_checkpoint
from mpp.train.loop import EXIT_REQUEUE, Every, Interrupted, NonFinite, State, StopSignal, fit
from mpp.train.parallel import choose_device
from mpp.watch import Watch


def run(config: PretrainConfig) -> int:
    """Pretrains, or resumes, as `config` says. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run that had to stop.
    """
    world = dist.world_from_environment()
    device = choose_device(config.train.device, world)
    dist.start(world, device)
    try:
        return _run(config, world, device)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory on {device}: halve --train.micro-batch (now {config.train.micro_batch}), which leaves the "
            "result as it is, or set --model.grad-checkpointing; then run the same command again"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        latest = Checkpoints(Path(config.run_dir) / "checkpoints").latest()
        raise RunError(
            f"cannot write to {config.run_dir}: {error.strerror}; the last good checkpoint is {latest}; make room and "
            "run the same command again"
        ) from error
    finally:
        dist.stop()


def _run(config: PretrainConfig, world: World, device: torch.device) -> int:
    parts = build(config, world, device)
    if world.main:
        print(to_yaml(config), file=sys.stderr, end="")
        print(f"source: {parts.source.describe()}", file=sys.stderr)
    if config.dry_run:
        return _dry_run(parts)
    checkpoints = Checkpoints(
        parts.folder / "checkpoints",
        config.checkpoint.keep_last,
        parts.steps(config.checkpoint.keep_every, "checkpoint.keep_every"),
    )
    resumed = _resume(parts, checkpoints)
    watch = Watch(parts, resumed)
    try:
        return _train(parts, checkpoints, watch, resumed)
    finally:
        watch.close()


def _resume(parts: Run, checkpoints: Checkpoints) -> int:
    """Loads the newest checkpoint of the run, if any, and returns its step; saves the config.

    Raises:
        UserError: a run folder of another config, or a checkpoint that does not fit.
    """
    config, path = parts.config, parts.folder / "config.yaml"
    latest = checkpoints.latest()
    if latest:  # without a checkpoint there is nothing of an earlier start to go on with
        if not path.exists():
            raise UserError(f"{parts.folder} has checkpoints but no config.yaml; choose another --run-dir")
        _check_config(from_file(PretrainConfig, path), config)
        try:
            parts.state.load_state_dict(load_checkpoint(latest))
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{latest} does not fit this model and optimiser: {reason}") from error
    if len(set(dist.gather(parts.state.images_seen))) > 1:
        raise UserError(f"the processes see different checkpoints in {parts.folder}; it must be a shared folder")
    if parts.world.main:
        try:
            parts.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(to_yaml(config))
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {parts.folder}: {error.strerror}") from error
    return parts.schedule.step(parts.state.images_seen)


def _check_config(old: PretrainConfig, new: PretrainConfig) -> None:
    """Refuses to go on with a changed config, but by force.

    Raises:
        UserError: naming the changed settings.
    """
    changed = differences(PretrainConfig, to_dict(old), to_dict(new))
    if changed and new.resume != "force":
        raise UserError(
            f"{new.run_dir} holds a run with another config ({'; '.join(changed)}); choose another --run-dir, or go on "
            "with the changed one by --resume force"
        )
    if old.train.batch_size != new.train.batch_size:  # steps, rows and checkpoints are counted in it
        raise UserError(
            f"train.batch_size cannot change within a run ({old.train.batch_size} -> {new.train.batch_size}); choose "
            "another --run-dir, or change --train.micro-batch"
        )


def _train(parts: Run, checkpoints: Checkpoints, watch: Watch, resumed: int) -> int:
    config, total = parts.config, parts.schedule.total_steps
    if resumed >= total:
        watch.say(f"{parts.folder} is finished ({resumed} steps)")
        return _finish(parts, watch)

    def save(state: State) -> None:
        # Rows first: a checkpoint must never be newer than the rows that lead to it.
        watch.flush()
        content = state.state_dict()
        if parts.world.main:
            checkpoints.save(parts.schedule.step(state.images_seen), content)
        dist.barrier()

    if resumed:
        watch.say(f"resumed from {checkpoints.latest()} at step {resumed} of {total}")
    else:
        start(parts, watch)
        save(parts.state)
    every: list[Every] = [*watch.every(), (parts.steps(config.checkpoint.every, "checkpoint.every"), save)]
    batches = training_batches(parts, watch.bad_files.add)
    signals = StopSignal()
    try:
        fit(parts.state, parts.wrapped, batches, training_step(parts), parts.schedule, every, signals, save)
    except Interrupted:
        by = signals.received.name if signals.received else "a signal to another process"
        watch.say(f"stopped by {by}; saved as {checkpoints.latest()}; the same command again goes on")
        return 130 if signals.received == signal.SIGINT else EXIT_REQUEUE
    except NonFinite as error:
        raise RunError(diagnose(parts, error, checkpoints, watch)) from error
    finally:
        batches.close()
        signals.restore()
    return _finish(parts, watch)


def _finish(parts: Run, watch: Watch) -> int:
    export(parts)
    if parts.world.main:
        watch.finish(summary(parts.folder, parts.model.target.score_name))
    return 0


def start(parts: Run, watch: Watch) -> None:
    """What a fresh run does before its first update: looks at its targets, and at itself untrained."""
    survey = survey_source(parts)
    for model in (parts.model, parts.exported):
        model.frequent.copy_(survey.frequent)
    watch.say(survey.describe())
    if survey.collapsed:
        watch.say(
            "WARNING: almost all targets are the same class, so there is next to nothing to learn. Usually the input "
            "is wrongly scaled (16-bit images with small values, masks, nearly black images): look at the pictures."
        )
    watch.initial()


def diagnose(parts: Run, error: NonFinite, checkpoints: Checkpoints, watch: Watch) -> str:
    """Tries the offending batch again in fp32, writes that down, and says what to try."""
    step = training_step(parts, "fp32")
    parts.model.encoder.use_attention("sdpa")  # not every kernel takes fp32
    with torch.no_grad():
        losses = [step(parts.model, batch)[0].double() for batch in error.batches]
    loss = float(dist.sum_over_ranks(torch.stack(losses).mean()) / parts.world.size)
    if parts.precision != "fp32" and math.isfinite(loss):
        advice = f"in fp32 the same batch gives {loss:.4f}: try --train.precision fp32 (or bf16, if this was fp16)"
    else:
        advice = "fp32 is no better: try a lower --optim.lr, a longer --schedule.warmup or --optim.clip_norm 1"
    watch.event({"event": "non_finite", "precision": parts.precision, "fp32_loss": str(loss)}, error.step)
    return f"{error}; {advice} (with --resume force); the last good checkpoint is {checkpoints.latest()}"


def export(parts: Run) -> None:
    """Writes run_dir/model: the averaged encoder if there is an average, else the trained one."""
    if parts.world.main:
        data, folder = parts.config.data, parts.folder / "model"
        save_timm_folder(parts.exported.encoder, parts.config.model, folder, data.mean, data.std)
    dist.barrier()


def _dry_run(parts: Run) -> int:
    watch = Watch(parts, 0, dry=True)
    start(parts, watch)
    # One micro-batch shows the memory, and a step's time is that of its micro-batches.
    two = replace(parts.schedule, total_steps=2, accumulate=1)
    batches = training_batches(parts)
    seconds: list[float] = []
    try:
        fit(parts.state, parts.wrapped, batches, training_step(parts), two, [(1, watch.stopwatch(seconds))])
    finally:
        batches.close()
    watch.close()
    if parts.world.main:
        print(dry_run_report(parts, seconds, watch))
    return 0
