"""Figures of a study as text: means with their spread, and gains of one side over another, pair by pair."""

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from mpp.downstream.shots import student_t
from mpp.run_page.wording import NONE, around, points
from mpp.study_recipe import RANDOM, SCRATCH
from results_page.data import Study, Values


def accuracy_text(values: Values) -> str:
    """Mean and standard deviation in percent, "34.2 ± 0.4"; of one value that alone."""
    if not values:
        return NONE
    return around(fmean(values.values()), deviation(values.values())).removesuffix(" %")


def gains(side: Values, other: Values) -> list[float]:
    """side minus other, for every seed that both have."""
    return [side[seed] - other[seed] for seed in side if seed in other]


def gain_text(differences: Sequence[float]) -> str:
    """Mean of paired differences in points, with the half-width of its 95 % interval: "+6.1 ± 0.8".

    The interval is Student's, for the seeds as a sample; one pair has none.
    """
    if not differences:
        return NONE
    half = half_width(differences)
    return points(fmean(differences)) + ("" if half is None else f" ± {100 * half:.1f}")


def half_width(differences: Sequence[float]) -> float | None:
    """Of the 95 % interval of their mean."""
    error = _error(differences)
    return None if error is None else student_t(len(differences) - 1) * error


def mark(differences: Sequence[float]) -> str:
    """An arrow where the mean difference exceeds two standard errors: " ↑", " ↓" or ""."""
    error = _error(differences)
    mean = fmean(differences) if differences else 0.0
    if error is None or abs(mean) <= 2 * error:
        return ""
    return " ↑" if mean > 0 else " ↓"


def _error(differences: Sequence[float]) -> float | None:
    return stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None


def deviation(values: Iterable[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    known = list(values)
    return stdev(known) if len(known) > 1 else 0.0


def finetuning_gains(study: Study, side: str, labels: str, over: str = SCRATCH) -> list[float]:
    """Of a side over another at a share of the labels, pair by pair of seeds."""
    return gains(study.top1(side, labels), study.top1(over, labels))


def last_layer(study: Study) -> int:
    """Of the layers that few-shot read."""
    return max((layer for layer, _ in study.readings), default=-1)


def best_reading(study: Study, side: str, shots: int, pools: Sequence[str] = ()) -> tuple[int, str] | None:
    """(layer, pooling) at which a frozen encoder is read best; None where nothing was measured."""
    found = [
        (fmean(values.values()), reading)
        for reading in study.readings
        if (not pools or reading[1] in pools) and (values := study.fewshot(side, shots, *reading))
    ]
    return max(found)[1] if found else None


def fewshot_gains(study: Study, side: str, shots: int) -> list[float]:
    """Of a side over random initialisation, each read at its best layer and pooling.

    One for each pretraining, of means over the draws of the shots, so that an interval has the spread between
    pretrainings; random is one encoder, the same for all. Of a single pretraining, pair by pair of draws.
    """
    here, there = best_reading(study, side, shots), best_reading(study, RANDOM, shots)
    if here is None or there is None:
        return []
    random = study.fewshot(RANDOM, shots, *there)
    pretrained = study.fewshot_by_pretraining(side, shots, *here)
    if len(pretrained) > 1:
        return [accuracy - fmean(random.values()) for accuracy in pretrained.values()]
    return gains(study.fewshot(side, shots, *here), random)


# What sentences may ask, by the study's name in the template.


def accuracy(study: Study, side: str, labels: str) -> str:
    """Of fine-tuning: "34.2 ± 0.4"."""
    return accuracy_text(study.top1(side, labels))


def gain(study: Study, side: str, labels: str, over: str = SCRATCH) -> str:
    """Of fine-tuning: "+6.1 ± 0.8"."""
    return gain_text(finetuning_gains(study, side, labels, over))


def fewshot(study: Study, side: str, shots: int, layer: int | None = None, pool: str = "mean") -> str:
    """Of frozen features, at the last layer if none is named: "22.4 ± 1.6", over the draws."""
    return accuracy_text(study.fewshot(side, shots, last_layer(study) if layer is None else layer, pool))


def fewshot_gain(study: Study, side: str, shots: int) -> str:
    """Over random initialisation, each at its best layer and pooling: "+2.5 ± 1.1"."""
    return gain_text(fewshot_gains(study, side, shots))


def probe(study: Study, side: str) -> str:
    """Of the linear probe on all labels."""
    return accuracy_text(study.probe(side))


def rank(study: Study, side: str, layer: int) -> str:
    """Effective rank of the mean of the patches, the mean over the pretrainings: "28.6"."""
    values = study.rank(side, layer, "mean").values()
    return f"{fmean(values):.1f}" if values else NONE


def images(study: Study, arm: str) -> str:
    """That the pretraining of an arm saw."""
    runs = study.pretrainings(arm)
    return f"{runs[0]['images']:,}" if runs else NONE


def parameters(study: Study) -> str:
    """Of the default's encoder: "2.7 M"."""
    run = next(iter(study.content["pretraining"]), None)
    return f"{run['parameters'] / 1e6:.1f} M" if run else "unknown"
