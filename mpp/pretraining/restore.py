"""The model of a pretraining run, back from its checkpoints: with the objective's head, or as plain weights."""

import sys
from pathlib import Path

from mpp.config import from_file
from mpp.errors import UserError
from mpp.objective.objective import MaskedPatchPrediction
from mpp.pretraining.build import FIRST, build_model, weights_of
from mpp.pretraining.settings import PretrainConfig
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights


def weights_or_checkpoint(spec: str) -> Weights:
    """As `open_weights`, and of a run without a model/ yet, or of `RUN/checkpoints/step_N`, the encoder at that step.

    Raises:
        UserError: see `open_weights`; a checkpoint of another kind of run, or one that is damaged.
    """
    path = Path(spec).expanduser()
    ours = path.parent.name == "checkpoints" and path.name.startswith("step_")
    checkpoint = path if ours and path.exists() else None
    if (path / "config.yaml").is_file() and not (path / "model" / "config.json").is_file():
        checkpoint = Checkpoints(path / "checkpoints").latest()
        if checkpoint:
            print(f"note: this run has not ended; its newest checkpoint is taken, {checkpoint.name}", file=sys.stderr)
    if checkpoint is None:
        return open_weights(spec)
    config, model = restored(checkpoint)
    return weights_of(config, model.encoder, str(checkpoint))


def first_weights(run: Path) -> Weights:
    """What the run in this folder began with: the weights of its init, which it kept, or new ones, drawn again.

    Raises:
        UserError: a run of another kind; one that lacks the folder that it kept them in.
    """
    config = from_file(PretrainConfig, run / "config.yaml")
    if config.init:
        return open_weights(str(run / FIRST))
    return weights_of(config, build_model(config, "cpu").encoder, f"{run}, untrained")


def restored(path: Path) -> tuple[PretrainConfig, MaskedPatchPrediction]:
    """The config of a run and its model at `RUN/checkpoints/step_N`, on the CPU: the moving average, if it has one.

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
