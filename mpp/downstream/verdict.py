"""What the figures of a run mean, in plain sentences: for the terminal, the report and verdict.json.

figures -> comparisons, each with its 95 % interval -> sentences

A difference is gained or lost where its interval leaves out zero; else no difference is shown.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpp.downstream.estimates import Estimate, estimate, student_t
from mpp.downstream.rankme import collapse
from mpp.system.files import write_whole
from mpp.training.duration import in_words
from mpp.training.rows import evaluation_seconds, last_part, training_spans

FILE = "verdict.json"
MEAN_AP = "mean average precision"
BLUR, TREND = "masked patches", "last quarter"

_EARLIER = "the same model a quarter earlier"
_LEAST_ROWS = 5  # of figures, to tell a slope from noise
_SHORT, _FEW = 1000, 1000  # steps and images below which they are a likely reason for having learnt nothing
_ONE_CLASS = 0.9  # share of the most frequent target from which on the targets are nearly all the same
_FALLEN = 0.01  # part of the loss that has to be gone before it counts as fallen

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One figure of a run against another; a positive difference is the better."""

    what: str
    """Such as "masked patches" or "5 shots"."""
    against: str
    difference: float
    """Of two shares, 0 to 1; of squared errors, as a part of the other."""
    half: float | None
    """Half the width of its 95 % interval; None where nothing was repeated."""
    over: str = ""
    """What the interval is over."""

    @property
    def outcome(self) -> str:
        """gained, lost, no difference shown, or not known: without an interval."""
        if self.half is None:
            return "not known"
        if abs(self.difference) <= self.half:
            return "no difference shown"
        return "gained" if self.difference > 0 else "lost"

    @property
    def points(self) -> str:
        """The difference in percentage points, such as "+6.1 ± 0.8"."""
        return f"{_signed(self.difference)}{_plus_minus(self.half)}"


