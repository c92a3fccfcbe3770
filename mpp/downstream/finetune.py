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
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mpp import dist
from mpp.config import differences, to_dict, to_yaml
from mpp.data.workers import cores_for
from mpp.dist import World
from mpp.downstream.finetune_result import INPUTS, RESULT, Inputs, Result, finished, read_result, summary, write_record
from mpp.downstream.labelled import Labelled, hold_out, open_labelled, take_fraction
from mpp.downstream.plots import plot_confusion
from mpp.downstream.pretrained_on import notes_on_pretraining
from mpp.downstream.scoring import Scores, score
from mpp.downstream.settings import FinetuneConfig, parse_share
from mpp.downstream.tuning import (
    Tuning,
    build_tuning,
    predict,
    read_decoded,
    result_weights,
    settle_attention,
    training_batches,
    training_step,
)
from mpp.errors import RunError
from mpp.system.files import drop_aside, set_aside, write_csv, write_whole
from mpp.training.bad_files import BadFiles
from mpp.training.checkpoint import Checkpoints
from mpp.training.data_stalls import data_notes
from mpp.training.log import RunLog, Terminal
from mpp.training.loggers import check_installed
from mpp.training.loop import Every, NonFinite, State, read_figures
from mpp.training.optim import average_warning
from mpp.training.parallel import share_statistics
from mpp.training.provenance import record_start
from mpp.training.run_folder import (
    MODEL,
    Claim,
    check_config,
    claiming,
    earlier,
    explained,
    once_a_machine,
    processes,
    resume,
    train,
)
from mpp.training.saving import Saving
from mpp.weights.timm_folder import write_timm_folder

_DIVERGED = "diverged.txt"


class Diverged(RunError):
    """A classifier whose logits are not finite."""


def run(config: FinetuneConfig, compare: bool = True) -> int:
    """Fine-tunes, or resumes, as `config` says. Returns the exit status: 0, or 75 after a requested stop.

    `compare` adds notes on test images that the weights were pretrained on.

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run that had to stop.
        TryLater: a run that goes on when what its images are read from answers again.
    """
    check_installed(config.log.to)  # before anything is written
    with (
        processes(config) as (world, device),
        explained(config, device),
        claiming(config, world) as claim,
    ):
        data = config.data
        labelled = once_a_machine(world, lambda: open_labelled(data.source, data.test, data.download, data.keep))
        labelled = take_fraction(labelled, data.labels, data.labels_seed)
        dist.agree(labelled.facts)
        if compare and world.main:
            pretrained_on = notes_on_pretraining(config.init, labelled.test, labelled.test_indices)
            labelled = replace(labelled, source_notes=(*labelled.source_notes, *pretrained_on))
        if len(config.optim.lr) == 1:
            return _Tuner(config, labelled, world, device).run(claim)
        status, lr = _sweep(config, labelled, world, device, claim)
        return status or _Tuner(_with_lr(config, lr), labelled, world, device).run(claim)


def _with_lr(config: FinetuneConfig, lr: float) -> FinetuneConfig:
    return replace(config, optim=replace(config.optim, lr=(lr,)))


def _sweep(
    config: FinetuneConfig, labelled: Labelled, world: World, device: torch.device, claim: Claim
) -> tuple[int, float]:
    """Trains with every learning rate on part of the training images; exit status and the best on the other part.

    Raises:
        UserError: a run folder of another config.
        RunError: where every learning rate diverged.
    """
    before = earlier(config)
    if before is not None:  # of the sweep's own learning rates one has been chosen
        lr = before.optim.lr[0]
        check_config(before, _with_lr(config, lr) if lr in config.optim.lr else config)
    split = hold_out(labelled, parse_share(config.data.holdout), config.train.seed)
    results: dict[float, Result | None] = {}
    for lr in config.optim.lr:
        one = replace(_with_lr(config, lr), run_dir=str(Path(config.run_dir) / "sweep" / f"lr_{lr}"))
        status, results[lr] = _try(one, split, world, device, claim)
        if status:
            return status, lr
    done = {lr: result.top1 for lr, result in results.items() if result is not None}
    if not done:
        tried = ", ".join(f"{lr:g}" for lr in results)
        raise RunError(f"every learning rate of the sweep diverged ({tried}); try lower values of --optim.lr")
    best = max(done, key=lambda lr: (done[lr], -lr))  # of equals the gentlest
    if world.main:
        rows = [
            (lr, result.top1 if result else "diverged", result.test_images if result else "", int(lr == best))
            for lr, result in results.items()
        ]
        head = ("lr", "held_out_top1", "held_out_images", "chosen")
        write_csv(Path(config.run_dir) / "sweep.csv", [head, *rows])
        print(f"accuracy on {len(split.test_indices):,} held-out training images, by optim.lr:")
        for lr, result in results.items():
            print(f"  {lr:<8g} {f'{result.top1:7.1%}' if result else 'diverged'}")
        print(f"best: optim.lr {best:g}; it trains on all {len(labelled.train_indices):,} images", flush=True)
    return 0, best


