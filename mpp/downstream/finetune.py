"""Fine-tuning: from labelled images and an encoder, or none, to a classifier and its figures.

open_labelled -> take_fraction      images to train on and to test, with notes
start_weights -> build              a timm model with a new head, zero-initialised (appendix B.1.1)
fit                                 the loop of pretraining, its checkpoints, resume and signals
predict -> score                    every test image once: accuracy, per class, confusion, predictions.csv
write_timm_folder                   run_dir/model, with its head and class names

Several learning rates make a sweep (table 4 of the paper): each is trained on all but a held-out part of the training
images and judged there; the best then trains on everything, and only that one meets the test images.
"""

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpp import dist
from mpp.config import differences, to_dict, to_yaml
from mpp.dist import World
from mpp.downstream import multi_label
from mpp.downstream.finetune_result import (
    INPUTS,
    RESULT,
    Inputs,
    Result,
    always_most_frequent,
    finished,
    read_result,
    summary,
    swept,
    verdict_of,
    write_record,
)
from mpp.downstream.labelled import Labelled, hold_out, open_labelled, take_fraction
from mpp.downstream.leakage import notes_on_test
from mpp.downstream.multi_label import MultiLabelScores
from mpp.downstream.plots import plot_confusion
from mpp.downstream.scoring import Scores, score
from mpp.downstream.settings import FinetuneConfig, parse_share
from mpp.downstream.start import start_weights
from mpp.downstream.tuning import FinetuningRun, build_tuning, predict, result_weights, settle_config, training_step
from mpp.downstream.verdict import FILE as VERDICT
from mpp.errors import RunError
from mpp.system.files import drop_aside, write_csv, write_whole
from mpp.training.checkpoint import Checkpoints
from mpp.training.earlier_run import MODEL, check_config, earlier
from mpp.training.loggers import check_installed
from mpp.training.loop import Every, NonFinite, State
from mpp.training.micro_batch import try_micro_batch
from mpp.training.overview import overview
from mpp.training.parallel import share_statistics
from mpp.training.run_folder import (
    Claim,
    claiming,
    explained,
    on_main,
    once_a_machine,
    processes,
    resume,
    train,
)
from mpp.training.run_monitor import RunMonitor
from mpp.training.saving import Saving
from mpp.training.settings import chosen
from mpp.weights.timm_folder import write_timm_folder

_DIVERGED = "diverged.txt"
_Build = Callable[[FinetuneConfig, Labelled, float], FinetuningRun]


class Diverged(RunError):
    """A classifier whose logits are not finite."""


def run(config: FinetuneConfig, compare: bool = True) -> int:
    """Fine-tunes, or resumes, as `config` says. Returns the exit status: 0, or 75 after a requested stop.

    `compare` adds notes on test images that are not new, and refuses a test of none else.

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run that had to stop.
        TryLater: a run that goes on when what its images are read from answers again.
    """
    check_installed(config.log.to)  # before anything is written
    with processes(config) as (world, device), explained(config, device), claiming(config, world) as claim:
        data = config.data
        sources = data.source, data.test, data.download, data.keep, data.group
        labelled = once_a_machine(world, lambda: open_labelled(*sources))
        labelled = take_fraction(labelled, data.labels, data.labels_seed)
        dist.agree(labelled.facts)
        if compare:
            seen = on_main(world, lambda: notes_on_test(labelled, [config.init]))
            labelled = replace(labelled, source_notes=(*labelled.source_notes, *seen))
        weights = once_a_machine(world, lambda: start_weights(config))
        config, choices = settle_config(config, labelled, weights, world, device)
        build = functools.partial(build_tuning, world=world, device=device, weights=weights, choices=choices)
        lr = chosen(config.optim.lr[0])
        if len(config.optim.lr) > 1:
            status, lr = _sweep(config, labelled, build, world, claim)
            if status:
                return status
        tuning = build(_with_lr(config, lr), labelled, lr)
        return _finetune(tuning, Inputs.of(tuning.weights, labelled), claim)


def _with_lr(config: FinetuneConfig, lr: float) -> FinetuneConfig:
    return replace(config, optim=replace(config.optim, lr=(lr,)))


