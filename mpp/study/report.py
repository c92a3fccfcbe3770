"""What a study leaves beside its data: tables as CSV and Markdown, and pictures, all from study.json's content."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpp.downstream.plots import plot_bars, plot_layers, plot_shots
from mpp.downstream.shots import FewshotResult, Readout
from mpp.files import write_csv
from mpp.study_recipe import SCRATCH

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One side at one share of the labels, over the seeds that are there."""

    labels: str
    side: str
    train_images: int
    steps: int
    seeds: int
    top1: float
    std: float
    gain: float | None
    """Over scratch, the mean of the differences seed by seed; None of scratch itself."""
    gain_std: float | None


def write(folder: Path, document: Document) -> None:
    """Writes runs.csv, table.csv, fewshot.csv, study.md, finetune.png, fewshot.png; of several layers layers.png."""
    rows, shots = table(document), fewshot(document)
    write_csv(folder / "runs.csv", _run_rows(document))
    write_csv(folder / "table.csv", _table_rows(rows))
    write_csv(folder / "fewshot.csv", _fewshot_rows(document))
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        bars = groups.setdefault(f"{row.labels} of the labels", {})
        bars[_side(row.side)] = 100 * row.top1, 100 * row.std
    plot_bars(folder / "finetune.png", groups, "test accuracy after fine-tuning (%)")
    last = max(of.layer for of in shots)
    plot_shots(folder / "fewshot.png", {of.name: result for of, result in shots.items() if of.layer == last})
    if any(of.layer != last for of in shots):
        plot_layers(folder / "layers.png", shots)
    (folder / "study.md").write_text(_markdown(document, rows, shots))


def table(document: Document) -> list[Row]:
    """Every share of the labels, every side at it."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in document["finetuning"]:
        found.setdefault((run["labels"], run["side"]), []).append(run)
    order = document["config"]["labels"]
    rows = []
    for (labels, side), runs in sorted(found.items(), key=lambda of: order.index(of[0][0])):
        scratch = {run["seed"]: run["top1"] for run in found.get((labels, SCRATCH), [])}
        gains = [run["top1"] - scratch[run["seed"]] for run in runs if run["seed"] in scratch and side != SCRATCH]
        size = runs[0]["train_images"], runs[0]["steps"], len(runs)
        over = _mean_std(gains) if gains else (None, None)
        rows.append(Row(labels, side, *size, *_mean_std([run["top1"] for run in runs]), *over))
    return rows


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 of one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def fewshot(document: Document) -> dict[Readout, FewshotResult]:
    """By encoder, layer and pooling: the draws of the shots, one pretraining after the other."""
    found: dict[Readout, dict[int, list[float]]] = {}
    for entry in document["fewshot"]:
        of = Readout(entry["side"], entry["layer"], entry["pool"], entry["depth"])
        found.setdefault(of, {}).setdefault(entry["shots"], []).extend(entry["accuracy"])
    return {of: FewshotResult(tuple(by), np.array(list(by.values())).T) for of, by in found.items()}


def _run_rows(document: Document) -> Iterable[Sequence[Any]]:
    names = "side", "labels", "seed", "pretrain_seed", "length", "lr", "train_images", "top1", "top5", "balanced"
    yield names
    for run in document["finetuning"]:
        yield tuple("" if run[name] is None else run[name] for name in names)


def _table_rows(rows: Iterable[Row]) -> Iterable[Sequence[Any]]:
    yield "labels", "side", "seeds", "top1", "std", "gain", "gain_std"
    for row in rows:
        gains = ("" if value is None else value for value in (row.gain, row.gain_std))
        yield row.labels, row.side, row.seeds, row.top1, row.std, *gains


def _fewshot_rows(document: Document) -> Iterable[Sequence[Any]]:
    yield "encoder", "pretrain_seed", "layer", "pool", "shots", "accuracy", "std", "rank"
    for entry in document["fewshot"]:
        seed = "" if entry["pretrain_seed"] is None else entry["pretrain_seed"]
        place = entry["side"], seed, entry["layer"], entry["pool"], entry["shots"]
        yield *place, *_mean_std(entry["accuracy"]), entry["rank"]


def _side(side: str) -> str:
    return f"from {side}" if side.startswith(SCRATCH) else side


def _markdown(document: Document, rows: Sequence[Row], shots: Mapping[Readout, FewshotResult]) -> str:
    lines = [f"Fine-tuning, test accuracy in %, {_over(max(row.seeds for row in rows), 'seed')}:", ""]
    sides = list(dict.fromkeys(row.side for row in rows))
    lines += _two_sides(rows, sides) if len(sides) == 2 else _many_sides(rows)
    draws = max(len(result.accuracy) for result in shots.values())
    counts = next(iter(shots.values())).shots
    lines += ["", f"Few-shot accuracy on frozen features in %, {_over(draws, 'draw')} of the shots:", ""]
    lines += _markdown_table(
        ("encoder", *(f"{n} shot{'s' * (n > 1)}" for n in counts)),
        ((of.name, *map(_percent, result.mean, result.spread)) for of, result in shots.items()),
    )
    probes: dict[str, list[float]] = {}
    for probe in document["probes"]:
        probes.setdefault(probe["side"], []).append(probe["top1"])
    if probes:
        lines += ["", "Linear probe on all labels, test accuracy in %:", ""]
        cells = ((side, _percent(*_mean_std(top1))) for side, top1 in probes.items())
        lines += _markdown_table(("encoder", "top-1"), cells)
    seen = {run["arm"]: (run["images"], run["steps"]) for run in document["pretraining"]}
    for arm, (images, steps) in seen.items():
        of = f" of {arm}" if len(seen) > 1 else ""
        lines += ["", f"Pretraining{of}: {images:,} images, {steps:,} steps."]
    return "\n".join(lines) + "\n"


def _two_sides(rows: Sequence[Row], sides: Sequence[str]) -> list[str]:
    """Scratch and one pretraining, side by side."""
    pairs: dict[str, list[Row]] = {}
    for row in rows:
        pairs.setdefault(row.labels, []).append(row)
    cells = (
        (labels, f"{scratch.train_images:,}", f"{scratch.steps:,}", *(_percent(of.top1, of.std) for of in pair),
         f"{100 * (pair[1].top1 - scratch.top1):+.1f}")
        for labels, pair in pairs.items() for scratch in pair[:1]
    )  # fmt: skip
    return _markdown_table(("labels", "images", "steps", *map(_side, sides), "gain"), cells)


def _many_sides(rows: Sequence[Row]) -> list[str]:
    cells = (
        (row.labels, f"{row.train_images:,}", _side(row.side), f"{row.steps:,}", _percent(row.top1, row.std),
         "" if row.gain is None or row.gain_std is None else f"{100 * row.gain:+.1f} ± {100 * row.gain_std:.1f}")
        for row in rows
    )  # fmt: skip
    return _markdown_table(("labels", "images", "side", "steps", "top-1", "gain"), cells)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _over(number: int, what: str) -> str:
    return f"mean ± standard deviation over {number} {what}{'s' * (number > 1)}"


def _percent(mean: float, std: float) -> str:
    return f"{100 * mean:.1f} ± {100 * std:.1f}"
