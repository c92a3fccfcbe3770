"""The files of a finished fine-tuning run, result.json and inputs.json, the summary that ends it and its verdict."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import differences, from_file, to_dict
from mpp.downstream.estimates import wilson
from mpp.downstream.feature_cache import weights_hash
from mpp.downstream.labelled import Labelled
from mpp.downstream.multi_label import MultiLabelScores, read_precision
from mpp.downstream.scoring import Scores
from mpp.downstream.settings import FinetuneConfig
from mpp.downstream.verdict import MEAN_AP, Comparison, Verdict, of_finetuning, paired
from mpp.errors import UserError, command
from mpp.system.files import read_csv, write_whole
from mpp.training.earlier_run import changes
from mpp.training.rows import read_rows
from mpp.training.settings import chosen
from mpp.weights.base import Weights

RESULT = "result.json"
INPUTS = "inputs.json"

_ARCHITECTURE = {
    "init",
    *(f"model.{name}" for name in ("name", "patch_size", "embed_dim", "depth", "num_heads", "in_chans")),
}
"""Settings in which a training from scratch may differ: its config says what the weights said."""


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
    """With several labels an image: the share whose set of labels is right as a whole, with probabilities above 0.5."""
    top5: float | None
    """None for five classes or fewer."""
    balanced: float
    """Mean over the classes of the share of their images that is right (several labels: that they are given to)."""
    interval: tuple[float, float]
    """95 % interval of top1 (Wilson), for the test images as a sample of others."""
    test_images: int
    train_images: int
    num_classes: int
    lr: float
    steps: int
    init: str
    mean_ap: float | None = None
    """Mean average precision over the classes, of several labels an image; None: one label an image."""
    mean_ap_interval: tuple[float, float] | None = None
    """95 % interval of mean_ap, for the test images as a sample of others; older runs have none."""

    @classmethod
    def of(cls, scores: Scores | MultiLabelScores, labelled: Labelled, config: FinetuneConfig, steps: int) -> "Result":
        """The result of a run of so many steps."""
        several = isinstance(scores, MultiLabelScores)
        top1, balanced = (scores.exact, scores.recall) if several else (scores.top1, scores.balanced)
        return cls(
            top1,
            None if several else scores.top5,
            balanced,
            wilson(top1, len(scores.indices)),
            test_images=len(scores.indices),
            train_images=len(labelled.train_indices),
            num_classes=len(labelled.classes),
            lr=chosen(config.optim.lr[0]),
            steps=steps,
            init=config.init,
            mean_ap=scores.mean_ap if several else None,
            mean_ap_interval=scores.interval if several else None,
        )

    @property
    def figure(self) -> float:
        """The figure by which runs are compared: mean average precision, else top-1."""
        return self.top1 if self.mean_ap is None else self.mean_ap

    @property
    def figure_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval; None: not known."""
        return self.interval if self.mean_ap is None else self.mean_ap_interval


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
        found = Result(**{**content, "interval": tuple(content["interval"])})
        return replace(found, mean_ap_interval=tuple(found.mean_ap_interval)) if found.mean_ap_interval else found
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
    changed = changes(before, config)
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


def verdict_of(config: FinetuneConfig, folder: Path, result: Result, trivial: float | None) -> Verdict:
    """What the result of the run in `folder` means; `trivial` as in `of_finetuning`."""
    scratch, instead = None, ""
    if not _from_scratch(result.init):
        scratch = _beside_scratch(config, folder)
        new = from_new_weights(config)
        words = ["--config", str(folder / "config.yaml"), "--init", f"random:{result.init}"]
        words += ["--model.head", new.model.head] if new.model != config.model else []
        words += ["--optim.layer-decay", f"{new.optim.layer_decay:g}"] if new.optim != config.optim else []
        words += ["--optim.lr", *rates] if (rates := swept(folder)) else []
        words += ["--run-dir", f"{folder}_scratch"]
        instead = f"{command('finetune')} {shlex.join(words)}"
    return of_finetuning(
        result.figure,
        result.figure_interval,
        result.test_images,
        trivial,
        several=result.mean_ap is not None,
        rows=read_rows(folder / "metrics.jsonl"),
        scratch=scratch,
        scratch_command=instead,
    )


def from_new_weights(config: FinetuneConfig) -> FinetuneConfig:
    """The same fine-tuning for new weights, which is the fair comparison with it: they have no head to keep and nothing
    to fit one to, and their lower layers hold nothing that a lower rate would protect."""
    head = "linear" if config.model.head in ("probe", "keep") else config.model.head
    return replace(config, model=replace(config.model, head=head), optim=replace(config.optim, layer_decay=1.0))


def _from_scratch(init: str) -> bool:
    return init == "none" or init.startswith("random:")


