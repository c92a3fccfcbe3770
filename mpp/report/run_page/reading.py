"""What a run left in its folder, read once for everything that tells of it."""

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpp.config import from_file
from mpp.downstream.account import Result, read_result
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.training.log import read_rows
from mpp.training.provenance import read_starts
from mpp.yaml_text import load_yaml

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Record:
    """A pretraining or fine-tuning run, ended or not; what it has not written is empty or None."""

    folder: Path
    config: PretrainConfig | FinetuneConfig
    rows: list[Row]
    """Of metrics.jsonl."""
    starts: list[dict[str, Any]]
    """Of environment.json."""
    result: Result | None
    """Of a fine-tuning run that has ended."""

    @property
    def pretraining(self) -> bool:
        return isinstance(self.config, PretrainConfig)

    @property
    def score(self) -> str:
        """What the figures of its predictions are called: accuracy, or mse for the pixel target."""
        pixels = isinstance(self.config, PretrainConfig) and self.config.objective.target == "pixels"
        return "mse" if pixels else "accuracy"

    @property
    def ended(self) -> bool:
        return (self.folder / "model" / "config.json").is_file() if self.pretraining else self.result is not None

    @cached_property
    def trained(self) -> list[Row]:
        """The rows with figures of the training."""
        return [row for row in self.rows if "loss" in row]

    @cached_property
    def fewshot(self) -> list[Row]:
        """The rows with few-shot accuracies."""
        return [row for row in self.rows if any(name.startswith("fewshot/") for name in row)]

    @property
    def shots(self) -> tuple[int, ...]:
        """Labelled images per class of the few-shot evaluations, ascending."""
        names = {name for row in self.fewshot for name in row if name.startswith("fewshot/") and name.endswith("shot")}
        return tuple(sorted(int(name.removeprefix("fewshot/").removesuffix("shot")) for name in names))


def read_record(folder: Path) -> Record:
    """The record of the run in `folder`.

    Raises:
        UserError: a folder that is no pretraining or fine-tuning run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml; name the --run-dir of a run")
    told = load_yaml(path)
    if "pretrain" in told and "finetune" in told:
        run = next(iter(sorted(folder.glob("pretrain/*/*"))), folder / "pretrain" / "pretrained" / "seed_0")
        raise UserError(f"{folder} is a study; name one of its runs, such as {run}")
    config = from_file(PretrainConfig if "objective" in told else FinetuneConfig, path)
    try:
        result = read_result(folder)
    except UserError:  # the rest is still worth telling
        result = None
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "step" in row and "images" in row]
    return Record(folder, config, rows, read_starts(folder), result)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by its head; none where it is missing or no such file."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (OSError, csv.Error):
        return []
