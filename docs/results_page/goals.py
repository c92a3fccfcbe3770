"""What the project set out to reach, and what of it the studies have."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mpp.run_page.wording import NONE, points
from mpp.study_recipe import SCRATCH
from results_page.data import Study
from results_page.figures import fewshot_gains, finetuning_gains, gain_text
from results_page.wording import shown

FINETUNING = {"100%": 0.04, "10%": 0.08, "1%": 0.10}
"""Gain over training from scratch by share of the labels."""
SHOTS, FEWSHOT = 10, 0.10
"""Gain of the frozen encoder over random initialisation."""
SCARCE = "1%"
"""Share of the labels at which better pretraining is compared with the default."""
TIMES, TIME = 2.0, 0.5
"""Better than the default: so many times its gain, or its gain in such a share of its device time."""
_SLACK = 0.02  # lengths are whole steps


@dataclass(frozen=True)
class Against:
    """A better pretraining against the study's default."""

    arm: str
    gain: float
    """Over training from scratch, on average."""
    usual: float
    """That of the default."""
    time: float
    """Of the device time, as a share of the default's."""

    @property
    def times(self) -> float | None:
        """Share of the default's gain; None where that is nothing to be compared with."""
        return self.gain / self.usual if self.usual > 0 else None


def chosen(study: Study) -> str | None:
    """The arm that stands for the study: of the largest gain on average over the shares of the labels."""
    found = []
    for arm in study.arms:
        differences = [finetuning_gains(study, arm, labels) for labels in study.labels]
        if all(differences):
            found.append((fmean(map(fmean, differences)), arm))
    return max(found)[1] if found else None


def goal_rows(studies: list[Study]) -> list[list[str]]:
    """One row a goal: what it asks, and for each study what was measured with a verdict.

    Args:
        studies: of kind "benefit" and "best"; each answers the goals that it can.
    """
    asked = {
        f"{points(goal)} points over scratch at {labels} of the labels": (labels, goal)
        for labels, goal in FINETUNING.items()
    }
    rows = [[name, *(_finetuned(study, *goal) for study in studies)] for name, goal in asked.items()]
    shots = f"{points(FEWSHOT)} points over random initialisation in few-shot, {SHOTS} images per class"
    rows.append([shots, *(_fewshot(study) for study in studies)])
    never = "never below scratch in as many steps, at any share and seed"
    rows.append([never, *(_never_below(study) for study in studies)])
    double = f"{TIMES:g} times the default's gain at {SCARCE} of the labels in the same device time"
    half = f"or the default's gain there in {TIME:.0%} of its device time"
    rows.append([double, *(_better(study, TIMES, 1.0) for study in studies)])
    rows.append([half, *(_better(study, 1.0, TIME) for study in studies)])
    return rows


def against_default(study: Study, labels: str) -> list[Against]:
    """Every arm but the first, at a share of the labels; none before the default is measured there."""
    default, *others = study.arms
    usual = finetuning_gains(study, default, labels)
    measured = {arm: finetuning_gains(study, arm, labels) for arm in others}
    return [
        Against(arm, fmean(differences), fmean(usual), time_share(study, arm))
        for arm, differences in measured.items()
        if differences and usual
    ]


def times(study: Study, arm: str, labels: str) -> str:
    """The gain of an arm over scratch as a multiple of the default's: "2.2"; "-" where the default gains nothing."""
    (against,) = (each for each in against_default(study, labels) if each.arm == arm)
    return NONE if against.times is None else f"{against.times:.1f}"


def time_share(study: Study, arm: str) -> float:
    """Device time of an arm's pretraining as a share of the default's.

    By the ratio of step times that the study measured side by side, where there is one; else by the runs' own clocks.
    """
    here, usual = study.pretrainings(arm), study.pretrainings(study.arms[0])
    if not here or not usual:
        return float("nan")
    return step_time(study, arm) * here[0]["images"] / usual[0]["images"]


def step_time(study: Study, arm: str) -> float:
    """Time of an arm's training image as a share of the default's; NaN where it was not pretrained here."""
    if study.content["equal_time"]:
        return study.content["equal_time"]["arms"][arm]["ratio"]
    here, usual = (
        [run["seconds"] / run["images"] for run in study.pretrainings(name)] for name in (arm, study.arms[0])
    )
    return fmean(here) / fmean(usual) if here and usual else float("nan")


def _verdict(study: Study, met: bool) -> str:
    """What is still to be measured can turn a mean about."""
    if not study.finished:
        return "still runs"
    return "**met**" if met else "not met"


def _finetuned(study: Study, labels: str, goal: float) -> str:
    arm = chosen(study)
    if study.kind != "benefit" or arm is None or labels not in study.labels:
        return NONE
    return _against(study, finetuning_gains(study, arm, labels), goal)


def _fewshot(study: Study) -> str:
    arm = chosen(study)
    differences = [] if arm is None else fewshot_gains(study, arm, SHOTS)
    if study.kind != "benefit" or not differences:
        return NONE
    return _against(study, differences, FEWSHOT)


def _against(study: Study, differences: Sequence[float], goal: float) -> str:
    """Their mean and whether it reaches the goal; with a digit more where rounding would say that it does."""
    mean = fmean(differences)
    exactly = f" ({100 * mean:.2f})" if mean < goal and points(mean) == points(goal) else ""
    return f"{gain_text(differences)}{exactly}: {_verdict(study, mean >= goal)}"


def _never_below(study: Study) -> str:
    arm = chosen(study)
    if study.kind != "benefit" or arm is None:
        return NONE
    pairs = [
        (value - study.top1(SCRATCH, labels)[seed], labels, seed)
        for labels in study.labels
        for seed, value in study.top1(arm, labels).items()
        if seed in study.top1(SCRATCH, labels)
    ]
    lowest, labels, seed = min(pairs)
    return f"lowest {points(lowest)} ({labels}, seed {seed}): {_verdict(study, lowest >= 0)}"


def _better(study: Study, gain: float, time: float) -> str:
    """The best arm of those that took no more than a share of the default's time.

    Where the default gains nothing, whatever gains anything at all has more than a multiple of that.
    """
    if study.kind != "best" or SCARCE not in study.labels or not study.arms:
        return NONE
    quick = [arm for arm in against_default(study, SCARCE) if arm.time <= time + _SLACK]
    if not quick:
        return NONE
    best = max(quick, key=lambda arm: arm.gain)
    within = f"in {best.time:.0%} of the time ({shown(best.arm)})"
    if best.times is None:
        arm = f"the best arm {points(best.gain)} {within}: {_verdict(study, best.gain > 0)}"
        return f"the default gains nothing ({points(best.usual)}), {arm}"
    return f"{best.times:.2f} times {within}: {_verdict(study, best.times >= gain)}"