def _beside_scratch(config: FinetuneConfig, folder: Path) -> Comparison | None:
    """Compares with a run in a folder beside this one that is the same, `from_new_weights`."""
    inputs, rates, settings = _read_json(folder / INPUTS), swept(folder), to_dict(from_new_weights(config))
    for path in sorted(folder.absolute().parent.glob(f"*/{RESULT}")):
        beside = path.parent
        try:
            if not (result := read_result(beside)) or not _from_scratch(result.init):
                continue
            other = to_dict(from_file(FinetuneConfig, beside / "config.yaml"))
        except UserError:
            continue
        may_differ = _ARCHITECTURE | ({"optim.lr"} if rates and rates == swept(beside) else set())
        changed = {line.partition(":")[0] for line in differences(FinetuneConfig, settings, other)}
        of_other = _read_json(beside / INPUTS)
        images = all(inputs.get(key) and inputs.get(key) == of_other.get(key) for key in ("train", "test"))
        if images and changed <= may_differ and _architecture(folder) == _architecture(beside):
            if result.mean_ap is not None:
                return paired(_precision(folder), _precision(beside), beside.name, MEAN_AP)
            return paired(_right(folder), _right(beside), beside.name)
    return None


def swept(folder: Path) -> list[str]:
    """The learning rates of a run's sweep, if it made one."""
    return [row["lr"] for row in read_csv(folder / "sweep.csv")]


def _right(folder: Path) -> dict[str, bool]:
    """Whether each test image of a run was right, by its index."""
    return {row["index"]: row["correct"] == "1" for row in read_csv(folder / "predictions.csv")}


def _precision(folder: Path) -> dict[str, float]:
    return read_precision(folder / "predictions.csv")


def _architecture(folder: Path) -> list[Any]:
    content = _read_json(folder / "model" / "config.json")
    return [content.get("architecture"), content.get("model_args")]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def summary(
    folder: Path,
    labelled: Labelled,
    scores: Scores | MultiLabelScores,
    result: Result,
    verdict: Verdict,
    notes: Sequence[str],
    warnings: Sequence[str] = (),
) -> str:
    """The last lines that a finished run in `folder` prints.

    `notes` follow those of the labels; `warnings` say why the run cannot have learnt.
    """
    low, high = result.interval
    if isinstance(scores, MultiLabelScores):
        (least, most), confusion = result.mean_ap_interval or (0.0, 1.0), ""
        figures = [
            f"Test images, {result.test_images:,}, with several of {result.num_classes} classes each, or none:",
            f"  mAP       {scores.mean_ap:7.2%}   (mean average precision; 95 % interval {least:.2%} to {most:.2%})",
            f"  trivial   {scores.chance:7.2%}   (mAP of giving every image each class's share of the images)",
            f"  exact     {result.top1:7.2%}   (all classes right at 0.5; 95 % interval {low:.2%} to {high:.2%})",
            f"  recall    {result.balanced:7.2%}   (of the images of a class, found at 0.5; mean over the classes)",
        ]
    else:
        baseline, confusion = always_most_frequent(labelled, scores), f", {folder / 'confusion.png'}"
        figures = [
            f"Test accuracy on {result.test_images:,} images of {result.num_classes} classes:",
            f"  top-1     {result.top1:7.2%}   (95 % interval {low:.2%} to {high:.2%}, over test images)",
            *([] if result.top5 is None else [f"  top-5     {result.top5:7.2%}"]),
            f"  by class  {result.balanced:7.2%}   (mean over the classes, whatever their size)",
            f"  trivial   {baseline:7.2%}   (always the most frequent class of the training images)",
        ]
    missing = len(labelled.test_indices) - result.test_images
    start = "scratch" if result.init == "none" else result.init
    lines = [
        "",
        f"Finished: {result.steps:,} steps on {result.train_images:,} images from {start}, optim.lr {result.lr:g}.",
        "",
        *figures,
        "",
        scores.table(),
        "",
        *(f"WARNING: {warning}" for warning in warnings),
        *verdict.lines(),
        *(f"note: {note}" for note in (*labelled.notes, *notes)),
        *([f"note: test images that could not be decoded and are not counted: {missing:,}"] if missing else []),
        f"classes      {folder / 'classes.csv'}{confusion}",
        f"predictions  {folder / 'predictions.csv'}",
        f'model        timm.create_model("local-dir:{folder / "model"}", pretrained=True)',
    ]
    return "\n".join(lines)


def always_most_frequent(labelled: Labelled, scores: Scores) -> float:
    """Accuracy of always answering the most frequent class of the training images."""
    most_frequent = np.bincount(labelled.train_labels[labelled.train_indices]).argmax()
    return float((scores.labels == most_frequent).mean())
