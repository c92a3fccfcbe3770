"""Headline figures and result sections of a run, from its own folder."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from mpp.downstream.finetune_result import verdict_of as finetuning_verdict
from mpp.downstream.scoring import short_name
from mpp.downstream.settings import FinetuneConfig
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.summary import verdict_of as pretraining_verdict
from mpp.report.page import Block, Picture, Section, Table
from mpp.report.provenance import times
from mpp.report.run_record import Row, RunRecord
from mpp.report.wording import NONE, UNTRAINED, mean_text, percent, points, score_text, shots_text
from mpp.system.files import read_csv
from mpp.training.rows import last_part

_EXTREMES = 5  # classes at either end; of fewer than twice as many, all

Rows = Sequence[dict[str, str]]
"""Of a CSV file."""


def headline(record: RunRecord) -> dict[str, str]:
    """The few figures of a run that matter most, by name."""
    figures = {}
    if record.pretraining:
        # The model at masked patches beside what needs no model, over the last twentieth of the run.
        last, _ = last_part([row for row in record.trained if record.score in row], record.score)
        word = "accuracy" if record.score == "accuracy" else "squared error"
        names = {f"{word} at masked patches": "_masked", "nearest visible patches": "_baseline_neighbours"}
        for name, ending in names.items():
            if record.score + ending in last:
                figures[name] = score_text(record.score, last[record.score + ending])
        gains = {shots: gain for shots in record.shots if (gain := _gain(*fewshot_ends(record), shots)) is not None}
        if gains:
            figures[f"points gained at {shots_text(max(gains))}"] = points(gains[max(gains)])
    elif record.result is not None:
        result = record.result
        if result.mean_ap is not None:
            trivial = _chance(read_csv(record.folder / "classes.csv"))
            figures["mean average precision"] = percent(result.mean_ap)
            figures |= {} if trivial is None else {"by chance": percent(trivial)}
            figures["all classes right"] = percent(result.top1)
        else:
            trivial = _most_frequent(read_csv(record.folder / "classes.csv"))
            figures["top-1"] = percent(result.top1)
            figures |= {} if trivial is None else {"always the most frequent class": percent(trivial)}
            figures |= {} if result.top5 is None else {"top-5": percent(result.top5)}
            figures["mean over the classes"] = percent(result.balanced)
    elif record.trained:
        figures["training accuracy"] = percent(record.trained[-1].get("accuracy"))
    if record.trained:
        figures["images seen"] = f"{record.trained[-1]['images']:,}"
    return figures | {name: value for name, value in times(record).items() if name == "training time"}


def verdict(record: RunRecord) -> tuple[str, ...]:
    """What the figures of a run mean, in sentences; of a fine-tuning nothing before it has ended."""
    if isinstance(record.config, PretrainConfig):
        found = pretraining_verdict(record.rows, record.starts, record.score, record.config.init).sentences
        return (
            found
            if record.ended or not found
            else ("This run has not ended; what follows is what its figures say so far.", *found)
        )
    if record.result is None:
        return ()
    classes = read_csv(record.folder / "classes.csv")
    trivial = _most_frequent(classes) if record.result.mean_ap is None else _chance(classes)
    return finetuning_verdict(record.config, record.folder, record.result, trivial).sentences


def start_name(config: PretrainConfig | FinetuneConfig) -> str:
    """Name of the encoder that a run began with: untrained, or its init."""
    return "its init" if isinstance(config, PretrainConfig) and config.init else UNTRAINED


def fewshot_section(record: RunRecord) -> Section | None:
    """Few-shot accuracy of the encoder before its training and now; None where it was never measured."""
    if not isinstance(record.config, PretrainConfig) or not record.fewshot:
        return None
    before, after = fewshot_ends(record)
    rows = tuple(
        (str(k), fewshot_accuracy(before, k), fewshot_accuracy(after, k), points(_gain(before, after, k)))
        for k in record.shots
    )
    draws = len(record.config.fewshot.seeds)
    last = f"step {after['step']:,}" if after and not record.ended else "pretrained"
    head = ("labelled images per class", start_name(record.config), last, "gain in points")
    several = f"mean ± standard deviation over {draws} draws" if draws > 1 else "one draw"
    reading = (
        "Each figure is the test accuracy of a linear regression on the frozen encoder's features, averaged over the "
        "patches; the gain is what the training added to the same encoder as it began."
    )
    table = Table(head, rows, f"Test accuracy, {several} of the labelled images")
    return Section("few-shot", "Few-shot", reading, (table,), "section 4.1")


def fewshot_ends(record: RunRecord) -> tuple[Row | None, Row | None]:
    """The evaluations of the untrained encoder and the newest of the trained one; None where there is none."""
    before = next((row for row in record.fewshot if not row["step"]), None)
    last = record.fewshot[-1] if record.fewshot else None
    return before, last if last is not None and last["step"] else None


def fewshot_accuracy(row: Row | None, shots: int) -> str:
    """Mean and standard deviation of one evaluation, as text."""
    name = f"fewshot/{shots}shot"
    return NONE if row is None else mean_text(row.get(name), row.get(f"{name}_std"))


def _gain(before: Row | None, after: Row | None, shots: int) -> float | None:
    first, last = ((row or {}).get(f"fewshot/{shots}shot") for row in (before, after))
    return None if first is None or last is None else last - first


def finetune_section(record: RunRecord) -> Section | None:
    """Test results of a fine-tuning run, its classes and its sweep; None before it has ended."""
    result = record.result
    if result is None:
        return None
    classes = read_csv(record.folder / "classes.csv")
    measured, column = "accuracy", "accuracy"
    figures = [
        ("top-1", percent(result.top1, 2)),
        *_range(result.interval),
        *([] if result.top5 is None else [("top-5", percent(result.top5, 2))]),
        ("mean over the classes", percent(result.balanced, 2)),
        ("always the most frequent class", percent(_most_frequent(classes), 2)),
    ]
    reading = (
        "Top-1 is the share of the test images whose first guess is right; the 95 % interval says how far other test "
        "images of the same kind might move it, and a useful classifier is far above the most frequent class."
    )
    if result.mean_ap is not None:
        measured, column = "average precision", "average_precision"
        figures = [
            ("mean average precision", percent(result.mean_ap, 2)),
            *_range(result.mean_ap_interval),
            ("by chance", percent(_chance(classes), 2)),
            ("all classes right, at 0.5", percent(result.top1, 2)),
            *_range(result.interval),
            ("images of a class found, at 0.5", percent(result.balanced, 2)),
        ]
        reading = (
            "Average precision ranks the test images by the probability of a class: it is high where those that have "
            "the class come first, and by chance the share of the images that have it. Its mean is over the classes."
        )
    rows = [
        *figures,
        ("test images", f"{result.test_images:,}"),
        ("training images", f"{result.train_images:,}"),
        ("classes", f"{result.num_classes:,}"),
        ("steps", f"{result.steps:,}"),
        ("learning rate", f"{result.lr:g}"),
        ("started from", {"none": "scratch"}.get(result.init, result.init)),
    ]
    # The worst first.
    ranked = sorted((row for row in classes if row.get(column)), key=lambda row: float(row[column]))
    blocks: list[Block] = [Table(("measure", "value"), tuple(rows), "Test results")]
    if len(ranked) > 2 * _EXTREMES:
        blocks.append(_class_table(ranked[:_EXTREMES], "The worst classes", measured))
        blocks.append(_class_table(ranked[: -_EXTREMES - 1 : -1], f"The best classes of {len(ranked):,}", measured))
    elif ranked:
        blocks.append(_class_table(ranked, "All classes, the worst first", measured))
    confusion = _confusion(record.folder, ranked) if result.mean_ap is None else []
    blocks += [*confusion, *_sweep(record.folder)]
    return Section("fine-tuning", "Fine-tuning", reading, tuple(blocks), "section 4.1 and appendix B.1.1")


def _range(interval: tuple[float, float] | None) -> list[tuple[str, str]]:
    name = "95 % interval over test images"
    return [] if interval is None else [(name, f"{percent(interval[0])} to {percent(interval[1])}")]


def _most_frequent(classes: Rows) -> float | None:
    """Accuracy of always answering the training images' most frequent class; None where that is not known."""
    try:
        tested = [int(row["test_images"]) for row in classes]
        trained = [int(row["train_images"] or 0) for row in classes]
    except (KeyError, ValueError):
        return None
    return tested[int(np.argmax(trained))] / sum(tested) if sum(tested) and sum(trained) else None


