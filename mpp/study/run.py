"""One command that says what the pretraining is worth.

pretrain every arm with every seed (or take a run)                 run_dir/pretrain/ARM/seed_N
fine-tune {scratch, scratch longer, every arm} x labels x seeds    run_dir/finetune/SIDE/labels_SHARE/seed_N
few-shot, rank and probe of {random, every arm} x layers x pools   run_dir/frozen/SIDE/seed_N.json
all of it as data, after every run                                 run_dir/study.json
tables with mean and spread, and pictures                          run_dir/study.md, table.csv, runs.csv, *.png

All sides have the same recipe, number of steps and, per seed, the same labelled images; from scratch means random:RUN,
the encoder of the first arm freshly initialised. Where finetune.optim.lr has several values, each side chooses its own,
on held-out training images, with the first seed. What is finished is not done again. The same command may run several
times at once, on several devices: each takes what the others are not at.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mpp.config import differences, from_file, to_dict, to_yaml
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.opening import open_source
from mpp.data.sources.overlap import Shared, shared
from mpp.data.sources.patterns import shown
from mpp.dist import World
from mpp.downstream.finetune_result import read_result
from mpp.downstream.labelled import Labelled, hold_out, open_labelled, take_fraction
from mpp.downstream.pretrained_on import notes_on_pretraining
from mpp.downstream.settings import parse_share
from mpp.downstream.tuning import build_tuning
from mpp.errors import UserError
from mpp.model.encoder import model_args
from mpp.pretraining.build import build_model
from mpp.report.settings import SCRATCH
from mpp.report.visualize import REPORT, write_report
from mpp.study.arms import EQUAL_TIME, Lengths, Pretraining, equal_lengths, images_of, pretrainings
from mpp.study.cells import Cell, Place, cell_config, cells, starting_points, told_otherwise, tuned_for
from mpp.study.frozen import check_layers
from mpp.study.record import Record
from mpp.study.report import write
from mpp.study.settings import StudyConfig
from mpp.study.turns import lock_of, take_turns
from mpp.study.work import Work, encoders
from mpp.system.files import claimed, write_whole
from mpp.weights.base import Weights
from mpp.weights.numerics import read_init_args
from mpp.weights.opening import open_weights

_OF_CELLS = ("arms", "pretrain_seeds", "labels", "lengths", "tune_at", "seeds")
"""Settings of a study that may change, and that its fine-tuning runs depend on."""


def run(config: StudyConfig) -> int:
    """Runs the study, or goes on with it. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written, or a study of another config in run_dir.
        RunError: a part that had to stop.
    """
    folder = Path(config.run_dir)
    data = config.finetune.data
    labelled = open_labelled(config.data, config.test, config.download or data.download, data.keep)
    trained, tested = len(labelled.train_indices), len(labelled.test_indices)
    print(f"labels: {trained:,} training and {tested:,} test images", flush=True)
    for note in labelled.notes:
        print(f"note: {note}", file=sys.stderr)
    first = next(iter(pretrainings(config, {})), None)
    seen = _check(config, labelled)
    images = images_of(first.config) if first and (config.longer or config.equal_time) else 0
    before = _before(folder, config)
    todo, inits = cells(config, labelled, images), starting_points(config, pretrainings(config, {}))
    _check_done(config, before, todo, inits)
    _claim(folder, config)
    lengths: Lengths = {}
    if config.equal_time:
        with claimed(lock_of(folder, folder / EQUAL_TIME), wait=True):
            lengths = equal_lengths(folder, config.told_arms(), images)
    runs, frozen = pretrainings(config, lengths), encoders(inits)
    record = Record(config, labelled, runs, todo, list(frozen.values()), seen)
    record.set_equal_time(lengths)
    work = Work(config, labelled, runs, todo, inits, record)
    status = take_turns(work.parts())
    if status:
        return status
    with claimed(lock_of(folder, folder / "study.md"), wait=True):  # several processes end at the same moment
        work.tell_what_is_done()
        changed = record.write(finished=True)
        write(folder, record.document)
        for one in runs:  # which can now tell what the pretraining was worth
            if one.config.log.report and (changed or not (one.folder / REPORT).exists()):
                write_report(one.config.run_dir, one.config.train.device)
    print((folder / "study.md").read_text("utf-8"))
    return 0


def _check(config: StudyConfig, labelled: Labelled) -> dict[str, int]:
    """Builds, with fresh weights, all that the study will build after hours of pretraining.

    Returns:
        By arm, how many of the test images its pretraining sees, where it sees any.

    Raises:
        UserError: what cannot be built, or a study that would pretrain on its own test images.
    """
    seen: dict[str, int] = {}
    if config.init:
        encoders = [replace(open_weights(config.init), state=None, origin="the encoder")]
        for note in notes_on_pretraining(config.init, labelled.test, labelled.test_indices):
            print(f"note: {note}", file=sys.stderr)
    else:
        seen = _check_apart(config, labelled)
        arms = {one.arm.name: one for one in pretrainings(config, {})}
        encoders = [_fresh(one) for one in arms.values()]
    for weights in encoders:
        check_layers(config, weights)
    inits: dict[Place, str] = {(SCRATCH, None): "random"}
    for share in {cell.labels: cell for cell in cells(config, labelled, 0) if cell.side == SCRATCH}.values():
        one = cell_config(config, share, inits)
        part = take_fraction(labelled, share.labels, share.seed)
        if len(one.optim.lr) > 1:
            part = hold_out(part, parse_share(one.data.holdout), share.seed)
        build_tuning(one, part, max(one.optim.lr), World(), torch.device("cpu"), encoders[0])
    return seen


def _check_apart(config: StudyConfig, labelled: Labelled) -> dict[str, int]:
    """By arm, how many of the test images are in its pretraining data, where any are; says which.

    Raises:
        UserError: they all are, whatever the two sources are called.
    """
    looked: dict[str, Shared] = {}
    found: dict[str, int] = {}
    for arm in config.told_arms():
        data = arm.pretrain.data
        spec = data.source or config.data
        if spec not in looked:
            try:
                there = open_source(spec, download=config.download or data.download, keep=data.keep)
            except SourceError as error:
                if not all(one.finished for one in pretrainings(config, {}) if one.arm.name == arm.name):
                    raise
                told = f"the test images were not compared with those that {arm.name} was pretrained on: {error}"
                print(f"note: {told}", file=sys.stderr)
                continue
            looked[spec] = shared(labelled.test, labelled.test_indices, there)
            if looked[spec].all_of_them:
                raise UserError(_seen(config, labelled, arm.name, there, looked[spec]))
            for line in looked[spec].sentences(f"the pretraining data of {arm.name}, {there.name}"):
                print(f"WARNING: {line}", file=sys.stderr)
        if looked[spec].found:
            found[arm.name] = looked[spec].found
    return found


def _seen(config: StudyConfig, labelled: Labelled, arm: str, there: Source, found: Shared) -> str:
    """Why a study is refused."""
    todo = "name other images for one of them, by --test or --pretrain.data.source"
    if labelled.test is labelled.train:
        return (
            f"{shown(config.data)} has no test split of its own, so that the pretraining would see the images held out "
            f"as the test: {todo}"
        )
    return (
        f"{arm} would be pretrained on the test images: all {found.tested:,} of {labelled.test.name} are in "
        f"{there.name} ({found.example}); {todo}"
    )


def _fresh(one: Pretraining) -> Weights:
    """The encoder of an arm before its pretraining, without weights; its objective is built, too."""
    try:
        config = one.settled
        build_model(config, "meta")
    except UserError as error:
        raise UserError(f"{one.arm.name}: {error}") from error
    model, data, (args, numerics) = config.model, config.data, read_init_args(config.init_args)
    told = {"numerics": numerics, "value_range": data.value_range, "background": data.background}
    size = model.image_hw, model.in_chans, data.mean, data.std
    origin = f"the encoder of {one.arm.name}"
    return Weights(model.name, model_args(model) | args, None, *size, origin=origin, **told)


def _before(folder: Path, config: StudyConfig) -> StudyConfig:
    """The config that the study had; refuses a folder with another. What only adds to a study may change."""
    path = folder / "config.yaml"
    if not path.exists():
        return config
    try:
        before = from_file(StudyConfig, path)
    except UserError as error:
        raise UserError(f"{folder} holds something else than a study; choose another --run-dir ({error})") from error
    changed = differences(StudyConfig, to_dict(before), to_dict(config))
    started = any((folder / part).exists() for part in ("pretrain", "finetune", EQUAL_TIME))
    if changed and started:
        raise UserError(f"{folder} holds a study with another config ({'; '.join(changed)}); choose another --run-dir")
    return before


def _check_done(config: StudyConfig, before: StudyConfig, todo: Sequence[Cell], inits: Mapping[Place, str]) -> None:
    """Refuses fine-tuning runs that the study would now tell otherwise, which would be met after hours of pretraining.

    Raises:
        UserError: naming the run and its settings.
    """
    rates: dict[tuple[str, str], float] = {}
    for cell in todo:
        one = cell_config(config, cell, inits, rates.get(tuned_for(config, cell)))
        changed, result = told_otherwise(one), read_result(Path(one.run_dir))
        if changed and one.resume != "force":
            names = [name for name in _OF_CELLS if getattr(before, name) != getattr(config, name)]
            why = f", for {' and '.join(names)} of the study changed" if names else ""
            raise UserError(
                f"{one.run_dir} holds a run with another config ({'; '.join(changed)}){why}; choose another --run-dir"
            )
        if result is not None and not changed:
            rates.setdefault(tuned_for(config, cell), result.lr)


def _claim(folder: Path, config: StudyConfig) -> None:
    """Writes config.yaml."""
    text = to_yaml(config).encode()
    try:
        write_whole(folder / "config.yaml", lambda file: file.write(text))
    except OSError as error:
        raise UserError(f"cannot write to the study's folder {folder}: {error.strerror}") from error
