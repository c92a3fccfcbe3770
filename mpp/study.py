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
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from mpp.config import differences, from_file, to_dict, to_yaml
from mpp.dist import World
from mpp.downstream.account import Inputs, Result, finished
from mpp.downstream.config import parse_share
from mpp.downstream.finetune import run as finetune
from mpp.downstream.frozen import Frozen
from mpp.downstream.labelled import Labelled, hold_out, open_labelled, take_fraction
from mpp.downstream.shots import FewshotResult
from mpp.downstream.starting import described
from mpp.downstream.tuning import build_tuning
from mpp.errors import RunError, UserError
from mpp.evaluate import fewshot_results
from mpp.parts import build_model
from mpp.pretrain import run as pretrain
from mpp.recipes import FewshotRecipe, FinetuneConfig, FrozenConfig, StudyConfig
from mpp.study_report import SIDES, Cell, write
from mpp.views.page import tell_of_run
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import model_args


def run(config: StudyConfig) -> int:
    """Runs the study, or goes on with it. Returns the exit status: 0, or 75 after a requested stop.

    Raises:
        UserError: bad input, before anything is written, or a study of another config in run_dir.
        RunError: a part that had to stop.
    """
    folder = Path(config.run_dir)
    labelled = open_labelled(config.data, config.test)
    trained, tested = len(labelled.train_indices), len(labelled.test_indices)
    print(f"labels: {trained:,} training and {tested:,} test images", flush=True)
    for note in labelled.notes:
        print(f"note: {note}", file=sys.stderr)
    _check(config, labelled)
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
    names = {"scratch": f"random:{init}", "pretrained": init}
    weights = {side: described(open_weights(name), config.finetune.data) for side, name in names.items()}
    inputs = {side: Inputs.of(of, labelled) for side, of in weights.items()}
    for number, cell in enumerate(cells, 1):
        one = _finetune_config(config, cell, init, rates.get((cell.side, cell.labels)))
        status, result = _tuned(one, inputs[cell.side], f"[{number}/{len(cells)}] {_told(cell)}")
        if result is None:
            return status
        rates.setdefault((cell.side, cell.labels), result.lr)
        results[cell] = result
    shots = _fewshot(config, init)
    write(config, folder, results, shots, init)
    if not config.init and config.pretrain.log.report:  # which can now tell what the pretraining was worth
        tell_of_run(init, config.pretrain.train.device)
    print((folder / "study.md").read_text())
    return 0


def _check(config: StudyConfig, labelled: Labelled) -> None:
    """Builds, with fresh weights, all that the study will build after hours of pretraining.

    Raises:
        UserError: what cannot be built, or a study that would pretrain on its own test images.
    """
    if config.init:
        weights = replace(open_weights(config.init), state=None)
    else:
        if labelled.test is labelled.train and not config.pretrain.data.source:
            raise UserError(
                f"{config.data} has no test split of its own, so that the pretraining would see the images held out as "
                "the test: name other images for one of them, by --test or --pretrain.data.source"
            )
        told, data = config.pretrain.model, config.pretrain.data
        build_model(config.pretrain, "meta")
        fresh = Weights(told.name, model_args(told), None, told.image_hw, told.in_chans, data.mean, data.std)
        weights = replace(fresh, value_range=data.value_range, background=data.background)
    device = torch.device("cpu")
    for layer in config.layers:
        Frozen(replace(weights, origin="the encoder"), layer=layer, device=device)
    for cell in {cell.labels: cell for cell in _cells(config)}.values():
        one = _finetune_config(config, cell, "random")
        labels = take_fraction(labelled.train_labels, len(labelled.classes), cell.labels, cell.seed)
        part = replace(labelled, train_labels=labels)
        if len(one.optim.lr) > 1:
            part = hold_out(part, parse_share(one.data.holdout), cell.seed)
        build_tuning(one, part, max(one.optim.lr), World(), device, weights)


def _claim(folder: Path, config: StudyConfig) -> None:
    """Writes config.yaml; refuses a folder with a study of another config. What only adds to a study may change."""
    path = folder / "config.yaml"
    if path.exists():
        try:
            before = from_file(StudyConfig, path)
        except UserError as error:
            raise UserError(
                f"{folder} holds something else than a study; choose another --run-dir ({error})"
            ) from error
        changed = differences(StudyConfig, to_dict(before), to_dict(config))
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


def _finetune_config(config: StudyConfig, cell: Cell, init: str, lr: float | None = None) -> FinetuneConfig:
    told = config.finetune
    folder = Path(config.run_dir) / "finetune" / cell.side / f"labels_{cell.labels.rstrip('%')}" / f"seed_{cell.seed}"
    data = replace(told.data, source=config.data, test=config.test, labels=cell.labels, labels_seed=cell.seed)
    lrs = told.optim.lr if lr is None else (lr,)
    return replace(
        told,
        init=f"random:{init}" if cell.side == "scratch" else init,
        run_dir=str(folder),
        data=data,
        train=replace(told.train, length=cell.length, seed=cell.seed),
        # What lies below has learnt nothing yet that a lower rate would keep.
        optim=replace(told.optim, lr=lrs, layer_decay=1.0 if cell.side == "scratch" else told.optim.layer_decay),
    )


def _tuned(config: FinetuneConfig, inputs: Inputs, name: str) -> tuple[int, Result | None]:
    """The exit status and the result of one fine-tuning run, which is done now unless it was before."""
    result = finished(config, inputs)
    began = time.perf_counter()
    how = "was done before"
    if result is None:
        try:
            with _logged(Path(config.run_dir)):
                status = finetune(config)
        except RunError as error:
            raise RunError(f"{name}: {error}") from error
        result = finished(config, inputs)
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
        for side, name in (("random", f"random:{init}"), ("pretrained", init)):
            recipe = FewshotRecipe(
                (name,),
                config.data,
                config.test,
                shots=config.shots,
                seeds=config.seeds,
                l2=config.l2,
                encoder=encoder,
            )
            found |= {side + key.removeprefix(name): result for key, result in fewshot_results(recipe).items()}
    return found