def _sweep(config: FinetuneConfig, labelled: Labelled, build: _Build, world: World, claim: Claim) -> tuple[int, float]:
    """Trains with every learning rate on part of the training images; exit status and the best on the other part.

    Raises:
        UserError: a run folder of another config.
        RunError: where every learning rate diverged.
    """
    before = earlier(config)
    if before is not None:  # of the sweep's own learning rates one has been chosen
        lr = chosen(before.optim.lr[0])
        check_config(before, _with_lr(config, lr) if lr in config.optim.lr else config)
        if lr in config.optim.lr and config.resume != "force":
            if world.main:
                tried = swept(Path(config.run_dir))
                new = [f"{rate:g}" for rate in map(chosen, config.optim.lr) if tried and str(rate) not in tried]
                rest = f"; not tried: {', '.join(new)} (choose another --run-dir to try them)" if new else ""
                print(f"optim.lr {lr:g} was chosen before, see sweep.csv{rest}", flush=True)
            return 0, lr
    split = hold_out(labelled, parse_share(config.data.holdout), config.train.seed)
    results: dict[float, Result | None] = {}
    for lr in map(chosen, config.optim.lr):
        one = replace(_with_lr(config, lr), run_dir=str(Path(config.run_dir) / "sweep" / f"lr_{lr}"))
        status, results[lr] = _try(one, split, build, world, claim)
        if status:
            return status, lr
    done = {lr: result.figure for lr, result in results.items() if result is not None}
    if not done:
        tried = ", ".join(f"{lr:g}" for lr in results)
        raise RunError(f"every learning rate of the sweep diverged ({tried}); try lower values of --optim.lr")
    best = max(done, key=lambda lr: (done[lr], -lr))  # of equals the gentlest
    if world.main:
        measured = "top1" if labelled.sets is None else "mean_ap"
        rows: list[tuple[Any, ...]] = [("lr", f"held_out_{measured}", "held_out_images", "chosen")]
        name = "accuracy" if labelled.sets is None else "mean average precision"
        print(f"{name} on {len(split.test_indices):,} held-out images, by optim.lr:")
        for lr, result in results.items():
            figures = (result.figure, result.test_images) if result else ("diverged", "")
            rows.append((lr, *figures, int(lr == best)))
            print(f"  {lr:<8g} {f'{result.figure:7.1%}' if result else 'diverged'}")
        write_csv(Path(config.run_dir) / "sweep.csv", rows)
        print(f"best: optim.lr {best:g}; it trains on all {len(labelled.train_indices):,} images", flush=True)
    return 0, best


def _try(
    config: FinetuneConfig, split: Labelled, build: _Build, world: World, claim: Claim
) -> tuple[int, Result | None]:
    """Trains one learning rate of a sweep, once; exit status and result, None for one that diverged."""
    folder, lr = Path(config.run_dir), chosen(config.optim.lr[0])
    run = build(config, split, lr)
    inputs = Inputs.of(run.weights, split)
    claim()  # before the files of another process are read
    result = finished(config, inputs)
    marker, text = folder / _DIVERGED, to_yaml(config)
    if result is not None or (marker.is_file() and marker.read_text("utf-8") == text):
        return 0, result
    if world.main:
        print(f"sweep: optim.lr {lr:g}", file=sys.stderr)
    try:
        return _finetune(run, inputs, claim, choosing=True), read_result(folder)
    except (NonFinite, Diverged) as error:
        if world.main:
            print(f"sweep: optim.lr {lr:g} diverged: {error}", file=sys.stderr)
            write_whole(marker, text)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        dist.barrier()
        return 0, None


def _finetune(run: FinetuningRun, inputs: Inputs, claim: Claim, choosing: bool = False) -> int:
    """Trains from where the folder stands to the end, tests and writes; the exit status.

    `choosing`: a run of a sweep, which leaves nothing but its result.
    """
    try_micro_batch(run, training_step(run), run.image_hw, run.weights.in_chans)
    config, total = run.config, run.schedule.total_steps
    if run.world.main and not choosing:
        init = "new weights" if config.init == "none" else config.init
        model, labels = f"{run.weights.name} from {init}", ("labels", run.describe_images())
        notes = (f"note: {note}" for note in run.labelled.notes)
        warnings = (f"WARNING: {warning}" for warning in run.all_doubts())
        print(overview(run, model, run.image_hw, labels), *notes, *warnings, sep="\n", file=sys.stderr)
    claim()
    checkpoints, check = run.checkpoints(), functools.partial(_check_inputs, run, inputs)
    resumed = resume(config, run.state, run.schedule, checkpoints, run.world.main, check)
    run.settle_attention()
    if run.world.main:
        write_record(run.folder / INPUTS, inputs)
    with contextlib.closing(_Monitor(run, choosing)) as monitor:
        if resumed >= total:
            monitor.say(f"{run.folder} is finished ({resumed} steps)")
        else:
            status = _train(run, checkpoints, monitor, resumed)
            if status:
                return status
        _finish(run, monitor)
    return 0


def _check_inputs(run: FinetuningRun, inputs: Inputs, before: FinetuneConfig | None) -> None:
    """Refuses to resume with other images or weights, except by force; deletes the results of an earlier config."""
    forced = run.config.resume == "force"
    if before is not None and not forced:
        inputs.check(run.folder)
    changed = before is None or differences(FinetuneConfig, to_dict(before), to_dict(run.config))
    if run.world.main and changed and (before is None or forced):
        with contextlib.suppress(OSError):  # `resume` reports a folder that cannot be written
            for name in (RESULT, VERDICT, _DIVERGED):
                (run.folder / name).unlink(missing_ok=True)


