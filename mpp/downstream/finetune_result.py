"""The files of a finished fine-tuning run, result.json and inputs.json, and the summary that ends it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mpp.config import differences, from_file, to_dict
from mpp.downstream.feature_cache import weights_hash
from mpp.downstream.labelled import Labelled
from mpp.downstream.scoring import Scores
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.system.files import write_whole
from mpp.weights.base import Weights

RESULT = "result.json"
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Inputs:
    """Hashes of what a run works on beside its config: `inputs.json` in its folder.

    The names in a config stay the same when somebody adds images to a folder or converts other weights into it.
    """

    weights: str
    train: str
    test: str

    @classmethod
    def of(cls, weights: Weights, labelled: Labelled) -> "Inputs":
        """Hashes weights as they were opened and labelled images as they are now."""
        settings = [weights.name, dict(weights.args), weights.reading.pixel_settings, weights.mean, weights.std]
        text = json.dumps([*settings, asdict(weights.numerics)], sort_keys=True, default=str)
        state = "fresh" if weights.state is None else weights_hash(weights.state)
        digest = hashlib.sha256(f"{text} {state}".encode()).hexdigest()
        train = labelled.train.fingerprint(times=False)
        same = labelled.test is labelled.train
        return cls(digest, train, train if same else labelled.test.fingerprint(times=False))

    def check(self, folder: Path) -> None:
        """Raises UserError for a folder whose run worked on others, naming what has changed."""
        path = folder / INPUTS
        if not path.is_file():
            return
        try:
            before = Inputs(**json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}, the record of a run's inputs; choose another --run-dir") from error
        names = {"weights": "the weights it started from", "train": "its training images", "test": "its test images"}
        changed = " and ".join(name for key, name in names.items() if getattr(self, key) != getattr(before, key))
        if changed:
            raise UserError(f"{folder} holds a run, but {changed} have changed since; choose another --run-dir")


@dataclass(frozen=True)
class Result:
    """Figures of a finished run: `result.json` in its folder. Accuracies are shares, 0 to 1."""

    top1: float
    top5: float | None
    """None for five classes or fewer."""
    balanced: float
    """Mean over the classes of the share that is right."""
    interval: tuple[float, float]
    """95 % interval of top1 (Wilson), for the test images as a sample of others."""
    test_images: int
    train_images: int
    num_classes: int
    lr: float
    steps: int
    init: str


def write_record(path: Path, record: Inputs | Result) -> None:
    """Writes result.json or inputs.json, whole or not at all."""
    write_whole(path, json.dumps(asdict(record), indent=2) + "\n")


def read_result(run_dir: Path) -> Result | None:
    """Reads the result of a run; None where it has not finished. Raises UserError for a damaged result.json."""
    path = run_dir / RESULT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        return Result(**{**content, "interval": tuple(content["interval"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"cannot read {path}: it is no result of a fine-tuning run"
        raise UserError(f"{what}; delete it to make it anew") from error


def changed_settings(config: FinetuneConfig) -> list[str]:
    """Gives the settings by which the run in config.run_dir differs, if there is one, as "train.length: ... -> ...".

    Of several learning rates of config it may have any. Raises UserError for a config.yaml that cannot be read.
    """
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        return []
    before = from_file(FinetuneConfig, path)
    changed = differences(FinetuneConfig, to_dict(before), to_dict(config))
    chosen = set(before.optim.lr) <= set(config.optim.lr)
    return [line for line in changed if not (chosen and line.startswith("optim.lr:"))]


def finished(config: FinetuneConfig, inputs: Inputs) -> Result | None:
    """Gives the result of the run in config.run_dir if it has finished; after a sweep, with any of its learning rates.

    Raises:
        UserError: a run of another config or on other inputs. With resume=force it counts as not finished.
    """
    folder, force = Path(config.run_dir), config.resume == "force"
    result = read_result(folder)
    if result is None:
        return None
    if not force:
        inputs.check(folder)
    changed = changed_settings(config)
    if changed and not force:
        what = f"{folder} holds a finished run with another config ({'; '.join(changed)})"
        raise UserError(f"{what}; choose another --run-dir")
    return None if changed else result


def summary(folder: Path, labelled: Labelled, scores: Scores, result: Result, notes: list[str]) -> str:
    """The last lines that a finished run in `folder` prints; `notes` follow those of the labels."""
    low, high = result.interval
    missing = len(labelled.test_indices) - result.test_images
    most_frequent = np.bincount(labelled.train_labels[labelled.train_indices]).argmax()
    baseline = float((scores.labels == most_frequent).mean())
    start = "scratch" if result.init == "none" else result.init
    lines = [
        "",
        f"Finished: {result.steps:,} steps on {result.train_images:,} images from {start}, optim.lr {result.lr:g}.",
        "",
        f"Test accuracy on {result.test_images:,} images of {result.num_classes} classes:",
        f"  top-1     {result.top1:7.2%}   (95 % interval {low:.2%} to {high:.2%}, over test images)",
        *([] if result.top5 is None else [f"  top-5     {result.top5:7.2%}"]),
        f"  by class  {result.balanced:7.2%}   (mean over the classes, whatever their size)",
        f"  trivial   {baseline:7.2%}   (always the most frequent class of the training images)",
        "",
        scores.table(),
        "",
        *(f"note: {note}" for note in (*labelled.notes, *notes)),
        *([f"note: test images that could not be decoded and are not counted: {missing:,}"] if missing else []),
        f"classes      {folder / 'classes.csv'}, {folder / 'confusion.png'}",
        f"predictions  {folder / 'predictions.csv'}",
        f'model        timm.create_model("local-dir:{folder / "model"}", pretrained=True)',
    ]
    return "\n".join(lines)