@dataclass(frozen=True)
class Verdict:
    """What a run's figures mean."""

    sentences: tuple[str, ...]
    """A command follows on a line of its own."""
    comparisons: tuple[Comparison, ...] = ()

    def lines(self) -> list[str]:
        """The sentences for a terminal; none where there are none."""
        if not self.sentences:
            return []
        lines = ["What the figures mean:"]
        for sentence in self.sentences:
            words, *commands = sentence.split("\n")  # to copy a command, it has to be on one line
            lines += textwrap.wrap(words, 110, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
            lines += [f"    {command}" for command in commands]
        return [*lines, ""]

    def write(self, folder: Path, notes: Sequence[str] = ()) -> None:
        """Writes verdict.json, with the notes that the run ends with."""
        comparisons = [{**asdict(each), "outcome": each.outcome} for each in self.comparisons]
        content = {"sentences": list(self.sentences), "notes": list(notes), "comparisons": comparisons}
        write_whole(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def of_pretraining(
    rows: Sequence[Row], score: str, *, images: int | None = None, init: str = "", warning: str = ""
) -> Verdict:
    """Says what a pretraining has learnt, from the rows of its metrics.jsonl.

    Args:
        score: accuracy (of colours) or mse (of pixels).
        images: how many it trains on, where that is known.
        init: the weights that it went on from, if any.
        warning: of the survey of its targets, if they are nearly all the same.
    """
    sentences, comparisons = list[str](), list[Comparison]()
    own = f"{score}_masked" if any(f"{score}_masked" in row for row in rows) else score
    blur = f"{score}_baseline_neighbours"
    trained = [row for row in rows if _finite(row, own, blur)]
    if trained:
        last, span = last_part(trained, score)
        steps = np.array([row["step"] for row in trained], dtype=np.float64)
        sign, whole = (1, 1.0) if score == "accuracy" else (-1, last[blur] or 1.0)
        margins = sign * np.array([row[own] - row[blur] for row in trained]) / whole
        trend = _trend(steps, margins)
        gap = sign * (last[own] - last[blur]) / whole
        noise = None if trend is None else trend.noise / math.sqrt(np.count_nonzero(steps > steps[-1] - span))
        against_blur = Comparison(BLUR, "nearest visible patches", gap, noise, "rows of figures")
        above = against_blur.outcome == "gained" or (noise is None and gap > 0)
        where = "masked patches" if own != score else "corrupted patches"
        sentences.append(_against_blur(against_blur, above, score, last[own], last[blur], where))
        comparisons.append(against_blur)
        if not above:
            sentences.append(_reasons(rows, steps, gap, trend, score, images, warning))
        if trend is not None:
            unit = "points against the blur" if score == "accuracy" else "% of the blur's error"
            comparison = Comparison(TREND, _EARLIER, trend.gain, trend.half, "rows of figures")
            sentences.append(_at_the_end(comparison, rows, unit))
            comparisons.append(comparison)
    if collapsed := collapse(rows):
        sentences.append(collapsed)
    shots = _fewshot(rows, "the weights it began with" if init else "the untrained encoder")
    if shots:
        each = ", ".join(f"{of.what} {of.points}" + ("" if of.half is None else f" ({of.outcome})") for of in shots)
        alone = f"without an interval: {shots[0].over}"
        over = f"95% intervals over {shots[0].over}, the same for both" if shots[0].half is not None else alone
        sentences.append(f"Few-shot accuracy against {shots[0].against}, in points: {each}; {over}.")
    return Verdict(tuple(sentences), (*comparisons, *shots))


@dataclass(frozen=True)
class _Trend:
    """A straight line through the last quarter of a curve; its half-width is that of a 95 % interval."""

    slope: float
    """By step."""
    gain: float
    half: float
    """Of the gain over a quarter of the run."""
    noise: float
    """Half the width of a 95 % interval of one row."""


def _trend(steps: np.ndarray, values: np.ndarray) -> _Trend | None:
    """Fits the last quarter, or the last few rows where it has fewer and they lie in the last half; else None."""
    first = max(0, min(int(np.searchsorted(steps, 0.75 * steps[-1])), len(steps) - _LEAST_ROWS))
    x, y = steps[first:], values[first:]
    if len(x) < _LEAST_ROWS or x[0] < 0.5 * steps[-1]:
        return None
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    left = y - y.mean() - slope * x
    deviation, t = math.sqrt(float(left @ left) / (len(x) - 2)), student_t(len(x) - 2)
    quarter = steps[-1] / 4
    half = t * deviation / math.sqrt(float(x @ x)) * quarter
    return _Trend(slope, float(slope * quarter), float(half), t * deviation)


def _against_blur(of: Comparison, above: bool, score: str, own: float, blur: float, where: str) -> str:
    trivial = "the mean colour of the nearest visible patches"
    if score == "accuracy":
        change = f"{of.points} points"
        change += f", {of.difference / (1 - blur):.0%} of the way from there to 100%" if above and blur < 1 else ""
        figures = f"at {where} it names the right colour in {own:.1%}, {trivial} in {blur:.1%}: {change}"
    else:
        change = f"{_signed(-of.difference)}{_plus_minus(of.half)} %"
        figures = f"its squared error at {where} is {own:.4g}, that of {trivial} {blur:.4g}: {change}"
    if of.half is None:
        figures += " (too few rows of figures for an interval)"
    elif of.outcome == "no difference shown":
        figures += " (no difference shown)"
    return f"It has learnt {'what' if above else 'nothing yet that'} a blur does not know: {figures}."


def _reasons(
    rows: Sequence[Row],
    steps: np.ndarray,
    gap: float,
    trend: _Trend | None,
    score: str,
    images: int | None,
    warning: str,
) -> str:
    """Why nothing was learnt, as far as the figures tell, the likeliest first."""
    total, found = int(steps[-1]), list[str]()
    last, _ = last_part([row for row in rows if _finite(row, score)], score)
    frequent = last.get(f"{score}_baseline_frequent", 0.0)
    one_class = score == "accuracy" and frequent > _ONE_CLASS
    if warning or one_class:
        same = f" (one class makes {frequent:.0%} of them)" if one_class else ""
        found.append(f"nearly all targets are the same{same}, as with wrongly scaled images, so look at the pictures")
    if trend is not None and trend.gain > trend.half and gap >= 0:
        found.append("too short: it has drawn level, and still improved at its end")
    elif trend is not None and trend.gain > trend.half:
        more = -gap / trend.slope
        found.append(
            f"too short: at the slope of its last quarter it needs {more:,.0f} more steps to draw level, "
            f"{1 + more / total:.1f} times its {total:,} in all, and curves flatten"
        )
    elif total < _SHORT:
        found.append(f"too short: it made {total:,} steps")
    losses = [(row["step"], row["loss"]) for row in rows if _finite(row, "loss")]
    if losses:
        at, loss = np.array(losses, dtype=np.float64).T
        of_loss = _trend(at, loss)
        if of_loss is not None and of_loss.gain > of_loss.half:
            found.append("a learning rate that is too high: the loss rises at the end, so try a third of --optim.lr")
        elif len(loss) > 1 and loss[-1] > (1 - _FALLEN) * loss[0]:
            found.append(
                f"a learning rate that is too low, or much too high: the loss has hardly fallen ({loss[0]:.4g} to "
                f"{loss[-1]:.4g}), so try three times and a third of --optim.lr"
            )
    if images is not None and images < _FEW:
        found.append(f"too few images: {images:,}, so add some, or go on from pretrained weights (--init)")
    if not found:
        return (
            "The figures do not say why. In this order, try a longer run, another learning rate (three times, and a "
            "third of it), and look whether the pictures show images that are wrongly scaled."
        )
    numbered = "; ".join(f"({number}) {reason}" for number, reason in enumerate(found, 1))
    return f"Likely why, the likeliest first: {numbered}."


def _at_the_end(of: Comparison, rows: Sequence[Row], unit: str) -> str:
    change = f"({of.points} {unit} over its last quarter)"
    if of.outcome == "lost":
        return f"It got worse at its end {change}."
    if of.outcome != "gained":
        return f"Whether it still improved at its end is not shown {change}."
    seconds = sum(spent for _, spent in training_spans(rows))
    seconds += evaluation_seconds(rows)
    cost = f" A run of twice the length would take about {in_words(2 * seconds)} at this speed." if seconds else ""
    return f"It still improved at its end {change}.{cost}"


def _fewshot(rows: Sequence[Row], against: str) -> list[Comparison]:
    """The last evaluation against that of step 0, draw by draw; none where either is missing."""
    evaluated = [row for row in rows if any(name.startswith("fewshot/") for name in row)]
    if len(evaluated) < 2 or evaluated[0]["step"] or not evaluated[-1]["step"]:
        return []
    first, final = evaluated[0], evaluated[-1]
    names = [name for name in final if name.startswith("fewshot/") and name.endswith("shot") and name in first]
    found = []
    for name in sorted(names, key=lambda name: int(name[len("fewshot/") : -len("shot")])):
        shots = int(name[len("fewshot/") : -len("shot")])
        before, after = (row.get(f"{name}_draws") for row in (first, final))
        if before and after and len(before) == len(after) > 1:
            gain = estimate([b - a for a, b in zip(before, after, strict=True)], f"{len(after)} draws of the shots")
        else:
            several = bool(final.get(f"{name}_std"))
            over = "this run did not keep the single draws" if several else "one draw of the shots; --fewshot.seeds"
            gain = Estimate(final[name] - first[name], None, None, over if several else f"{over} takes more")
        found.append(Comparison(f"{shots} shot{'s' * (shots > 1)}", against, gain.mean, gain.half, gain.over))
    return found


def of_finetuning(
    figure: float,
    interval: tuple[float, float] | None,
    images: int,
    trivial: float | None,
    *,
    several: bool = False,
    rows: Sequence[Row] = (),
    scratch: Comparison | None = None,
    scratch_command: str = "",
) -> Verdict:
    """Says what a fine-tuning is worth.

    Args:
        figure, interval: top-1 accuracy on `images` test images, and its 95 % interval; None: not known.
        trivial: accuracy of always answering the most frequent class of the training images; None: not known.
        several: labels an image: the figures are mean average precisions, the trivial one that of giving every image
            each class's share of the images.
        rows: of its metrics.jsonl.
        scratch: against the same training from scratch, if there is one.
        scratch_command: that trains it, if there is none; empty: for a training that is from scratch itself.
    """
    sentences, comparisons = list[str](), list[Comparison]()
    if trivial is not None:
        half = None if interval is None else figure - interval[0] if figure > trivial else interval[1] - figure
        what, against = (MEAN_AP, "share of each class") if several else ("top-1", "most frequent class")
        comparison = Comparison(what, against, figure - trivial, half, "test images")
        word = {"gained": "Better", "lost": "Worse"}.get(comparison.outcome, "Not shown to be better")
        than = "always answering the most frequent class, which is right in"
        if several:
            than = "giving every image each class's share of the images, whose mean average precision is"
        within = f", 95% interval {interval[0]:.1%} to {interval[1]:.1%}" if interval else ", without an interval"
        on = f"{figure:.1%} {'on' if several else 'of'} {images:,} test images"
        sentences.append(f"{word} than {than} {trivial:.1%}: {on}{within}.")
        comparisons.append(comparison)
    if scratch is not None:
        sentences.append(
            f"Against the same training from scratch ({scratch.against}): {scratch.points} points "
            f"({scratch.outcome}); 95% interval over {scratch.over}, with one seed each."
        )
        comparisons.append(scratch)
    elif scratch_command:
        sentences.append(
            "Whether the weights that it started from helped is not known: there is no such training from scratch "
            f"beside it. This makes one:\n{scratch_command}"
        )
    name = "test/mean_ap" if several else "test/top1"
    if tested := [(row["step"], row[name]) for row in rows if _finite(row, name)]:
        steps, accuracy = np.array(tested, dtype=np.float64).T
        trend = _trend(steps, accuracy)
        if trend is not None:
            comparison = Comparison(TREND, _EARLIER, trend.gain, trend.half, "evaluations")
            sentences.append(_at_the_end(comparison, rows, f"points of {MEAN_AP if several else 'test accuracy'}"))
            comparisons.append(comparison)
    return Verdict(tuple(sentences), tuple(comparisons))


def paired(
    own: Mapping[str, float], other: Mapping[str, float], against: str, what: str = "top-1"
) -> Comparison | None:
    """Compares two classifiers on the same test images by a value of each, such as whether it is right; None: other
    images."""
    if own.keys() != other.keys() or len(own) < 2:
        return None
    gain = estimate([float(own[key]) - float(other[key]) for key in own], f"{len(own):,} test images")
    return Comparison(what, against, gain.mean, gain.half, gain.over)


def _finite(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), int | float) and math.isfinite(row[name]) for name in names)


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "\u2212")


def _plus_minus(half: float | None) -> str:
    return "" if half is None else f" ± {100 * half:.1f}"
