"""What others measured of a pretrained encoder: fine-tuning runs, few-shot tables and studies beside its run folder.

A gain is shown only between fine-tuning runs that differ in nothing but their start.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mpp.config import differences, from_file, to_dict
from mpp.config.files import load_yaml
from mpp.data.sources.base import count
from mpp.data.sources.patterns import shown
from mpp.downstream.estimates import Estimate, estimate, over
from mpp.downstream.fewshot import Readout
from mpp.downstream.finetune_result import INPUTS, Result, from_new_weights, read_result
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.report.page import Section, Table
from mpp.report.settings import PRETRAINED, folder_name
from mpp.report.study_results import StudyResults
from mpp.report.wording import NONE, UNTRAINED, accuracy_text, gain_text, mean_text, percent, shots_text
from mpp.system.files import read_csv

_RANDOM = "random:"


def downstream_section(folder: Path, results: Sequence[Path] = ()) -> Section | None:
    """What was measured of the encoder of a pretraining run; None where nothing is found.

    Args:
        folder: of the run. Folders beside it, the one around it and its study's are searched; what cannot be read is
            left out.
        results: more folders to search.
    """
    parent = folder.absolute().parent
    try:
        siblings = sorted(parent.iterdir())
    except OSError:  # a folder that may be entered but not listed
        siblings = []
    study = folder.absolute().parents[2:3]  # STUDY/pretrain/VARIANT/SEED
    paths = {path.resolve(): path for path in (*siblings, parent, *study, *results) if path.is_dir()}
    paths.pop(folder.resolve(), None)
    runs = [run for path in paths.values() if (run := _read_finetuning(path)) and names_run(run.result.init, folder)]
    tables = _finetuning_tables(runs)
    for path in paths.values():
        tables += _study_tables(path, folder) or _fewshot_table(path, folder)
    reading = (
        "What the pretraining is worth: the same architecture, images, labels and recipe once from scratch and once "
        "from this encoder; the gain is the difference of their test accuracies in points, or of their mean average "
        "precisions where an image has several labels."
    )
    paper = "section 4.6 and appendix B.1.2"
    return Section("downstream", "Downstream", reading, tuple(tables), paper) if tables else None


def names_run(init: str, folder: Path) -> bool:
    """Whether an `init` names the run in `folder`, its model or a checkpoint in it.

    A relative path was written down in a working folder that is not known any more, so it names every folder that ends
    with it.
    """
    path = Path(os.path.normpath(Path(init.removeprefix(_RANDOM)).expanduser()))
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    elif path.name == "model":
        path = path.parent
    if path.is_absolute():
        return path.resolve() == folder.resolve()
    parts = tuple(part for part in path.parts if part != "..")
    return bool(parts) and any(at.parts[-len(parts) :] == parts for at in (folder.absolute(), folder.resolve()))


@dataclass(frozen=True)
class _Finetuning:
    """A finished fine-tuning run."""

    folder: Path
    config: FinetuneConfig
    result: Result
    recipe: Mapping[str, Any]
    """Settings and sizes that two runs must have in common to be compared: all but start and seeds."""
    recipe_of_scratch: Mapping[str, Any]
    """Those of training from scratch beside it."""
    hashes: list[str]
    """Of the images, which must be the same, too; empty in runs of an older version."""

    @property
    def scratch(self) -> bool:
        return self.result.init.startswith(_RANDOM)

    def comparable(self, other: "_Finetuning") -> bool:
        """Whether the two differ in nothing but start, what new weights need, and seeds."""
        same_images = not (self.hashes and other.hashes) or self.hashes == other.hashes
        one, two = self.recipe, other.recipe
        if self.scratch != other.scratch:
            one, two = self.recipe_of_scratch, other.recipe_of_scratch
        return same_images and not differences(FinetuneConfig, one, two)

    @property
    def images(self) -> tuple[str, str]:
        """Their sources, and the share of the labels."""
        data = self.config.data
        source = shown(data.source)
        return f"{source}, tested on {shown(data.test)}" if data.test else source, data.labels


def _read_finetuning(folder: Path) -> _Finetuning | None:
    """The run in a folder; None where there is none that has finished and can be read."""
    try:
        result = read_result(folder)
        if result is None:
            return None
        config = from_file(FinetuneConfig, folder / "config.yaml")
    except UserError:
        return None
    try:
        inputs = json.loads((folder / INPUTS).read_text("utf-8"))
        hashes = [inputs["train"], inputs["test"]]
    except (OSError, ValueError, TypeError, KeyError):  # an older version's run
        hashes = []
    try:
        rates = tuple(sorted(float(row["lr"]) for row in read_csv(folder / "sweep.csv") if row.get("lr")))
    except ValueError:  # no such file
        rates = ()
    train, data = replace(config.train, seed=0), replace(config.data, labels_seed=0)
    fixed = replace(config, init="", train=train, data=data, optim=replace(config.optim, lr=rates or config.optim.lr))
    of_scratch = fixed if result.init.startswith(_RANDOM) else from_new_weights(fixed)
    sizes = [result.steps, result.train_images, result.test_images, result.num_classes, result.mean_ap is not None]
    recipe, recipe_of_scratch = (to_dict(each) | {"sizes": sizes} for each in (fixed, of_scratch))
    return _Finetuning(folder, config, result, recipe, recipe_of_scratch, hashes)


def _finetuning_tables(runs: Sequence[_Finetuning]) -> list[Table]:
    """Scratch beside pretrained for each recipe that has both, and every run."""
    groups: list[list[_Finetuning]] = []
    for run in (run for run in runs if not run.scratch):
        group = next((group for group in groups if group[0].comparable(run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    rows = []
    for pretrained in groups:
        first = pretrained[0]
        if scratch := [run for run in runs if run.scratch and first.comparable(run)]:
            words = ", ".join((first.images[0], f"{first.images[1]} of the labels", first.config.train.length))
            rows.append((words, _accuracy(scratch), _accuracy(pretrained), _gain(scratch, pretrained)))
    tables = []
    if rows:
        caption = (
            "Fine-tuning: test accuracy (mAP: of several labels an image), of several runs the mean ± standard "
            "deviation, of one its 95 % interval over the test images; the gain of pairs of one seed, ± half the width "
            "of its 95 % interval over the fine-tuning seeds of this one pretraining; runs are compared where recipe, "
            "steps, labels and images are the same"
        )
        head = ("images and recipe", "from scratch", "pretrained", "gain in points")
        tables.append(Table(head, tuple(rows), caption))
    if runs:
        head = (
            "run",
            "start",
            "images",
            "labels",
            "length",
            "learning rate",
            "top-1" if all(run.result.mean_ap is None for run in runs) else "result",
        )
        cells = (
            (run.folder.name, "random" if run.scratch else "pretrained", *run.images, run.config.train.length,
             f"{run.result.lr:g}", _score(run.result))
            for run in runs
        )  # fmt: skip
        tables.append(Table(head, tuple(cells), "Fine-tuning runs of this encoder", folded=bool(rows)))
    return tables


def _score(result: Result) -> str:
    if result.mean_ap is None:
        return percent(result.top1)
    return f"{percent(result.mean_ap)} mAP, exact match {percent(result.top1)}"


def _accuracy(runs: Sequence[_Finetuning]) -> str:
    several = " mAP" if runs[0].result.mean_ap is not None else ""
    if len(runs) > 1:
        return f"{_percent(estimate([run.result.figure for run in runs], 'runs'))}{several} ({len(runs)} runs)"
    result = runs[0].result
    within = ""
    if result.figure_interval:
        low, high = result.figure_interval
        within = f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{percent(result.figure)}{several}{within}"


def _gain(scratch: Sequence[_Finetuning], pretrained: Sequence[_Finetuning]) -> str:
    """Of the seeds that both sides have; several runs of one seed, which repeat nothing but it, count as one."""
    top1: list[dict[tuple[int, int], list[float]]] = [{}, {}]
    for by_seed, side in zip(top1, (scratch, pretrained), strict=True):
        for run in side:
            by_seed.setdefault((run.config.train.seed, run.config.data.labels_seed), []).append(run.result.figure)
    gains = [fmean(values) - fmean(top1[0][seed]) for seed, values in top1[1].items() if seed in top1[0]]
    return gain_text(estimate(gains, count(len(gains), "fine-tuning seed"))) if gains else NONE


def _fewshot_table(path: Path, folder: Path) -> list[Table]:
    """The table of the few-shot tool in `path`, where one of its encoders is this run's."""
    rows = [row for row in read_csv(path / "fewshot.csv") if {"model", "shots", "accuracy", "std"} <= row.keys()]
    encoders = {row["model"]: row["model"] for row in rows}
    own = False
    for model in encoders:
        init = model.rpartition(" (")[0]  # "runs/first (mean)" or "random:runs/first (token, layer 3)"
        if names_run(init, folder):
            own = True
            encoders[model] = (UNTRAINED if init.startswith(_RANDOM) else "pretrained") + model[len(init) :]
    if not own:
        return []
    try:
        cells = {
            (encoders[row["model"]], int(row["shots"])): mean_text(float(row["accuracy"]), float(row["std"] or "nan"))
            for row in rows
        }
    except ValueError:
        return []
    shots = sorted({k for _, k in cells})
    body = ((name, *(cells.get((name, k), NONE) for k in shots)) for name in dict.fromkeys(encoders.values()))
    caption = f"Few-shot accuracy on frozen features, {path.name}"
    return [Table(("encoder", *map(shots_text, shots)), tuple(body), caption)]


