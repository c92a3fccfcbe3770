"""The data file of a study: copied once from its folder, and what the page asks of it.

Its figures are those of `mpp.report.study_results`, which the study's own tables and the pages of its runs have, too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpp.downstream.estimates import Estimate
from mpp.errors import UserError
from mpp.report.settings import LONGER, SCRATCH
from mpp.report.study_results import Pair, StudyResults
from mpp.system.files import write_whole

SCHEMA = 1
KINDS = ("benefit", "ablation", "length", "best", "continue")
"""What the name of a study begins with; each has a section of the page."""


@dataclass(frozen=True)
class Study(StudyResults):
    """One study, finished or not, as the page tells of it."""

    name: str

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
    def in_equal_time(self) -> Mapping[str, Mapping[str, Any]]:
        """By share of the labels what longer training from scratch had in the pretraining's device time; else empty."""
        return (self.content["equal_time"] or {}).get("longer") or {}

    @property
    def labels(self) -> Sequence[str]:
        """Shares of the labels, fewest images first; those that no run has had yet come last."""
        images = self.labelled_images
        return sorted(self.config["labels"], key=lambda labels: images.get(labels, math.inf))

    @property
    def shots(self) -> int:
        """The number of shots that tables with room for one have: 10, as in the goals, where it was measured."""
        return 10 if 10 in self.counts or not self.counts else self.counts[-1]

    @property
    def compares_readings(self) -> bool:
        """Whether few-shot read several layers in several ways."""
        return all(len(set(of)) > 1 for of in zip(*self.readings, strict=True)) if self.readings else False

    def pretrainings(self, arm: str) -> list[Mapping[str, Any]]:
        """Of one arm, one for each seed."""
        return [run for run in self.content["pretraining"] if run["arm"] == arm]

    def tuned(self, side: str, labels: str) -> Estimate | None:
        """As `StudyResults.tuned`.

        Raises:
            UserError: a side or a share that the study does not have, so that no sentence can name one.
        """
        self._check([side], labels)
        return super().tuned(side, labels)

    def mean_gain(self, pairs: Sequence[Pair], labels: str) -> Estimate | None:
        """As `StudyResults.mean_gain`, and raises as `tuned`."""
        self._check([side for pair in pairs for side in pair], labels)
        return super().mean_gain(pairs, labels)

    def _check(self, sides: Sequence[str], labels: str) -> None:
        for side in sides:
            if labels not in self.labels or side not in (SCRATCH, LONGER, *self.arms):
                there = f"{[*self.sides]} at {[*self.labels]}"
                raise UserError(f"{self.name} has no {side!r} at {labels!r}; it has {there}")


def take(folder: Path, out: Path) -> None:
    """Copies a study's data into `out` as NAME.json, in a form whose differences are easy to read.

    Raises:
        UserError: no study there, of another schema, or of a name that no section of the page takes.
    """
    try:
        content = json.loads((folder / "study.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no study.json that can be read; name the folder of a study") from error
    study = _checked(content, folder)
    write_whole(out / f"{study.name}.json", written(content))


def read_studies(out: Path) -> dict[str, Study]:
    """All studies that were copied into `out`, by name.

    Raises:
        UserError: a file that is none of a study.
    """
    paths = sorted(out.glob("*.json"))
    return {path.stem: _checked(json.loads(path.read_text("utf-8")), path) for path in paths}


def _checked(content: Any, path: Path) -> Study:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path}: not the data of a study in schema {SCHEMA}; make it anew by tools/study.py")
    study = Study(content, content["name"])
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
