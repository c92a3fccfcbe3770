"""Figures and names of a study as text, for the sentences of the template and for tables and charts."""

import re

from mpp.report.settings import LONGER, RANDOM, SCRATCH
from mpp.report.wording import NONE, accuracy_text, gain_text
from results_page.data import Study

_SIDES = {SCRATCH: "from scratch", LONGER: "from scratch, longer", RANDOM: "random initialisation"}
_MARKUP = re.compile(r"([\\`*_~\[\]<>&])")  # tables escape the stroke


def side_name(side: str) -> str:
    """A side in words."""
    return _SIDES.get(side, side)


def side_markdown(side: str) -> str:
    r"""A side in words within Markdown: "[mask] late" -> "\[mask\] late", which is no link."""
    return _MARKUP.sub(r"\\\1", side_name(side))


def accuracy(study: Study, side: str, labels: str) -> str:
    """Of fine-tuning: "34.2 ± 0.4"."""
    return accuracy_text(study.tuned(side, labels))


def gain(study: Study, side: str, labels: str, over: str = SCRATCH) -> str:
    """Of fine-tuning: "+6.1 ± 0.8"."""
    return gain_text(study.gain(side, labels, over))


def fewshot(study: Study, side: str, shots: int, layer: int | None = None, pool: str = "") -> str:
    """Of frozen features, the mean of the patches at the last layer if nothing is named: "22.4 ± 1.6"."""
    usual = study.reading
    return accuracy_text(study.fewshot(side, shots, (usual[0] if layer is None else layer, pool or usual[1])))


def fewshot_gain(study: Study, side: str, shots: int, over: str = RANDOM) -> str:
    """Of the mean of the patches at the last layer: "+2.5 ± 1.1"."""
    return gain_text(study.fewshot_gain(side, shots, over))


def probe(study: Study, side: str) -> str:
    """Of the linear probe on all labels."""
    return accuracy_text(study.probe(side))


def probe_chosen(study: Study, side: str) -> str:
    """Of the linear probe at the layer and pooling that held-out training images chose."""
    return accuracy_text(study.probe_chosen(side))


def fewshot_chosen(study: Study, side: str, shots: int) -> str:
    """Of frozen features, at the layer and pooling that each draw chose by its shots."""
    return accuracy_text(study.fewshot_chosen(side, shots))


def rank(study: Study, side: str, layer: int) -> str:
    """Effective rank of the mean of the patches, the mean over the pretrainings: "28.6"."""
    return rank_text(study.rank(side, (layer, "mean")))


def rank_text(of: float | None) -> str:
    return NONE if of is None else f"{of:.1f}"


def images(study: Study, arm: str) -> str:
    """That the pretraining of an arm saw."""
    runs = study.pretrainings(arm)
    return f"{runs[0]['images']:,}" if runs else NONE


def parameters(study: Study) -> str:
    """Of the default's encoder: "2.7 M"."""
    run = next(iter(study.content["pretraining"]), None)
    return f"{run['parameters'] / 1e6:.1f} M" if run else "unknown"
