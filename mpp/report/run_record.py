"""Reads a run folder once, for all sections of the page about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpp.config import from_file
from mpp.config.files import load_yaml
from mpp.downstream.finetune_result import Result, read_result
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.training.provenance import read_starts
from mpp.training.rows import read_rows

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A pretraining or fine-tuning run, ended or not; what it has not written is empty or None."""

    folder: Path
    config: PretrainConfig | FinetuneConfig
    rows: list[Row]
    """Of metrics.jsonl."""
    starts: list[dict[str, Any]]
    """Of environment.json."""
    result: Result | None
    """Of a fine-tuning run that has ended."""
    trained: list[Row]
    """The rows with figures of the training."""
    fewshot: list[Row]
    """The rows with few-shot accuracies."""

    @property
    def pretraining(self) -> bool:
        return isinstance(self.config, PretrainConfig)

    @property
    def score(self) -> str:
        """Name of the figures about predictions: accuracy, or mse for the pixel target."""
        pixels = isinstance(self.config, PretrainConfig) and self.config.objective.target == "pixels"
        return "mse" if pixels else "accuracy"

    @property
    def ended(self) -> bool:
        return (self.folder / "model" / "config.json").is_file() if self.pretraining else self.result is not None

    @property
    def shots(self) -> list[int]:
        """Labelled images per class of the few-shot evaluations, ascending."""
        names = {name for row in self.fewshot for name in row if name.startswith("fewshot/") and name.endswith("shot")}
        return sorted(int(name.removeprefix("fewshot/").removesuffix("shot")) for name in names)

    def first(self, name: str) -> Any:
        """The value of `name` in the first start that has one."""
        return next((start[name] for start in self.starts if start.get(name)), None)


def read_run(folder: Path) -> RunRecord:
    """Reads the run in `folder`.

    Raises:
        UserError: a folder that is no pretraining or fine-tuning run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml; name the --run-dir of a run")
    settings = load_yaml(path)
    if "pretrain" in settings and "finetune" in settings:
        run = next(iter(sorted(folder.glob("pretrain/*/*"))), folder / "pretrain" / "pretrained" / "seed_0")
        raise UserError(f"{folder} is a study; name one of its runs, such as {run}")
    config = from_file(PretrainConfig if "objective" in settings else FinetuneConfig, path)
    try:
        result = read_result(folder)
    except UserError:  # a damaged result.json; the rest is still worth showing
        result = None
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "step" in row and "images" in row]
    trained = [row for row in rows if "loss" in row]
    fewshot = [row for row in rows if any(name.startswith("fewshot/") for name in row)]
    return RunRecord(folder, config, rows, read_starts(folder), result, trained, fewshot)
