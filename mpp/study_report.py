"""What a study leaves beside its runs: tables as CSV and Markdown, and pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpp.downstream.account import Result
from mpp.downstream.plots import plot_bars, plot_shots
from mpp.downstream.shots import FewshotResult
from mpp.files import write_csv
from mpp.recipes import StudyConfig
from mpp.train.log import read_rows

SIDES = ("scratch", "pretrained")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the study."""

    side: str
    labels: str
    length: str
    seed: int


def write(
    config: StudyConfig, folder: Path, results: dict[Cell, Result], shots: dict[str, FewshotResult], init: str
) -> None:
    """Writes runs.csv, table.csv, fewshot.csv, finetune.png, fewshot.png and study.md."""
    write_csv(folder / "runs.csv", _run_rows(results))
    rows = _table(config, results)
    write_csv(
        folder / "table.csv", [("labels", "scratch", "scratch_std", "pretrained", "pretrained_std", "gain"), *rows]
    )
    write_csv(folder / "fewshot.csv", _fewshot_rows(shots))
    groups = {
        f"{row[0]} of the labels": {
            "from scratch": (100 * row[1], 100 * row[2]),
            "pretrained": (100 * row[3], 100 * row[4]),
        }
        for row in rows
    }
    plot_bars(folder / "finetune.png", groups, "test accuracy after fine-tuning (%)")
    plot_shots(folder / "fewshot.png", shots)
    (folder / "study.md").write_text(_markdown(config, results, rows, shots, init))


def _run_rows(results: dict[Cell, Result]) -> Iterable[Sequence[Any]]:
    yield "side", "labels", "seed", "length", "lr", "train_images", "top1", "top5", "balanced"
    for cell, result in results.items():
        top5 = "" if result.top5 is None else result.top5
        yield (
            cell.side, cell.labels, cell.seed, cell.length, result.lr, result.train_images, result.top1, top5,
            result.balanced,
        )  # fmt: skip


def _table(config: StudyConfig, results: dict[Cell, Result]) -> list[tuple[str, float, float, float, float, float]]:
    """Labels; mean and standard deviation over the seeds of both sides; gain."""
    rows = []
    for labels in config.labels:
        means, stds = [], []
        for side in SIDES:
            values = np.array([r.top1 for cell, r in results.items() if (cell.side, cell.labels) == (side, labels)])
            means.append(float(values.mean()))
            stds.append(float(values.std(ddof=1)) if len(values) > 1 else 0.0)
        rows.append((labels, means[0], stds[0], means[1], stds[1], means[1] - means[0]))
    return rows


def _fewshot_rows(shots: dict[str, FewshotResult]) -> Iterable[Sequence[Any]]:
    yield "encoder", "shots", "accuracy", "std"
    for name, result in shots.items():
        for column, number in enumerate(result.shots):
            yield name, number, float(result.mean[column]), float(result.spread[column])


def _markdown(
    config: StudyConfig,
    results: dict[Cell, Result],
    rows: list[tuple[str, float, float, float, float, float]],
    shots: dict[str, FewshotResult],
    init: str,
) -> str:
    seeds = f"mean ± standard deviation over {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}"
    lines = [
        f"Fine-tuning, test accuracy in %, {seeds}:",
        "",
        "| labels | images | steps | from scratch | pretrained | gain |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for labels, scratch, scratch_std, pretrained, pretrained_std, gain in rows:
        one = next(result for cell, result in results.items() if cell.labels == labels)
        sides = f"{_percent(scratch, scratch_std)} | {_percent(pretrained, pretrained_std)}"
        lines.append(f"| {labels} | {one.train_images:,} | {one.steps:,} | {sides} | {100 * gain:+.1f} |")
    lines += ["", f"Few-shot accuracy on frozen features in %, {seeds.replace('seed', 'draw')} of the shots:", ""]
    lines.append("| encoder | " + " | ".join(f"{n} shot{'s' * (n > 1)}" for n in config.shots) + " |")
    lines.append("|---" * (1 + len(config.shots)) + "|")
    for name, result in shots.items():
        cells = (_percent(m, s) for m, s in zip(result.mean, result.spread, strict=True))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    trained = [row for row in read_rows(Path(init) / "metrics.jsonl") if "loss" in row]
    if trained:
        last = trained[-1]
        lines += ["", f"Pretraining: {last['images']:,} images, {last['step']:,} steps."]
    return "\n".join(lines) + "\n"


def _percent(mean: float, std: float) -> str:
    return f"{100 * mean:.1f} ± {100 * std:.1f}"
