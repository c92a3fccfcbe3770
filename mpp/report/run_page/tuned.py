"""The fine-tuning runs of an encoder beside those from scratch; a gain only where nothing but the start differs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpp.config import differences, from_file, to_dict
from mpp.data.sources.base import count
from mpp.data.sources.patterns import shown
from mpp.downstream.account import INPUTS, Result, read_result
from mpp.downstream.estimates import estimate
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.report.page.parts import Table
from mpp.report.run_page.reading import read_csv
from mpp.report.run_page.wording import NONE, accuracy_text, gain_text, listed, percent

RANDOM = "random:"
_NO_GAIN = "no gain where recipe, steps, labels or test images differ, or no seed has both"


@dataclass(frozen=True)
class Tuned:
    """A finished fine-tuning run."""

    folder: Path
    config: FinetuneConfig
    result: Result
    inputs: dict[str, str]
    """Hashes of its training and test images, by "train" and "test"; empty where it left none."""
    rates: tuple[float, ...]
    """The learning rates that were tried."""

    @property
    def scratch(self) -> bool:
        return self.result.init.startswith(RANDOM)

    @property
    def seed(self) -> tuple[int, int]:
        """Of the training and of the choice of labels: what two runs must share to be a pair."""
        return self.config.train.seed, self.config.data.labels_seed

    @property
    def images(self) -> tuple[str, str]:
        """Where they come from, and the share of the labels."""
        data = self.config.data
        source = shown(data.source)
        return f"{source}, tested on {shown(data.test)}" if data.test else source, data.labels

    @property
    def recipe(self) -> dict[str, Any]:
        """Its settings but start and seeds, and what it came to that must be the same on both sides."""
        of, result = self.config, self.result
        fixed = replace(
            of,
            init="",
            train=replace(of.train, seed=0),
            data=replace(of.data, labels_seed=0),
            optim=replace(of.optim, lr=self.rates),
        )
        counts = {"steps": result.steps, "training images": result.train_images, "test images": result.test_images}
        return to_dict(fixed) | counts | {"classes": result.num_classes}


def read_tuned(folder: Path) -> Tuned | None:
    """The run in a folder; None where there is none that has finished and can be read."""
    try:
        result = read_result(folder)
        config = None if result is None else from_file(FinetuneConfig, folder / "config.yaml")
    except UserError:
        return None
    if result is None or config is None:
        return None
    try:
        hashes = json.loads((folder / INPUTS).read_text("utf-8"))
        inputs = {key: str(hashes[key]) for key in ("train", "test")}
    except (OSError, ValueError, TypeError, KeyError):  # of an older version
        inputs = {}
    try:
        tried = sorted(float(row["lr"]) for row in read_csv(folder / "sweep.csv"))
    except (KeyError, ValueError):
        tried = []
    return Tuned(folder, config, result, inputs, tuple(tried) or config.optim.lr)


def tuned_tables(runs: Sequence[Tuned]) -> list[Table]:
    """Both sides of each recipe beside each other, where the images have both, and every run."""
    rows = [row for images in dict.fromkeys(run.images for run in runs) for row in _rows(images, runs)]
    tables = []
    if rows:
        head = ("images and recipe", "from scratch", "pretrained", "gain in points")
        caption = (
            "Fine-tuning: test accuracy, of several runs the mean ± standard deviation, of one its 95 % interval over "
            "the test images; the gain of pairs of one seed, ± half the width of its 95 % interval over the "
            f"fine-tuning seeds of this one pretraining; {_NO_GAIN}"
        )
        tables.append(Table(head, tuple(rows), caption))
    if runs:
        head = ("run", "start", "images", "labels", "length", "learning rate", "top-1")
        cells = (
            (run.folder.name, "random" if run.scratch else "pretrained", *run.images, run.config.train.length,
             f"{run.result.lr:g}", percent(run.result.top1))
            for run in runs
        )  # fmt: skip
        tables.append(Table(head, tuple(cells), "Fine-tuning runs of this encoder", folded=bool(rows)))
    return tables


def _rows(images: tuple[str, str], runs: Sequence[Tuned]) -> list[tuple[str, ...]]:
    """One row a recipe, of images and labels on which both sides were trained."""
    groups: list[list[Tuned]] = []
    for run in (run for run in runs if run.images == images):
        same = next((group for group in groups if not _apart(group[0], run)), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    sides = {run.scratch for group in groups for run in group}
    if len(sides) < 2:
        return []
    apart = {name: at for group in groups[1:] for name, at in _apart(groups[0][0], group[0]).items()}
    rows = []
    for group in groups:
        told = [f"{images[0]}, {images[1]} of the labels, {group[0].config.train.length}"]
        told += [_named(name, group[0]) for name in apart if name != "train.length"]
        scratch, tuned = ([run for run in group if run.scratch is side] for side in (True, False))
        rows.append((listed(told), _side(scratch), _side(tuned), _gain(scratch, tuned)))
    return rows


def _apart(one: Tuned, other: Tuned) -> dict[str, None]:
    """What must be the same for a gain and is not, by name."""
    lines = differences(FinetuneConfig, one.recipe, other.recipe)
    names = [line.partition(": ")[0] for line in lines]
    told = {"train": "training images", "test": "test images"}
    names += [told[key] for key in one.inputs if key in other.inputs and one.inputs[key] != other.inputs[key]]
    return dict.fromkeys(names)


def _named(name: str, run: Tuned) -> str:
    """A setting with its value: "optim.name adamw"."""
    value: Any = run.recipe
    for key in name.split("."):
        value = value[key]
    values = value if isinstance(value, list) else [value]
    told = " ".join(f"{each:g}" if isinstance(each, float) else shown(str(each)) for each in values)
    return f"{name} {told or 'none'}"


def _side(runs: Sequence[Tuned]) -> str:
    if not runs:
        return NONE
    if len(runs) == 1:
        low, high = runs[0].result.interval
        return f"{percent(runs[0].result.top1)} ({100 * low:.1f} to {100 * high:.1f})"
    return f"{accuracy_text(estimate([run.result.top1 for run in runs], 'runs'))} % ({len(runs)} runs)"


def _gain(scratch: Sequence[Tuned], tuned: Sequence[Tuned]) -> str:
    """Of the seeds that both sides have; runs of one seed, which repeat nothing but it, count as one."""
    here, there = ({run.seed: [of.result.top1 for of in side if of.seed == run.seed] for run in side}
                   for side in (tuned, scratch))  # fmt: skip
    gains = [estimate(here[seed], "runs").mean - estimate(there[seed], "runs").mean for seed in here if seed in there]
    return gain_text(estimate(gains, count(len(gains), "fine-tuning seed"))) if gains else NONE
