"""What the project set out to reach, and what of it the studies have."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mpp.downstream.estimates import Estimate
from mpp.report.wording import NONE, gain_text, points
from results_page.data import Study
from results_page.figures import side_markdown

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
    """The arm that stands for the study: of the best accuracy on held-out training images, by which it chose its
    learning rate. None where several arms have no such figure: test images choose none."""
    if len(study.arms) == 1:
        return study.arms[0]
    held_out = {arm: accuracy for arm in study.arms if (accuracy := study.held_out(arm)) is not None}
    return max(held_out, key=lambda arm: held_out[arm]) if held_out.keys() == set(study.arms) else None


def headline_arms(study: Study) -> list[str]:
    """The arms that the headline and the goals tell of: the chosen one, or all."""
    arm = chosen(study)
    return study.arms if arm is None else [arm]


Column = tuple[Study, str | None]
"""A study and one of its arms; None of a study whose arms are compared with each other."""


def columns(studies: Sequence[Study]) -> list[Column]:
    """Of the table of goals: those that can answer one, of several seeds."""
    able = [study for study in studies if study.kind in ("benefit", "best") and len(study.config["seeds"]) > 1]
    return [(study, arm) for study in able for arm in (headline_arms(study) if study.kind == "benefit" else [None])]


def goal_rows(columns: Sequence[Column]) -> list[list[str]]:
    """One row a goal: what it asks, and for each column what was measured with a verdict."""
    asked = {
        f"{points(goal)} points over scratch at {labels} of the labels": (labels, goal)
        for labels, goal in FINETUNING.items()
    }
    rows = [[name, *(_finetuned(*column, *goal) for column in columns)] for name, goal in asked.items()]
    shots = f"{points(FEWSHOT)} points over random initialisation in few-shot, {SHOTS} images per class"
    rows.append([shots, *(_fewshot(*column) for column in columns)])
    never = "never below scratch in as many steps, at any share and seed"
    rows.append([never, *(_never_below(*column) for column in columns)])
    double = f"{TIMES:g} times the default's gain at {SCARCE} of the labels in the same device time"
    half = f"or the default's gain there in {TIME:.0%} of its device time"
    rows.append([double, *(_better(study, arm, TIMES, 1.0) for study, arm in columns)])
    rows.append([half, *(_better(study, arm, 1.0, TIME) for study, arm in columns)])
    return rows


def against_default(study: Study, labels: str) -> list[Against]:
    """Every arm but the first, at a share of the labels; none before the default is measured there."""
    default, *others = study.arms
    usual = study.gain(default, labels)
    measured = {arm: study.gain(arm, labels) for arm in others}
    return [
        Against(arm, gained.mean, usual.mean, time_share(study, arm))
        for arm, gained in measured.items()
        if gained is not None and usual is not None
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


def _finetuned(study: Study, arm: str | None, labels: str, goal: float) -> str:
    if arm is None or labels not in study.labels:
        return NONE
    return _against(study, study.gain(arm, labels), goal)


def _fewshot(study: Study, arm: str | None) -> str:
    return NONE if arm is None else _against(study, study.fewshot_gain(arm, SHOTS), FEWSHOT)


def _against(study: Study, gained: Estimate | None, goal: float) -> str:
    """The mean and whether it reaches the goal; with a digit more where rounding would say that it does."""
    if gained is None:
        return NONE
    mean = gained.mean
    exactly = f" ({100 * mean:.2f})" if mean < goal and points(mean) == points(goal) else ""
    return f"{gain_text(gained)}{exactly}: {_verdict(study, mean >= goal)}"


def _never_below(study: Study, arm: str | None) -> str:
    if arm is None:
        return NONE
    pairs = [(gained, labels, seed) for labels in study.labels for seed, gained in study.gains(arm, labels).items()]
    if not pairs:
        return NONE
    lowest, labels, seed = min(pairs)
    return f"lowest {points(lowest)} ({labels}, seed {seed}): {_verdict(study, lowest >= 0)}"


def _better(study: Study, arm: str | None, gain: float, time: float) -> str:
    """Every arm that took no more than a share of the default's time, each with its verdict: none is picked out.

    Where the default gains nothing, whatever gains anything at all has more than a multiple of that.
    """
    if arm is not None or SCARCE not in study.labels or not study.arms:
        return NONE
    quick = [each for each in against_default(study, SCARCE) if each.time <= time + _SLACK]
    if not quick:
        return NONE
    verdicts = [
        f"{side_markdown(each.arm)} {points(each.gain) if each.times is None else f'{each.times:.2f} times'} "
        f"(in {each.time:.0%} of the time): "
        f"{_verdict(study, each.gain > 0 if each.times is None else each.times >= gain)}"
        for each in quick
    ]
    nothing = f"the default gains nothing ({points(quick[0].usual)}); " if quick[0].times is None else ""
    return nothing + "; ".join(verdicts)
