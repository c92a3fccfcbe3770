"""What a run was worth, from its own folder: the few-shot table of a pretraining, the tests of a fine-tuning."""

from pathlib import Path

import numpy as np
from PIL import Image

from mpp.downstream.account import Result
from mpp.downstream.scoring import shown
from mpp.pretraining.settings import PretrainConfig
from mpp.report.page.parts import Block, Picture, Section, Table
from mpp.report.run_page.reading import Record, Row, read_csv
from mpp.report.run_page.wording import NONE, around, beginning, percent, points

_EXTREMES = 5  # classes at either end; of fewer than twice as many, all


def fewshot_section(record: Record) -> Section | None:
    """Few-shot accuracy of the encoder before its training and now; None where it was never measured."""
    if not isinstance(record.config, PretrainConfig) or not record.fewshot:
        return None
    before, after = fewshot_ends(record)
    drawn = len(record.config.fewshot.seeds)
    last = "pretrained" if record.ended else f"step {after['step']:,}" if after else "pretrained"
    rows = []
    for shots in record.shots:
        cells = (around(*fewshot_accuracy(row, shots)) for row in (before, after))
        rows.append((str(shots), *cells, points(_gain(before, after, shots))))
    table = Table(
        ("labelled images per class", beginning(record.config), last, "gain in points"),
        tuple(rows),
        f"Test accuracy, mean ± standard deviation over {drawn} draws of the labelled images"
        if drawn > 1
        else "Test accuracy, one draw of the labelled images",
    )
    return Section(
        "few-shot",
        "Few-shot",
        "Each figure is the test accuracy of a linear regression on the frozen encoder's features, averaged over the "
        "patches; the gain is what the training added to the same encoder as it began.",
        (table,),
        "section 4.1",
    )


def fewshot_ends(record: Record) -> tuple[Row | None, Row | None]:
    """The evaluations of the untrained encoder and the newest of the trained one; None where there is none."""
    before = next((row for row in record.fewshot if not row["step"]), None)
    last = record.fewshot[-1] if record.fewshot else None
    return before, last if last is not None and last["step"] else None


def fewshot_gain(record: Record) -> tuple[int, float] | None:
    """The largest number of shots that both ends have, and what the training added there."""
    before, after = fewshot_ends(record)
    for shots in reversed(record.shots):
        gain = _gain(before, after, shots)
        if gain is not None:
            return shots, gain
    return None


def _gain(before: Row | None, after: Row | None, shots: int) -> float | None:
    first, last = (fewshot_accuracy(row, shots)[0] for row in (before, after))
    return None if first is None or last is None else last - first


def fewshot_accuracy(row: Row | None, shots: int) -> tuple[float | None, float | None]:
    name = f"fewshot/{shots}shot"
    return (None, None) if row is None else (row.get(name), row.get(f"{name}_std"))


def finetune_section(record: Record) -> Section | None:
    """Test results of a fine-tuning run, its classes and its sweep; None before it has ended."""
    result = record.result
    if result is None:
        return None
    classes = read_csv(record.folder / "classes.csv")
    blocks: list[Block] = [_totals(result, classes), *_class_tables(classes)]
    blocks += [block for block in (_confusion(record.folder, classes), _sweep(record.folder)) if block is not None]
    return Section(
        "fine-tuning",
        "Fine-tuning",
        "Top-1 is the share of the test images whose first guess is right; the 95 % interval says how far other test "
        "images of the same kind might move it, and a useful classifier is far above the most frequent class.",
        tuple(blocks),
        "section 4.1 and appendix B.1.1",
    )


def _totals(result: Result, classes: list[dict[str, str]]) -> Table:
    low, high = result.interval
    start = {"none": "scratch"}.get(result.init, result.init)
    rows = [
        ("top-1", percent(result.top1, 2)),
        ("95 % interval over test images", f"{percent(low)} to {percent(high)}"),
        *([] if result.top5 is None else [("top-5", percent(result.top5, 2))]),
        ("mean over the classes", percent(result.balanced, 2)),
        ("always the most frequent class", percent(most_frequent(classes), 2)),
        ("test images", f"{result.test_images:,}"),
        ("training images", f"{result.train_images:,}"),
        ("classes", f"{result.num_classes:,}"),
        ("steps", f"{result.steps:,}"),
        ("learning rate", f"{result.lr:g}"),
        ("started from", start),
    ]
    return Table(("measure", "value"), tuple(rows), "Test results")


def most_frequent(classes: list[dict[str, str]]) -> float | None:
    """Accuracy of always answering the training images' most frequent class; None where that is not known."""
    try:
        tested = [int(row["test_images"]) for row in classes]
        trained = [int(row["train_images"] or 0) for row in classes]
    except (KeyError, ValueError):
        return None
    if not sum(tested) or not sum(trained):
        return None
    return tested[int(np.argmax(trained))] / sum(tested)


def _class_tables(classes: list[dict[str, str]]) -> list[Table]:
    """The classes with the lowest and the highest accuracies; all of them where there are few."""
    tested = [row for row in classes if row.get("accuracy")]
    order = sorted(tested, key=lambda row: float(row["accuracy"]))
    if not order:
        return []
    if len(order) <= 2 * _EXTREMES:
        return [_class_table(order, "All classes, the worst first")]
    return [
        _class_table(order[:_EXTREMES], "The worst classes"),
        _class_table(order[:-_EXTREMES - 1 : -1], f"The best classes of {len(order):,}"),
    ]  # fmt: skip


def _class_table(rows: list[dict[str, str]], caption: str) -> Table:
    cells = (
        (
            shown(row["class"]),
            row["test_images"],
            percent(float(row["accuracy"])),
            shown(row.get("most_confused_with", "")) or NONE,
        )
        for row in rows
    )
    return Table(("class", "test images", "accuracy", "most often taken for"), tuple(cells), caption)


def _confusion(folder: Path, classes: list[dict[str, str]]) -> Picture | None:
    path = folder / "confusion.png"
    try:
        with Image.open(path) as file:
            image = np.asarray(file.convert("RGB"))
    except OSError:
        return None
    order = sorted((row for row in classes if row.get("accuracy")), key=lambda row: float(row["accuracy"]))
    worst = f"; the worst class, {shown(order[0]['class'])}, is right in {percent(float(order[0]['accuracy']))}"
    alt = f"Confusion matrix, rows the true and columns the predicted classes{worst if order else ''}."
    return Picture(
        "class_confusion", alt, image, "Share of each true class (row) by predicted class (column)", width=720
    )


def _sweep(folder: Path) -> Table | None:
    rows = read_csv(folder / "sweep.csv")
    if not rows:
        return None
    cells = []
    for row in rows:
        told = row.get("held_out_top1", "")
        accuracy = percent(float(told)) if told not in ("", "diverged") else told
        cells.append((row.get("lr", ""), accuracy, "yes" if row.get("chosen") == "1" else "no"))
    caption = f"The sweep over learning rates, on {rows[0].get('held_out_images') or 'some'} held-out training images"
    return Table(("learning rate", "held-out top-1", "chosen"), tuple(cells), caption)
