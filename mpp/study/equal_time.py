"""How many images each arm of a study, and its longer training from scratch, may see in equal time.

arms, scratch -> the training step of each, as its run would make it -> seconds per image, side by side
              -> the first arm's images x its seconds, by the others' seconds -> equal_time.json, which is kept

Where an arm reads all images once before its first step, that counts, too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.dist import World
from mpp.downstream.labelled import Labelled
from mpp.downstream.settings import FinetuneConfig
from mpp.downstream.tuning import build_tuning, training_step
from mpp.errors import UserError, without_credentials
from mpp.pretraining.build import build, resolve_init
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import endless_step
from mpp.pretraining.survey import survey_whole_images, surveyed_images
from mpp.study.settings import Arm
from mpp.system.files import write_whole
from mpp.training.parallel import choose_device
from mpp.training.settings import ScheduleConfig
from mpp.training.timing import MEASURING, calls_lasting, in_turns, ratios, seconds_a_call
from mpp.training.training_run import TrainingRun
from mpp.weights.base import Weights

EQUAL_TIME = "equal_time.json"
_ROUNDS, _WARM_UP, _SAMPLE_SECONDS = 7, 2, 0.5

MakeStep = Callable[[], tuple[TrainingRun, Callable[[], None]]]
"""Builds a run, and a function that makes its next update."""


@dataclass(frozen=True)
class EqualTime:
    """How many images fit into the time of the first arm's pretraining."""

    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arm -> {"ratio": its seconds per image over the first arm's, "images": that fit, "flags": that set it apart,
    "survey": how many images the first arm trains on in the time that this one reads all images, where it does}."""
    longer: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Share of the labels -> {"ratio", "images"} of training from scratch on it."""


def known_lengths(folder: Path) -> EqualTime:
    """Reads what was measured for a study before; raises UserError for a file that cannot be read."""
    path = folder / EQUAL_TIME
    try:
        known = EqualTime(**json.loads(path.read_text("utf-8"))) if path.is_file() else EqualTime()
        lengths = [int(of["images"]) for side in (known.arms, known.longer) for of in side.values()]
        if min(lengths, default=1) < 1:
            raise ValueError(f"{min(lengths)} images")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} cannot be read; delete it to measure again") from error
    return known


def equal_lengths(
    folder: Path, arms: Sequence[Arm], images: int, scratch: Mapping[str, MakeStep] | None = None
) -> EqualTime:
    """How many images each side sees in the time that the first arm needs for `images`; measured once, then read.

    `scratch`: the step of training from scratch, by share of the labels.

    Raises:
        UserError: lengths of another first arm in the folder, or a file that cannot be read.
    """
    known, scratch = known_lengths(folder), scratch or {}
    default, flags = arms[0].name, {arm.name: without_credentials(arm.flags) for arm in arms}
    first = {"ratio": 1.0, "images": images, "flags": flags[default]}
    # Files of an older version lack the flags.
    before = {name: {"flags": own} | known.arms[name] for name, own in flags.items() if name in known.arms}
    if known.arms and {key: value for key, value in before.get(default, {}).items() if key != "survey"} != first:
        what = f"{folder / EQUAL_TIME} is of another first arm, or of other flags or another length of it"
        raise UserError(f"{what}; choose another --run-dir")
    missing = [arm for arm in arms[1:] if arm.name not in before or before[arm.name]["flags"] != flags[arm.name]]
    shares = [share for share in scratch if share not in known.longer]
    if known.arms and not missing and not shares:
        return known
    found = EqualTime(known.arms | {default: first}, dict(known.longer))
    timed = arms[0], *missing
    makers = [pretraining_step(arm.pretrain) for arm in timed] + [scratch[share] for share in shares]
    seconds, others = step_time_ratios(makers)
    surveys = [{"survey": round(took / seconds)} if (took := survey_seconds(arm.pretrain)) else {} for arm in timed]
    found.arms[default] = before.get(default, first | surveys[0])
    total = images + found.arms[default].get("survey", 0)
    for side, (ratio, size), survey in zip((*missing, *shares), others, surveys[1:] + [{}] * len(shares), strict=True):
        length = {"ratio": ratio, "images": size * max(1, round((total - survey.get("survey", 0)) / ratio / size))}
        if isinstance(side, str):
            found.longer[side] = length
        else:
            found.arms[side.name] = length | {"flags": flags[side.name]} | survey
    write_whole(folder / EQUAL_TIME, json.dumps(vars(found), indent=2) + "\n")
    return found


def pretraining_step(config: PretrainConfig) -> MakeStep:
    """The step of a pretraining; its config has no auto left."""

    def make() -> tuple[TrainingRun, Callable[[], None]]:
        device = choose_device(config.train.device, World(), "train.device")
        return endless_step(resolve_init(config, World())[0], device)

    return make


def survey_seconds(config: PretrainConfig) -> float:
    """About how many seconds a run reads all of its images before its first step, by the time of some; 0 where its
    objective does not ask for it. Its config has no auto left."""
    if not config.objective.words:
        return 0.0
    device = choose_device(config.train.device, World(), "train.device")
    run = build(config, World(), device)
    return survey_whole_images(run, surveyed_images(run), dry=True)


def scratch_step(config: FinetuneConfig, labelled: Labelled, encoder: Weights) -> MakeStep:
    """The step of training from scratch on these labels: `encoder` has no weights yet."""

    def make() -> tuple[TrainingRun, Callable[[], None]]:
        device = choose_device(config.train.device, World(), "finetune.train.device")
        # The images that are timed are random ones: none need be decoded.
        data, train = replace(config.data, cache="none"), replace(config.train, length="1M steps")
        plain = replace(config, data=data, train=train, schedule=ScheduleConfig())
        run = build_tuning(plain, labelled, 1e-4, World(), device, encoder)
        run.settle_attention()
        return run, run.endless_updates(training_step(run), (encoder.in_chans, *run.image_hw))

    return make


def step_time_ratios(makers: Sequence[MakeStep]) -> tuple[float, list[tuple[float, int]]]:
    """Seconds per image of the first training step; these of each other over the first's, with its images a step.

    Medians over rounds of all of them. Whole steps as the runs make them, with the optimiser, on images that lie on the
    device.
    """
    sides: dict[int, Callable[[], float]] = {}
    sizes: list[int] = []
    # Each is compiled for itself, however many there are.
    with MEASURING, torch._dynamo.config.patch(recompile_limit=8 * len(makers)):
        for number, make in enumerate(makers):
            run, step = make()
            sizes.append(run.schedule.batch_size)
            seconds_a_call(step, run.device, _WARM_UP)
            calls = calls_lasting(_SAMPLE_SECONDS, step, run.device)
            sides[number] = partial(seconds_a_call, step, run.device, calls)
        taken = in_turns(sides, _ROUNDS)
    torch.compiler.reset()
    per_image = [float(np.median(ratios(taken[i], taken[0]))) * sizes[0] / size for i, size in enumerate(sizes)]
    return float(np.median(taken[0])) / sizes[0], list(zip(per_image, sizes, strict=True))[1:]
