"""The data file of a study: copied once from its folder, and what the page asks of it.

Accuracies are shares, 0 to 1. What was measured once for each seed is a mapping from that seed, so that two sides can
be compared pair by pair.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mpp.errors import UserError
from mpp.files import write_whole
from mpp.study_recipe import LONGER, RANDOM, SCRATCH

SCHEMA = 1
KINDS = ("benefit", "ablation", "length", "best", "continue")
"""What the name of a study begins with; each has a section of the page."""

Values = Mapping[Any, float]
"""One figure for each seed (of fine-tuning, of pretraining, of the draw of the shots)."""


@dataclass(frozen=True)
class Study:
    """One study, finished or not."""

    name: str
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.name.partition("_")[0]

    @property
    def finished(self) -> bool:
        return self.content["finished"]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.content["config"]

    @property
    def labels(self) -> Sequence[str]:
        """Shares of the labels, fewest images first; those that no run has had yet come last."""
        images = self.labelled_images
        return sorted(self.config["labels"], key=lambda labels: images.get(labels, math.inf))

    @property
    def labelled_images(self) -> Mapping[str, int]:
        """How many images a share of the labels is; of those that some run has had."""
        return {run["labels"]: run["train_images"] for run in self.content["finetuning"]}

    @property
    def arms(self) -> list[str]:
        """Pretrained sides in the study's order; the first is the default that others are compared with."""
        named = [run["arm"] for run in self.content["pretraining"]]
        named += [run["side"] for key in ("finetuning", "fewshot") for run in self.content[key]]
        return [name for name in dict.fromkeys(named) if name not in (SCRATCH, LONGER, RANDOM)]

    @property
    def sides(self) -> list[str]:
        """All that was fine-tuned, in the page's order."""
        tuned = {run["side"] for run in self.content["finetuning"]}
        return [side for side in (SCRATCH, LONGER, *self.arms) if side in tuned]

    @property
    def shots(self) -> int:
        """The number of shots that tables with room for one have: 10, as in the goals, where it was measured."""
        measured = sorted({run["shots"] for run in self.content["fewshot"]})
        return 10 if 10 in measured or not measured else measured[-1]

    @property
    def readings(self) -> list[tuple[int, str]]:
        """(layer, pooling) of the few-shot evaluation, layer by layer, the last layer last."""
        found = dict.fromkeys((run["layer"], run["pool"]) for run in self.content["fewshot"])
        return sorted(found, key=lambda reading: reading[0])

    @property
    def compares_readings(self) -> bool:
        """Whether few-shot read several layers in several ways."""
        return all(len(set(of)) > 1 for of in zip(*self.readings, strict=True)) if self.readings else False

    def pretrainings(self, arm: str) -> list[Mapping[str, Any]]:
        """Of one arm, one for each seed."""
        return [run for run in self.content["pretraining"] if run["arm"] == arm]

    def top1(self, side: str, labels: str) -> Values:
        """Test accuracy after fine-tuning, by its seed; of an unfinished study, those that are there.

        Raises:
            UserError: a side or a share that the study does not have, so that no sentence can name one.
        """
        if labels not in self.labels or side not in (SCRATCH, LONGER, *self.arms):
            raise UserError(f"{self.name} has no {side!r} at {labels!r}; it has {[*self.sides]} at {[*self.labels]}")
        runs = self.content["finetuning"]
        return {run["seed"]: run["top1"] for run in runs if (run["side"], run["labels"]) == (side, labels)}

    def fewshot(self, side: str, shots: int, layer: int, pool: str) -> Values:
        """Few-shot accuracy by the draw of the shots, each the mean over the pretrainings."""
        runs = [run["accuracy"] for run in self._fewshot(side, layer, pool) if run["shots"] == shots]
        return dict(enumerate(map(fmean, zip(*runs, strict=True))))

    def fewshot_by_pretraining(self, side: str, shots: int, layer: int, pool: str) -> Values:
        """Few-shot accuracy by the seed of the pretraining, each the mean over the draws."""
        runs = self._fewshot(side, layer, pool)
        return {run["pretrain_seed"]: fmean(run["accuracy"]) for run in runs if run["shots"] == shots}

    def rank(self, side: str, layer: int, pool: str) -> Values:
        """Effective rank of the features, by the seed of the pretraining."""
        return {run["pretrain_seed"]: run["rank"] for run in self._fewshot(side, layer, pool)}

    def _fewshot(self, side: str, layer: int, pool: str) -> list[Mapping[str, Any]]:
        asked = (side, layer, pool)
        return [run for run in self.content["fewshot"] if (run["side"], run["layer"], run["pool"]) == asked]

    def probe(self, side: str) -> Values:
        """Accuracy of the linear probe on all labels, by the seed of the pretraining."""
        return {run["pretrain_seed"]: run["top1"] for run in self.content["probes"] if run["side"] == side}


def take(folder: Path, out: Path) -> Path:
    """Copies a study's data into `out` as NAME.json, in a form whose differences are easy to read.

    Raises:
        UserError: no study there, of another schema, or of a name that no section of the page takes.
    """
    try:
        content = json.loads((folder / "study.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no study.json that can be read; name the folder of a study") from error
    study = _checked(content, folder)
    path = out / f"{study.name}.json"
    text = written(content)
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def read_studies(out: Path) -> dict[str, Study]:
    """All studies that were copied into `out`, by name.

    Raises:
        UserError: a file that is none of a study.
    """
    paths = sorted(out.glob("*.json"))
    return {path.stem: _checked(json.loads(path.read_text()), path) for path in paths}


def _checked(content: Any, path: Path) -> Study:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path}: not the data of a study in schema {SCHEMA}; make it anew by tools/study.py")
    study = Study(content["name"], content)
    if study.kind not in KINDS:
        raise UserError(f"{path}: the study's name {study.name!r} must begin with one of {', '.join(KINDS)}")
    if not study.arms:
        raise UserError(f"{path}: the study has no finished run to tell of yet; let it run longer")
    return study


def written(content: Mapping[str, Any]) -> str:
    """JSON with sorted keys, six digits of each figure, and one line for each run."""
    parts = []
    for key, value in sorted(_rounded(content).items()):
        if isinstance(value, list) and value:
            lines = ",\n".join("  " + json.dumps(run, sort_keys=True, ensure_ascii=False) for run in value)
            parts.append(f" {json.dumps(key)}: [\n{lines}\n ]")
        else:
            text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1).replace("\n", "\n ")
            parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(held) for key, held in value.items()}
    return [_rounded(held) for held in value] if isinstance(value, list) else value
