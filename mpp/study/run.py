"""Measures what the pretraining is worth, in one command.

pretrain every arm with every seed (or take a run)                 run_dir/pretrain/ARM/seed_N
fine-tune {scratch, scratch longer, every arm} x labels x seeds    run_dir/finetune/SIDE/labels_SHARE/seed_N
few-shot, rank and probe of {random, every arm} x layers x pools   run_dir/frozen/SIDE/seed_N.json
all of it as data, after every run                                 run_dir/study.json
tables with mean and spread, and pictures                          run_dir/study.md, table.csv, runs.csv, *.png

All sides have the same recipe, number of steps and, per seed, the same labelled images; from scratch means random:RUN,
the encoder of the first arm freshly initialised. Where finetune.optim.lr has several values, each side chooses its own,
on held-out images, with the first seed. What is finished is not done again. The same command may run several
times at once, on several devices: each process takes tasks that no other works at.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mpp.config import differences, from_file, to_dict, to_yaml
from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source
from mpp.data.sources.overlap import Shared, shared
from mpp.data.sources.patterns import shown
from mpp.dist import World
from mpp.downstream.features import FrozenEncoder
from mpp.downstream.fewshot import short_classes
from mpp.downstream.finetune_result import changed_settings, read_result, swept
from mpp.downstream.labelled import Labelled, hold_out, open_labelled, take_fraction
from mpp.downstream.leakage import notes_on_test
from mpp.downstream.settings import parse_share
from mpp.downstream.tuning import build_tuning
from mpp.errors import UserError
from mpp.model.encoder import model_args
from mpp.pretraining.build import build_model
from mpp.report.visualize import REPORT, write_report
from mpp.study.equal_time import EQUAL_TIME, EqualTime, MakeStep, equal_lengths, known_lengths, scratch_step
from mpp.study.plan import Plan, Pretraining, finetune_runs, images_of, pretrainings
from mpp.study.record import Record, test_images_seen
from mpp.study.report import few_shots, write
from mpp.study.scheduler import lock_of, run_tasks
from mpp.study.settings import LONGER, SCRATCH, StudyConfig
from mpp.study.tasks import StudyTasks
from mpp.system.files import claimed, write_whole
from mpp.weights.base import Weights
from mpp.weights.numerics import read_init_args
from mpp.weights.opening import open_weights

_MAY_CHANGE = ("arms", "pretrain_seeds", "labels", "lengths", "tune_at", "seeds")
"""Settings of a study that may change, and that its fine-tuning runs depend on."""


def run(config: StudyConfig) -> int:
    """Runs the study, or goes on with it. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written, or a study of another config in run_dir.
        RunError: a part that had to stop.
    """
    folder, data = Path(config.run_dir), config.finetune.data
    labelled = open_labelled(config.data, config.test, config.download or data.download, data.keep, config.group)
    if labelled.sets is not None:
        several = f"{labelled.train.name} has several labels an image, and a study compares accuracies of one"
        raise UserError(f"{several}; run finetune, fewshot and probe instead")
    trained, tested = len(labelled.train_indices), len(labelled.test_indices)
    print(f"labels: {trained:,} training and {tested:,} test images", flush=True)
    seen = notes_on_test(labelled, [config.init])
    for note in (*labelled.notes, *seen, *few_shots(short_classes(labelled, config.shots), len(labelled.classes))):
        print(f"note: {note}", file=sys.stderr)
    timed = known_lengths(folder) if config.equal_time else EqualTime()
    test_images_pretrained = _check(config, labelled, timed)
    planned = pretrainings(config)
    images = images_of(planned[0].resolved) if config.longer or config.equal_time else 0
    before = _earlier_config(folder, config)
    plan = Plan(config, labelled, planned, finetune_runs(config, labelled, images, timed))
    check_finished(plan, before)
    try:
        write_whole(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to the study's folder {folder}: {error.strerror}") from error
    if config.equal_time:
        with claimed(lock_of(folder, folder / EQUAL_TIME), wait=True):
            last = {one.arm.name: one for one in planned}
            arms = [replace(one.arm, pretrain=one.resolved) for one in last.values()]
            timed = equal_lengths(folder, arms, images, _scratch_steps(plan))
        runs = finetune_runs(config, labelled, images, timed)
        plan = replace(plan, pretrainings=pretrainings(config, timed), finetunings=runs)
    record = Record(plan, test_images_pretrained, timed)
    status = run_tasks(StudyTasks(plan, record).tasks())
    if status:
        return status
    with claimed(lock_of(folder, folder / "study.md"), wait=True):  # several processes end at the same moment
        changed = record.write(finished=True)
        write(folder, record.document)
        for one in plan.pretrainings:  # their pages now tell what the pretraining was worth
            if one.config.log.report and (changed or not (one.folder / REPORT).exists()):
                write_report(one.config.run_dir, one.config.train.device)
    print((folder / "study.md").read_text("utf-8"))
    return 0


def _check(config: StudyConfig, labelled: Labelled, timed: EqualTime) -> dict[str, int]:
    """Builds, with new weights, all that the study will build after hours of pretraining; returns as `check_apart`."""
    seen: dict[str, int] = {}
    if config.init:
        encoders = [replace(open_weights(config.init), state=None, origin="the encoder")]
    else:
        seen = check_apart(config, labelled, timed)
        encoders = [_new_encoder(one) for one in {one.arm.name: one for one in pretrainings(config)}.values()]
    for weights in encoders:  # refuses layers that are not there
        one = FrozenEncoder(
            weights, layers=config.layers, device=torch.device("cpu"), quarters="quarters" in config.pool
        )
        if not set(config.pool) & set(one.pools):
            raise UserError(f"pool {' '.join(config.pool)}: {weights.origin} takes {' or '.join(one.pools)}")
    plan = Plan(config, labelled, pretrainings(config), finetune_runs(config, labelled, 0))
    for labels, one in {one.labels: one for one in plan.finetunings if one.side == SCRATCH}.items():
        tuned = plan.finetune_config(one)
        part = take_fraction(labelled, labels, one.seed)
        if len(tuned.optim.lr) > 1 and labels in {chooser.labels for chooser in plan.choosers.values()}:
            try:
                part = hold_out(part, parse_share(tuned.data.holdout), one.seed)
            except SourceError as error:
                raise UserError(f"{labels} of the labels: {error}") from None
        rate = max((lr for lr in tuned.optim.lr if lr != "auto"), default=1e-3)
        build_tuning(tuned, part, rate, World(), torch.device("cpu"), encoders[0])
    return seen


def _scratch_steps(plan: Plan) -> dict[str, MakeStep]:
    """What `equal_lengths` measures of the longer training from scratch, by share of the labels."""
    if not plan.config.longer:
        return {}
    encoder = _new_encoder(plan.pretrainings[0])
    first = {one.labels: one for one in reversed(plan.finetunings) if one.side == LONGER}
    return {
        labels: scratch_step(plan.finetune_config(one), take_fraction(plan.labelled, labels, one.seed), encoder)
        for labels, one in first.items()
    }


def check_apart(config: StudyConfig, labelled: Labelled, timed: EqualTime | None = None) -> dict[str, int]:
    """By arm, how many of the test images are in its pretraining data, where any are; prints a warning of these.

    Of an arm that is trained and whose images are gone, as many as study.json says. `timed` as of `pretrainings`.

    Raises:
        UserError: all are, whatever the two sources are called.
    """
    compared: dict[str, Shared] = {}
    seen: dict[str, int] = {}
    earlier = test_images_seen(Path(config.run_dir))
    for arm in config.parsed_arms():
        data = arm.pretrain.data
        spec = data.source or config.data
        if spec not in compared:
            try:
                source = open_source(spec, download=config.download or data.download, keep=data.keep)
            except SourceError as error:
                if not all(one.finished for one in pretrainings(config, timed) if one.arm.name == arm.name):
                    raise
                what = f"the test images were not compared with those that {arm.name} was pretrained on"
                print(f"note: {what}: {error}", file=sys.stderr)
                seen |= {name: number for name, number in earlier.items() if name == arm.name}
                continue
            found = compared[spec] = shared(labelled.test, labelled.test_indices, source)
            if found.all_of_them:
                choose = "name other images for one of them, by --test or --pretrain.data.source"
                if labelled.test is labelled.train:
                    raise UserError(
                        f"{shown(config.data)} has no test split of its own, so that the pretraining would see the "
                        f"images held out as the test: {choose}"
                    )
                raise UserError(
                    f"{arm.name} would be pretrained on the test images: all {found.tested:,} of {labelled.test.name} "
                    f"are in {source.name} ({found.example}); {choose}"
                )
            for line in found.sentences(f"the pretraining data of {arm.name}, {source.name}"):
                print(f"WARNING: {line}", file=sys.stderr)
        if compared[spec].found:
            seen[arm.name] = compared[spec].found
    return seen


def _new_encoder(one: Pretraining) -> Weights:
    """The encoder of an arm without weights; its objective is built, too, to see whether it fits."""
    try:
        config = one.resolved
        build_model(config, "meta")
    except UserError as error:
        raise UserError(f"{one.arm.name}: {error}") from error
    model, data, (args, numerics) = config.model, config.data, read_init_args(config.init_args)
    return Weights(
        model.name,
        model_args(model) | args,
        None,
        model.image_hw,
        model.in_chans,
        data.mean,
        data.std,
        numerics=numerics,
        value_range=data.value_range,
        background=data.background,
        origin=f"the encoder of {one.arm.name}",
    )


def _earlier_config(folder: Path, config: StudyConfig) -> StudyConfig:
    """The config that the study had; refuses a folder with another. What only adds to a study may change."""
    path = folder / "config.yaml"
    if not path.exists():
        return config
    try:
        before = from_file(StudyConfig, path)
    except UserError as error:
        raise UserError(f"{folder} holds something else than a study; choose another --run-dir ({error})") from error
    changed = differences(StudyConfig, to_dict(before), to_dict(config))
    if changed and any((folder / name).exists() for name in ("pretrain", "finetune", EQUAL_TIME)):
        raise UserError(f"{folder} holds a study with another config ({'; '.join(changed)}); choose another --run-dir")
    return before


def check_finished(plan: Plan, before: StudyConfig) -> None:
    """Refuses fine-tuning runs in the study's folder with other settings, before hours of pretraining.

    Raises:
        UserError: naming the run and its settings.
    """
    rates: dict[tuple[str, str], float] = {}
    for group, one in plan.choosers.items():
        config = plan.finetune_config(one)
        result = read_result(Path(config.run_dir)) if plan.is_done(one) else None
        if result is not None:
            rates[group] = result.lr
            if len(config.optim.lr) > 1 and config.resume != "force" and not swept(Path(config.run_dir)):
                what = f"{config.run_dir} has a learning rate that it did not choose, and {one}, now chooses one"
                raise UserError(f"{what}; choose another --run-dir")
    for one in plan.finetunings:
        group = plan.rate_group(one)
        config = plan.finetune_config(one, rates.get(group))
        changed = changed_settings(config)
        if changed and config.resume != "force":
            names = [name for name in _MAY_CHANGE if getattr(before, name) != getattr(plan.config, name)]
            why = f", for {' and '.join(names)} of the study changed" if names else ""
            what = f"{config.run_dir} holds a run with another config ({'; '.join(changed)}){why}"
            raise UserError(f"{what}; choose another --run-dir")
        if len(config.optim.lr) > 1 and config.resume != "force" and one != plan.choosers[group] and plan.is_done(one):
            what = f"{config.run_dir} has the learning rate that another run chose, and {plan.choosers[group]}"
            raise UserError(f"{what}, would choose one anew; choose another --run-dir")
