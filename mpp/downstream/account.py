"""What a fine-tuning run has to say for itself: before it starts, in result.json, and in its last words."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mpp.config import differences, from_file, to_dict
from mpp.data.sources.fingerprint import fingerprint
from mpp.downstream.cache import weights_hash
from mpp.downstream.labelled import Labelled
from mpp.downstream.scoring import Scores
from mpp.downstream.settings import FinetuneConfig, parse_share
from mpp.errors import UserError
from mpp.system.files import write_whole
from mpp.weights.base import Weights

RESULT = "result.json"
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Inputs:
    """What a run works on beside its config, as hashes: `inputs.json` in its folder.

    The names in a config stay the same when somebody adds images to a folder or converts other weights into it.
    """

    weights: str
    train: str
    test: str

    @classmethod
    def of(cls, weights: Weights, labelled: Labelled) -> "Inputs":
        """Of weights as they were opened and labelled images as they are now."""
        reading, numerics = weights.reading.of_pixels, asdict(weights.numerics)
        told = [weights.name, dict(weights.args), reading, weights.mean, weights.std, numerics]
        text = json.dumps(told, sort_keys=True, default=str)
        state = "fresh" if weights.state is None else weights_hash(weights.state)
        digest = hashlib.sha256(f"{text} {state}".encode()).hexdigest()
        train = fingerprint(labelled.train, times=False)
        same = labelled.test is labelled.train
        return cls(digest, train, train if same else fingerprint(labelled.test, times=False))

    def check(self, folder: Path) -> None:
        """Refuses a folder whose run worked on others.

        Raises:
            UserError: naming what has changed.
        """
        path = folder / INPUTS
        if not path.is_file():
            return
        try:
            before = Inputs(**json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}, the record of a run's inputs; choose another --run-dir") from error
        names = {"weights": "the weights it started from", "train": "its training images", "test": "its test images"}
        changed = [told for key, told in names.items() if getattr(self, key) != getattr(before, key)]
        if changed:
            what = " and ".join(changed)
            raise UserError(f"{folder} holds a run, but {what} have changed since; choose another --run-dir")

    def write(self, folder: Path) -> None:
        """Writes inputs.json, whole or not at all."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(folder / INPUTS, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class Result:
    """What a finished run came to; `result.json` in its folder. Accuracies are shares, 0 to 1."""

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

    @classmethod
    def of(cls, scores: Scores, labelled: Labelled, config: FinetuneConfig, steps: int) -> "Result":
        """The result of a run of `steps` steps with config's first learning rate."""
        return cls(
            scores.top1,
            scores.top5,
            scores.balanced,
            scores.interval,
            test_images=len(scores.labels),
            train_images=len(labelled.train_indices),
            num_classes=len(labelled.classes),
            lr=config.optim.lr[0],
            steps=steps,
            init=config.init,
        )

    def write(self, folder: Path) -> None:
        """Writes result.json, whole or not at all."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(folder / RESULT, lambda file: file.write(text.encode()))


def read_result(run_dir: Path) -> Result | None:
    """The result of a run, or None where it has not finished.

    Raises:
        UserError: a result.json that is damaged.
    """
    path = run_dir / RESULT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        return Result(**{**content, "interval": tuple(content["interval"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot read {path}: it is no result of a fine-tuning run; delete it to make it anew"
        ) from error


def finished(config: FinetuneConfig, inputs: Inputs) -> Result | None:
    """The result of the run in config.run_dir if it has finished; of a sweep, with any of config's learning rates.

    Raises:
        UserError: a run of another config or on other inputs. With resume=force it counts as not finished.
    """
    folder = Path(config.run_dir)
    result = read_result(folder)
    if result is None:
        return None
    if config.resume != "force":
        inputs.check(folder)
    changed = differences(FinetuneConfig, to_dict(from_file(FinetuneConfig, folder / "config.yaml")), to_dict(config))
    if result.lr in config.optim.lr:
        changed = [line for line in changed if not line.startswith("optim.lr:")]
    if changed and config.resume == "force":
        return None
    if changed:
        raise UserError(
            f"{folder} holds a finished run with another config ({'; '.join(changed)}); choose another --run-dir"
        )
    return result


def describe(labelled: Labelled, share: str) -> str:
    """What is learned from and what is tested, in lines; `share` is that of the labels."""
    trained, tested = len(labelled.train_indices), len(labelled.test_indices)
    part = "" if parse_share(share) == 1 else f" ({share} of each class, drawn by data.labels_seed)"
    lines = [f"labels: {trained:,} training images{part} and {tested:,} test images in {len(labelled.classes)} classes"]
    return "\n".join([*lines, *(f"note: {note}" for note in labelled.notes)])


def account(folder: Path, labelled: Labelled, scores: Scores, result: Result, notes: list[str]) -> str:
    """The last words of a finished run.

    Args:
        folder: of the run.
        labelled: what it learned from and was tested on.
        scores: of the test images.
        result: what they come to.
        notes: what is to be said beside that of the labels.
    """
    low, high = result.interval
    missing = len(labelled.test_indices) - result.test_images
    start = "scratch" if result.init == "none" else result.init
    lines = [
        "",
        f"Finished: {result.steps:,} steps on {result.train_images:,} images from {start}, optim.lr {result.lr:g}.",
        "",
        f"Test accuracy on {result.test_images:,} images of {result.num_classes} classes:",
        f"  top-1     {result.top1:7.2%}   (95 % interval {low:.2%} to {high:.2%}, over test images)",
        *([] if result.top5 is None else [f"  top-5     {result.top5:7.2%}"]),
        f"  by class  {result.balanced:7.2%}   (mean over the classes, whatever their size)",
        f"  trivial   {_trivial(labelled, scores):7.2%}   (always the most frequent class of the training images)",
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


def _trivial(labelled: Labelled, scores: Scores) -> float:
    """Accuracy of always answering the most frequent class."""
    frequent = np.bincount(labelled.train_labels[labelled.train_indices]).argmax()
    return float((scores.labels == frequent).mean())