def _study_tables(path: Path, folder: Path) -> list[Table]:
    """The tables of a study that took this run or made it: its pretraining beside scratch."""
    try:
        content = json.loads((path / "study.json").read_text("utf-8"))
        found = _variant(content, path, folder)
        return [] if found is None else _tables_of_variant(path.resolve().name, StudyResults(content), *found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):  # a file of something else
        return []


def _variant(content: dict[str, Any], path: Path, folder: Path) -> tuple[str, int | None] | None:
    """The study's name of this run's pretraining, and its seed there; None where it is of others."""
    init = load_yaml(path / "config.yaml").get("init") if (path / "config.yaml").is_file() else None
    if init:
        return (PRETRAINED, None) if names_run(str(init), folder) else None
    for run in content["pretraining"]:
        if (path / "pretrain" / folder_name(run["arm"]) / f"seed_{run['seed']}").resolve() == folder.resolve():
            return run["arm"], run["seed"]
    return None


def _tables_of_variant(name: str, whole: StudyResults, variant: str, seed: int | None) -> list[Table]:
    """Of one pretraining alone, with the same figures as the study's own tables."""
    study = whole.of_pretraining(variant, seed)
    shares = list(dict.fromkeys(run["labels"] for run in study.content["finetuning"]))
    tuned = {labels: [study.tuned(side, labels) for side in study.sides] for labels in shares}
    gains = {labels: study.gain(variant, labels) for labels in shares}
    tables = []
    if shares:
        caption = f"Study {name}: test accuracy after fine-tuning"
        if varied := over(each for by in tuned.values() for each in by):
            caption += f", mean ± standard deviation over {varied}"
        if varied := over(gains.values()):
            caption += f"; the gain of the same seeds, ± half the width of its 95 % interval over {varied}"
        head = ("labels", *(side if side == variant else f"from {side}" for side in study.sides), "gain in points")
        rows = ((labels, *map(_percent, tuned[labels]), gain_text(gains[labels])) for labels in shares)
        tables.append(Table(head, tuple(rows), caption))
    if study.encoders:
        readouts = [Readout(side, *reading) for side in study.encoders for reading in study.readings]
        frozen = {of.name: [study.fewshot(of.init, k, (of.layer, of.pool)) for k in study.counts] for of in readouts}
        caption = f"Study {name}: few-shot accuracy on frozen features"
        if varied := over(each for by in frozen.values() for each in by):
            caption += f", mean ± standard deviation over {varied}"
        rows = ((name, *map(_percent, by)) for name, by in frozen.items() if any(by))
        tables.append(Table(("encoder", *map(shots_text, study.counts)), tuple(rows), caption))
    return tables


def _percent(estimate: Estimate | None) -> str:
    return NONE if estimate is None else f"{accuracy_text(estimate)} %"