def _try(
    config: FinetuneConfig, split: Labelled, world: World, device: torch.device, claim: Claim
) -> tuple[int, Result | None]:
    """Trains one learning rate of a sweep, once; exit status and result, None for one that diverged."""
    folder, lr = Path(config.run_dir), config.optim.lr[0]
    tuner = _Tuner(config, split, world, device, choosing=True)
    claim()  # before the files of another process are read
    result = finished(config, tuner.inputs)
    marker, text = folder / _DIVERGED, to_yaml(config)
    if result is not None or (marker.is_file() and marker.read_text("utf-8") == text):
        return 0, result
    if world.main:
        print(f"sweep: optim.lr {lr:g}", file=sys.stderr)
    try:
        return tuner.run(claim), read_result(folder)
    except (NonFinite, Diverged) as error:
        if world.main:
            print(f"sweep: optim.lr {lr:g} diverged: {error}", file=sys.stderr)
            write_whole(marker, lambda file: file.write(text.encode()))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        dist.barrier()
        return 0, None


class _Tuner:
    """One run with one learning rate: trains, tests and writes; only rank 0 writes."""

    def __init__(
        self, config: FinetuneConfig, labelled: Labelled, world: World, device: torch.device, choosing: bool = False
    ) -> None:
        """`choosing`: a run of a sweep, which leaves nothing but its result."""
        self.parts: Tuning = build_tuning(config, labelled, config.optim.lr[0], world, device)
        self.inputs = Inputs.of(self.parts.weights, labelled)
        self.config, self.folder, self.main, self.choosing = config, Path(config.run_dir), world.main, choosing
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", config.checkpoint.keep_last, self._steps("checkpoint", "keep_every")
        )

    def run(self, claim: Claim) -> int:
        """Trains from where the folder stands to the end; the exit status."""
        parts, total = self.parts, self.parts.schedule.total_steps
        if self.main and not self.choosing:
            print(to_yaml(self.config), file=sys.stderr, end="")
            self._print_images()
            if average := average_warning(self.config.optim.ema_decay, total):
                print(f"WARNING: {average}", file=sys.stderr)
        claim()
        resumed = resume(self.config, parts.state, parts.schedule, self.checkpoints, self.main, self._check_inputs)
        settle_attention(parts)
        if self.main:
            write_record(self.folder / INPUTS, self.inputs)
        self.terminal = Terminal(total, resumed, on=self.main)
        self.log = RunLog(self.folder if self.main else None, resumed, self.config.log.to, self.config)
        try:
            if resumed >= total:
                self.say(f"{self.folder} is finished ({resumed} steps)")
            else:
                status = self._train(resumed)
                if status:
                    return status
            self._finish()
        finally:
            self.terminal.close()
            self.log.close()
        return 0

    def _print_images(self) -> None:
        labelled, share = self.parts.labelled, self.config.data.labels
        part = "" if parse_share(share) == 1 else f" ({share} of each class, drawn by data.labels_seed)"
        trained, tested = len(labelled.train_indices), len(labelled.test_indices)
        images = f"{trained:,} training images{part} and {tested:,} test images in {len(labelled.classes)} classes"
        print("\n".join([f"labels: {images}", *(f"note: {note}" for note in labelled.notes)]), file=sys.stderr)

    def _check_inputs(self) -> None:
        """Refuses to resume with other images or weights, except by force; deletes the results of an earlier config."""
        before = earlier(self.config)
        forced = self.config.resume == "force"
        if before is not None and not forced:
            self.inputs.check(self.folder)
        changed = before is None or differences(FinetuneConfig, to_dict(before), to_dict(self.config))
        if self.main and changed and (before is None or forced):
            with contextlib.suppress(OSError):  # `resume` reports a folder that cannot be written
                for name in (RESULT, _DIVERGED):
                    (self.folder / name).unlink()

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def _steps(self, group: str, name: str) -> int:
        duration = getattr(getattr(self.config, group), name)
        return self.parts.schedule.steps(duration, f"{group}.{name}")

    def _train(self, resumed: int) -> int:
        parts = self.parts
        read_decoded(parts, self.say)
        name = "bad_files.csv" if self.main else f"bad_files.rank{parts.world.rank}.csv"
        read = parts.state.images_seen // parts.world.size
        bad_files = BadFiles(self.folder / name, self.config.data.max_bad_share, read)
        save = Saving(parts.schedule, self.checkpoints, self.log.flush, resumed or None)
        if not self.choosing:
            if self.main and (before := set_aside(self.folder / MODEL)):  # as in pretraining
                self.say(f"the model of the run's earlier end is {before}, until there is a new one")
            labelled = parts.labelled
            data = {
                "source": labelled.train.describe(),
                "images": len(labelled.train_indices),
                "classes": len(labelled.classes),
                "test": labelled.test.describe(),
                "test_images": len(labelled.test_indices),
                "notes": list(labelled.notes),
            }
            facts = {"precision": parts.precision, "attention": parts.state.attention}
            facts |= {"seed": self.config.train.seed, "data": data}
            record_start(self.folder, resumed, next(parts.model.parameters()).device, facts)
        if resumed:
            self.say(f"resumed from {self.checkpoints.latest()} at step {resumed} of {parts.schedule.total_steps}")
        else:
            save(parts.state)
            save.wait()  # as in pretraining
        each_step = [lambda state: self.terminal.advance(parts.schedule.step(state.images_seen))]
        every: list[Every] = [
            (self._steps("log", "every"), self._row),
            (self._steps("checkpoint", "every"), save),
        ]
        if self.config.log.evaluate:
            every.insert(1, (self._steps("log", "evaluate"), self._evaluate))
        if parts.world.size > 1:
            each_step.append(lambda state: share_statistics(state.model, state.ema))
        batches, step = training_batches(parts, bad_files.add), training_step(parts)
        try:
            return train(parts.state, parts.wrapped, batches, step, parts.schedule, every, save, self.say, each_step)
        except NonFinite as error:
            if self.choosing:
                raise
            advice = "try a lower --optim.lr, a longer --schedule.warmup or --train.precision fp32"
            latest = self.checkpoints.latest()
            text = f"{error}; {advice} (with --resume force); the last good checkpoint is {latest}"
            raise RunError(text) from error

    def _row(self, state: State) -> None:
        schedule = self.parts.schedule
        step = schedule.step(state.images_seen)
        figures = read_figures(state, schedule)
        self.log.row(step, state.images_seen, figures)
        self.terminal.row(step, figures, "accuracy")

    def _evaluate(self, state: State) -> None:
        began = time.perf_counter()
        scores = self._scores()
        step = self.parts.schedule.step(state.images_seen)
        figures = {"test/top1": scores.top1} | ({} if scores.top5 is None else {"test/top5": scores.top5})
        self.log.row(step, state.images_seen, figures)
        split = "held-out" if self.choosing else "test"
        self.say(f"step {step}  {split} accuracy: {scores.top1:.1%} of {len(scores.labels):,} images")
        state.clock.paused(time.perf_counter() - began)

    def _scores(self) -> Scores:
        labelled = self.parts.labelled
        logits, kept = predict(self.parts, labelled.test, labelled.test_indices)
        if not np.isfinite(logits).all():
            raise Diverged("the classifier's logits are not finite: it has diverged; try a lower --optim.lr")
        return score(logits, labelled.test_labels[kept], kept, labelled.classes, labelled.foreign)

    def _finish(self) -> None:
        parts, labelled = self.parts, self.parts.labelled
        scores = self._scores()
        weights = None if self.choosing else result_weights(parts)
        if self.main:
            result = Result(
                scores.top1,
                scores.top5,
                scores.balanced,
                scores.interval,
                test_images=len(scores.labels),
                train_images=len(labelled.train_indices),
                num_classes=len(labelled.classes),
                lr=self.config.optim.lr[0],
                steps=parts.schedule.total_steps,
                init=self.config.init,
            )
            if weights is None:  # of a sweep of many, whose checkpoints would fill the disk
                write_record(self.folder / RESULT, result)
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            else:
                notes = write_timm_folder(weights, self.folder / MODEL)
                drop_aside(self.folder / MODEL)
                scores.write(self.folder, labelled.test, labelled.train_labels)
                names = (*labelled.classes, *labelled.foreign)
                plot_confusion(self.folder / "confusion.png", scores.confusion, names)
                write_record(self.folder / RESULT, result)
                self.terminal.close()
                notes += data_notes(self.folder, self.config.data, parts.workers, cores_for(parts.world.local_size))
                print(summary(self.folder, labelled, scores, result, notes), flush=True)
        dist.barrier()