class _Monitor(RunMonitor):
    """Follows a fine-tuning run, and evaluates it."""

    run: FinetuningRun

    def __init__(self, run: FinetuningRun, choosing: bool) -> None:
        super().__init__(run, "accuracy" if run.labelled.sets is None else "")
        self.choosing = choosing

    def evaluate(self, state: State) -> None:
        """Writes and prints the accuracy on the test images."""
        began = time.perf_counter()
        scores, step = self.scores(), self.step(state)
        if isinstance(scores, MultiLabelScores):
            figures, name, figure = {"test/mean_ap": scores.mean_ap}, "mean average precision", scores.mean_ap
        else:
            figures = {"test/top1": scores.top1} | ({} if scores.top5 is None else {"test/top5": scores.top5})
            name, figure = "accuracy", scores.top1
        self.log.row(step, state.images_seen, figures)
        split = "held-out" if self.choosing else "test"
        self.say(f"step {step}  {split} {name}: {figure:.1%} of {len(scores.indices):,} images")
        state.clock.paused(time.perf_counter() - began)

    def scores(self) -> Scores | MultiLabelScores:
        """Predicts every test image.

        Raises:
            Diverged: logits that are not finite.
        """
        labelled = self.run.labelled
        logits, decoded = predict(self.run, labelled.test, labelled.test_indices)
        if not np.isfinite(logits).all():
            raise Diverged("the classifier's logits are not finite: it has diverged; try a lower --optim.lr")
        truth = labelled.truth(labelled.test_labels[decoded])
        if labelled.sets is not None:
            return multi_label.score(logits, truth, decoded, labelled.classes)
        return score(logits, truth, decoded, labelled.classes, labelled.foreign)


def _train(run: FinetuningRun, checkpoints: Checkpoints, monitor: _Monitor, resumed: int) -> int:
    run.read_decoded(monitor.say)
    save = Saving(run.schedule, checkpoints, monitor.log.flush, resumed or None)
    if not monitor.choosing:
        monitor.set_model_aside()
        labelled = run.labelled
        data = {
            "source": labelled.train.describe(),
            "images": len(labelled.train_indices),
            "classes": len(labelled.classes),
            "test": labelled.test.describe(),
            "test_images": len(labelled.test_indices),
            "notes": list(labelled.notes),
        }
        run.record(resumed, data, doubts=run.all_doubts())
    if resumed:
        monitor.say(f"resumed from {checkpoints.latest()} at step {resumed} of {run.schedule.total_steps}")
    else:
        save(run.state)
        save.wait()  # as in pretraining
    every: list[Every] = [(run.steps("log.every"), monitor.row)]
    if run.config.log.evaluate:
        every.append((run.steps("log.evaluate"), monitor.evaluate))
    every.append((run.steps("checkpoint.every"), save))
    each_step = [monitor.advance]
    if run.world.size > 1:
        each_step.append(lambda state: share_statistics(state.model, state.ema))
    batches, step = run.batches(monitor.bad_files.add), training_step(run)
    try:
        return train(run.state, run.wrapped, batches, step, run.schedule, every, save, monitor.say, each_step)
    except NonFinite as error:
        if monitor.choosing:
            raise
        advice = "try a lower --optim.lr, a longer --schedule.warmup or --train.precision fp32"
        latest = checkpoints.latest()
        text = f"{error}; {advice} (with --resume force); the last good checkpoint is {latest}"
        raise RunError(text) from error


def _finish(run: FinetuningRun, monitor: _Monitor) -> None:
    labelled, folder = run.labelled, run.folder
    scores = monitor.scores()
    weights = None if monitor.choosing else result_weights(run)
    if run.world.main:
        several = isinstance(scores, MultiLabelScores)
        result = Result.of(scores, labelled, run.config, run.schedule.total_steps)
        if weights is None:  # of a sweep of many, whose checkpoints would fill the disk
            write_record(folder / RESULT, result)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        else:
            notes = write_timm_folder(weights, folder / MODEL)
            drop_aside(folder / MODEL)
            if several:
                scores.write(folder, labelled.test, labelled.truth(labelled.train_labels[labelled.train_indices]))
            else:
                scores.write(folder, labelled.test, labelled.train_labels)
                plot_confusion(folder / "confusion.png", scores.confusion, (*labelled.classes, *labelled.foreign))
            write_record(folder / RESULT, result)
            notes += run.data_notes()
            trivial = scores.chance if several else always_most_frequent(labelled, scores)
            verdict = verdict_of(run.config, folder, result, trivial)
            verdict.write(folder, [*run.all_doubts(), *labelled.notes, *notes])
            monitor.terminal.close()
            print(summary(folder, labelled, scores, result, verdict, notes, run.all_doubts()), flush=True)
    dist.barrier()
