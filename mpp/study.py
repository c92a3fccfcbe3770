"""One command that says what the pretraining is worth.

pretrain (or take a run)                                   run_dir/pretrain
fine-tune {scratch, pretrained} x labels x seeds           run_dir/finetune/SIDE/labels_SHARE/seed_N
few-shot on {random, pretrained} x layers x poolings       run_dir/fewshot.csv
one table with mean and spread, and pictures               run_dir/study.md, table.csv, runs.csv, *.png

Both sides have the same architecture, recipe, number of steps and, per seed, the same labelled images; from scratch
means random:RUN, the run's encoder freshly initialised. Where finetune.optim.lr has several values, each side chooses
its own for each share of the labels, on held-out training images, with the first seed. What is finished is not done
again.
"""

import contextlib
import csv
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import differences, from_file, to_dict, to_yaml
from mpp.downstream.finetune import Result, finished
from mpp.downstream.finetune import run as finetune
from mpp.downstream.labelled import open_labelled
from mpp.downstream.plots import plot_bars, plot_shots
from mpp.downstream.shots import FewshotResult
from mpp.errors import RunError, UserError
from mpp.evaluate import fewshot_results
from mpp.pretrain import run as pretrain
from mpp.recipes import FewshotRecipe, FinetuneConfig, FrozenConfig, StudyConfig
from mpp.train.log import read_rows
from mpp.weights.opening import open_weights

SIDES = ("scratch", "pretrained")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the study."""

    side: str
    labels: str
    length: str
    seed: int


def run(config: StudyConfig) -> int:
    """Runs the study, or goes on with it. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written, or a study of another config in run_dir.
        RunError: a part that had to stop.
    """
    folder = Path(config.run_dir)
    labelled = open_labelled(config.data, config.test)
    print(
        f"labels: {len(labelled.train_indices):,} training and {len(labelled.test_indices):,} test images", flush=True
    )
    for note in labelled.notes:
        print(f"note: {note}", file=sys.stderr)
    if config.init:
        open_weights(config.init)
    _claim(folder, config)
    init = config.init
    if not init:
        init = str(folder / "pretrain")
        status = _pretrain(config, folder / "pretrain")
        if status:
            return status
    results: dict[Cell, Result] = {}
    cells = _cells(config)
    rates: dict[tuple[str, str], float] = {}
    for number, cell in enumerate(cells, 1):
        one = _finetune_config(config, cell, init, rates.get((cell.side, cell.labels)))
        status, result = _tuned(one, f"[{number}/{len(cells)}] {_told(cell)}")
        if result is None:
            return status
        rates.setdefault((cell.side, cell.labels), result.lr)
        results[cell] = result
    shots = _fewshot(config, init)
    _write(config, folder, results, shots, init)
    print((folder / "study.md").read_text())
    return 0


def _claim(folder: Path, config: StudyConfig) -> None:
    """Writes config.yaml; refuses a folder with a study of another config."""
    path = folder / "config.yaml"
    if path.exists():
        changed = differences(StudyConfig, to_dict(from_file(StudyConfig, path)), to_dict(config))
        started = (folder / "pretrain" / "checkpoints").exists() or (folder / "finetune").exists()
        if changed and started:
            raise UserError(
                f"{folder} holds a study with another config ({'; '.join(changed)}); choose another --run-dir"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to the study's folder {folder}: {error.strerror}") from error


def _cells(config: StudyConfig) -> list[Cell]:
    """Both sides of a setting next to each other, so that a study that is stopped early has pairs."""
    lengths = config.lengths or (config.finetune.train.length,) * len(config.labels)
    return [
        Cell(side, labels, length, seed)
        for labels, length in zip(config.labels, lengths, strict=True)
        for seed in config.seeds
        for side in SIDES
    ]


def _told(cell: Cell) -> str:
    return f"{cell.side}, {cell.labels} of the labels, seed {cell.seed}"


@contextlib.contextmanager
def _logged(folder: Path) -> Generator[None]:
    """What a part of the study says goes to log.txt in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _pretrain(config: StudyConfig, folder: Path) -> int:
    told = config.pretrain
    source = told.data.source or config.data
    told = replace(told, run_dir=str(folder), data=replace(told.data, source=source))
    began = time.perf_counter()
    print(f"pretraining: {told.train.length}; see {folder / 'log.txt'}", flush=True)
    with _logged(folder):
        status = pretrain(told)
    print(f"pretraining: {'done' if not status else 'stopped'} after {time.perf_counter() - began:.0f} s", flush=True)
    return status


def _finetune_config(config: StudyConfig, cell: Cell, init: str, lr: float | None) -> FinetuneConfig:
    told = config.finetune
    folder = Path(config.run_dir) / "finetune" / cell.side / f"labels_{cell.labels.rstrip('%')}" / f"seed_{cell.seed}"
    data = replace(told.data, source=config.data, test=config.test, labels=cell.labels, labels_seed=cell.seed)
    return replace(
        told,
        init=f"random:{init}" if cell.side == "scratch" else init,
        run_dir=str(folder),
        data=data,
        train=replace(told.train, length=cell.length, seed=cell.seed),
        optim=replace(told.optim, lr=told.optim.lr if lr is None else (lr,)),
    )


def _tuned(config: FinetuneConfig, name: str) -> tuple[int, Result | None]:
    """The exit status and the result of one fine-tuning run, which is done now unless it was before."""
    result = finished(config)
    began = time.perf_counter()
    how = "was done before"
    if result is None:
        try:
            with _logged(Path(config.run_dir)):
                status = finetune(config)
        except RunError as error:
            raise RunError(f"{name}: {error}") from error
        result = finished(config)
        if status or result is None:
            return status, None
        how = f"{time.perf_counter() - began:.0f} s"
    print(f"{name}: top-1 {result.top1:.2%} (optim.lr {result.lr:g}; {how})", flush=True)
    return 0, result


def _fewshot(config: StudyConfig, init: str) -> dict[str, FewshotResult]:
    """By encoder, pooling and layer."""
    found: dict[str, FewshotResult] = {}
    train = config.finetune.train
    for layer in config.layers:
        encoder = FrozenConfig(layer=layer, device=train.device, precision=train.precision)
        recipe = FewshotRecipe(
            (f"random:{init}", init),
            config.data,
            config.test,
            shots=config.shots,
            seeds=config.seeds,
            l2=config.l2,
            encoder=encoder,
        )
        found |= fewshot_results(recipe)
    short = {f"random:{init}": "random", init: "pretrained"}
    return {name.replace(f"random:{init}", "random").replace(init, short[init]): r for name, r in found.items()}


def _write(
    config: StudyConfig, folder: Path, results: dict[Cell, Result], shots: dict[str, FewshotResult], init: str
) -> None:
    """All that the study leaves beside its runs."""
    _write_csv(folder / "runs.csv", _run_rows(results))
    rows = _table(config, results)
    _write_csv(
        folder / "table.csv", [("labels", "scratch", "scratch_std", "pretrained", "pretrained_std", "gain"), *rows]
    )
    _write_csv(folder / "fewshot.csv", _fewshot_rows(shots))
    groups = {row[0]: {"from scratch": (row[1], row[2]), "pretrained": (row[3], row[4])} for row in rows}
    plot_bars(folder / "finetune.png", groups, "test accuracy after fine-tuning")
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
    lines += ["", f"Few-shot accuracy on frozen features in %, {seeds.replace('seed', 'draw')}:", ""]
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


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
