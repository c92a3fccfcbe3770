"""Charts of a study, in the house's manner: text as text, on a white card that light and dark pages show alike."""

from collections.abc import Iterable, Mapping

import numpy as np

from mpp.downstream.estimates import Estimate
from mpp.report.charts import Line, line_chart
from mpp.report.html import pictures_of
from mpp.report.page import Page, Picture, Section
from mpp.report.settings import RANDOM, folder_name
from mpp.report.wording import percent, points
from results_page.data import Study
from results_page.figures import side_name
from results_page.tables import series


def pictures(study: Study) -> list[Picture]:
    """What the page shows of a study, by its kind; none where nothing has been measured yet."""
    made = {"benefit": _benefit, "length": _length}.get(study.kind)
    return made(study) if made else []


def layer_pictures(study: Study) -> list[Picture]:
    """What the page shows of a study's layers and poolings; none where it read one of them alone."""
    return [_layers(study, arm) for arm in study.arms] if study.compares_readings else []


def files(shown: Iterable[Picture]) -> Mapping[str, str]:
    """Each picture as an SVG file by its name. It names the matplotlib that drew it: others place letters otherwise."""
    from matplotlib import __version__

    page = Page("Results", "", (Section("results", "Results", "", tuple(shown)),))
    return {name: f"{drawn}\n<!-- matplotlib {__version__} -->\n" for name, drawn in pictures_of(page)}


def _benefit(study: Study) -> list[Picture]:
    """Accuracy against the labelled images, one line a side; none of a single share, which has no lines."""
    images = study.labelled_images
    if len(images) < 2:
        return []
    sides = {side: {label: study.tuned(side, label) for label in images} for side in study.sides}
    lines = [_line(side_name(side), {images[label]: of for label, of in by.items()}) for side, by in sides.items()]
    words = [
        f"{side_name(side)} " + ", ".join(f"{percent(of.mean)} at {label}" for label, of in by.items() if of)
        for side, by in sides.items()
    ]
    alt = f"Test accuracy after fine-tuning, {study.name}: {'; '.join(words)}."
    x, y = "labelled training images", "test accuracy"
    return [line_chart(study.name, alt, lines, x=x, y=y, percent_y=True, log_x=True, markers=True)]


def _line(name: str, measured: Mapping[int, Estimate | None], colour: int | None = None, dashed: bool = False) -> Line:
    """Means with a band of one standard deviation, which a dashed line has not; a gap where nothing was measured."""
    x = sorted(measured)
    y, spread = (_shares(getattr(measured[at], part, None) for at in x) for part in ("mean", "spread"))
    return Line(name, np.array(x, dtype=np.float64), y, None if dashed else spread, dashed, colour)


def _shares(values: Iterable[float | None]) -> np.ndarray:
    """NaN for None, which is not drawn."""
    return np.array([np.nan if value is None else value for value in values])


def _length(study: Study) -> list[Picture]:
    """Gain against the images of the pretraining: of each objective a line a share of the labels, one of few-shot."""
    lines, words = [], []
    for objective, arms in series(study).items():
        of = f"{objective}: " if objective else ""
        measured = {
            f"{of}{labels} of the labels": {seen: study.gain(arm, labels) for seen, arm in arms}
            for labels in study.labels
        }
        frozen = f"{of}frozen, {study.shots} shots"
        measured[frozen] = {seen: study.fewshot_gain(arm, study.shots) for seen, arm in arms}
        for name, by in measured.items():
            known = {seen: gained for seen, gained in by.items() if gained is not None}
            if known:
                lines.append(_gains_line(name, known, dashed=name == frozen))
                means = ", ".join(f"{points(gained.mean)} at {seen:,}" for seen, gained in known.items())
                words.append(f"{name} {means}")
    if not lines:
        return []
    alt = f"Gain in points against images of pretraining, {study.name}: {'; '.join(words)}."
    x, y = "images of pretraining", "gain (points)"
    return [line_chart(study.name, alt, lines, x=x, y=y, log_x=True, markers=True)]


def _gains_line(name: str, by: Mapping[int, Estimate], dashed: bool) -> Line:
    """Mean gains in points with a band of their 95 % intervals, where they have one."""
    y, half = (_shares(getattr(gained, part) for gained in by.values()) for part in ("mean", "half"))
    return Line(name, np.array(list(by), dtype=np.float64), 100 * y, 100 * half, dashed=dashed)


def _layers(study: Study, arm: str) -> Picture:
    """Few-shot accuracy against the layer, one line a pooling."""
    pools = list(dict.fromkeys(pool for _, pool in study.readings))
    layers = list(dict.fromkeys(layer for layer, _ in study.readings))
    lines, words = [], []
    for name, side in (("pretrained", arm), ("random", RANDOM)):
        for colour, pool in enumerate(pools):
            by = {layer: study.fewshot(side, study.shots, (layer, pool)) for layer in layers}
            known = {layer: of for layer, of in by.items() if of is not None}
            if known:
                lines.append(_line(f"{name}, {pool}", by, colour, dashed=side == RANDOM))
                ends = (f"{percent(known[layer].mean)} at layer {layer}" for layer in (min(known), max(known)))
                words.append(f"{name}, {pool}, {' and '.join(dict.fromkeys(ends))}")
    number = f"{study.shots} shot{'s' * (study.shots > 1)}"
    alt = f"Few-shot accuracy by layer, {number}, {arm}, {study.name}; the ends of each line: {'; '.join(words)}."
    name, y = f"{study.name}_layers_{folder_name(arm)}", f"accuracy, {number}"
    return line_chart(name, alt, lines, x="layer, \u22121 the last", y=y, caption=arm, percent_y=True, markers=True)