def _chance(classes: Rows) -> float | None:
    """Mean average precision of guessing: the mean share of the test images that have a class; None if not known."""
    shares = [float(row["chance"]) for row in classes if row.get("chance")]
    return fmean(shares) if shares else None


def _class_table(rows: Rows, caption: str, measured: str) -> Table:
    if measured != "accuracy":
        names = "average_precision", "chance", "precision", "recall"
        cells = tuple(
            (short_name(row["class"]), row["test_images"], *(percent(float(row[n])) if row[n] else NONE for n in names))
            for row in rows
        )
        head = ("class", "test images", measured, "by chance", "precision at 0.5", "recall at 0.5")
        return Table(head, cells, caption)
    cells = (
        (short_name(row["class"]), row["test_images"], percent(float(row["accuracy"])),
         short_name(row.get("most_confused_with", "")) or NONE)
        for row in rows
    )  # fmt: skip
    return Table(("class", "test images", "accuracy", "most often taken for"), tuple(cells), caption)


def _confusion(folder: Path, ranked: Rows) -> list[Block]:
    try:
        with Image.open(folder / "confusion.png") as file:
            image = np.asarray(file.convert("RGB"))
    except OSError:
        return []
    alt = "Confusion matrix, rows the true and columns the predicted classes"
    if ranked:
        worst = ranked[0]
        alt += f"; the worst class, {short_name(worst['class'])}, is right in {percent(float(worst['accuracy']))}"
    caption = "Share of each true class (row) by predicted class (column)"
    return [Picture("class_confusion", f"{alt}.", image, caption, width=720)]


def _sweep(folder: Path) -> list[Block]:
    rows = read_csv(folder / "sweep.csv")
    if not rows:
        return []
    cells = []
    for row in rows:
        accuracy = row.get("held_out_mean_ap") or row.get("held_out_top1", "")
        accuracy = percent(float(accuracy)) if accuracy not in ("", "diverged") else accuracy
        cells.append((row.get("lr", ""), accuracy, "yes" if row.get("chosen") == "1" else "no"))
    caption = f"The sweep over learning rates, on {rows[0].get('held_out_images') or 'some'} held-out images"
    measured = "held-out mAP" if "held_out_mean_ap" in rows[0] else "held-out top-1"
    return [Table(("learning rate", measured, "chosen"), tuple(cells), caption)]
