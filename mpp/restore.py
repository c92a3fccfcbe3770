"""The model of a pretraining run, back from its checkpoints: with the objective's head, or as plain weights."""

import sys
from pathlib import Path

import numpy as np

from mpp.config import from_file
from mpp.errors import UserError
from mpp.model.encoder import Encoder
from mpp.objective.objective import MaskedPatchPrediction
from mpp.parts import FIRST, build_model, weights_of
from mpp.recipes import FinetuneConfig, PretrainConfig
from mpp.sources.base import Source, SourceError
from mpp.sources.opening import open_source
from mpp.sources.overlap import shared
from mpp.sources.patterns import shown
from mpp.train.checkpoint import Checkpoints, load_checkpoint
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights


def weights_or_checkpoint(spec: str) -> Weights:
    """As `open_weights`, and of a run without a model/ yet, or of `RUN/checkpoints/step_N`, the encoder at that step.

    Raises:
        UserError: see `open_weights`; a checkpoint of another kind of run, or one that is damaged.
    """
    path = Path(spec).expanduser()
    checkpoint = path if path.exists() and path.parent.name == "checkpoints" else None
    if (path / "config.yaml").is_file() and not (path / "model" / "config.json").is_file():
        checkpoint = Checkpoints(path / "checkpoints").latest()
        if checkpoint:
            print(f"note: this run has not ended; its newest checkpoint is taken, {checkpoint.name}", file=sys.stderr)
    return open_weights(spec) if checkpoint is None else _encoder(checkpoint)


def _encoder(path: Path) -> Weights:
    config, model = restored(path)
    return weights_of(config, model.encoder, str(path))


def notes_on_pretraining(init: str, test: Source, indices: np.ndarray) -> list[str]:
    """What is to be said of test images that weights were pretrained on, as far as runs of this library tell.

    Args:
        init: as `open_weights` takes it; what its run went on from is looked into, too.
        test: source of the test images.
        indices: int64 (n,), which of its images are tested.
    """
    notes: list[str] = []
    known: set[Path] = set()
    while (run := _run_of(init)) is not None and run.resolve() not in known:
        known.add(run.resolve())
        try:
            config = from_file(PretrainConfig, run / "config.yaml")
        except UserError:  # of a fine-tuning, say, whose own images it held apart
            try:
                init = from_file(FinetuneConfig, run / "config.yaml").init
            except UserError:
                break
            continue
        init, what = config.init, f"the pretraining data of {run}, {shown(config.data.source)}"
        try:
            there = None if "://" in config.data.source else open_source(config.data.source)
        except SourceError as error:
            notes.append(f"the test images were not compared with {what}: {error}")
            continue
        notes += [f"the test images were not compared with {what}"] if there is None else []
        notes += [] if there is None else shared(test, indices, there).sentences(what)
    return notes


def _run_of(init: str) -> Path | None:
    """The run folder that weights are of, by its name, its model's or a checkpoint's."""
    path = Path(init).expanduser()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    elif path.name == "model":
        path = path.parent
    return path if init and (path / "config.yaml").is_file() else None


def first_weights(run: Path) -> Weights:
    """What a pretraining run began with: the weights of its init, which it kept, or its own first ones, drawn again.

    Args:
        run: its folder.

    Raises:
        UserError: a run of another kind; one that lacks the folder that it kept them in.
    """
    config = from_file(PretrainConfig, run / "config.yaml")
    if config.init:
        return open_weights(str(run / FIRST))
    return weights_of(config, build_model(config, "cpu").encoder, f"{run}, untrained")


def restored(path: Path) -> tuple[PretrainConfig, MaskedPatchPrediction[Encoder]]:
    """The config of a pretraining run and its model at a checkpoint, on the CPU: the moving average, where it has one.

    Args:
        path: the checkpoint, `RUN/checkpoints/step_N`.

    Raises:
        UserError: a checkpoint of another kind of run, or one that is damaged.
    """
    run = path.parent.parent
    try:
        config = from_file(PretrainConfig, run / "config.yaml")
    except (UserError, OSError) as error:
        raise UserError(f"{path}: only checkpoints of pretraining can be opened ({error})") from error
    model, state = build_model(config, "cpu"), load_checkpoint(path)
    average = {name.removeprefix("module."): value for name, value in (state["ema"] or {}).items()}
    average.pop("n_averaged", None)
    try:
        model.load_state_dict(average or state["model"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {run / 'config.yaml'}") from error
    return config, model
