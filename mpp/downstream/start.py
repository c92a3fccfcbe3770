"""Encoders to start from: named weights, frozen or to be tuned, or a new architecture, with settings of their input."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch

from mpp.data.settings import DataConfig
from mpp.data.workers import worker_count
from mpp.dist import World
from mpp.downstream.features import FrozenEncoder
from mpp.downstream.settings import ClassifierConfig, EncoderConfig, FinetuneConfig, LabelledConfig
from mpp.errors import UserError
from mpp.model.encoder import similar_names
from mpp.training.parallel import choose_precision
from mpp.training.run_folder import once_a_machine
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights


def open_frozen(
    init: str,
    of: EncoderConfig,
    layers: Sequence[int | Literal["all"]],
    world: World,
    device: torch.device,
    cache: bool = False,
    quarters: bool = False,
) -> FrozenEncoder:
    """Opens the encoder that `init` names; raises UserError for weights, a layer or a size that there is not."""
    weights = once_a_machine(world, lambda: open_weights(init))
    return FrozenEncoder(
        replace(weights, max_image_mb=of.max_image_mb),
        layers=layers,
        image_hw=(of.img_size[0], of.img_size[-1]) if of.img_size else None,
        device=device,
        precision=choose_precision(of.precision, device, "encoder.precision"),
        workers=worker_count(of.workers, world.local_size),
        cache=cache,
        seed=of.seed,
        quarters=quarters,
    )


def start_weights(config: FinetuneConfig) -> Weights:
    """Opens the weights that `init` names or, for none, makes a new architecture, with the config's input settings.

    Raises:
        UserError: no such weights; settings of a new model beside weights that have their own.
    """
    model = config.model
    if not config.init:
        raise UserError("nothing to start from: give --init runs/first, say, or --init none --model.name NAME")
    if config.init == "none":
        return with_input_settings(_new(model), config.data)
    weights = open_weights(config.init, model.name)
    for key in ("name", "patch_size", "embed_dim", "depth", "num_heads", "in_chans"):
        value = getattr(model, key)
        if value != getattr(ClassifierConfig(), key) and not (key == "name" and value == weights.name):
            raise UserError(f"model.{key} is for --init none; {config.init} has its own")
    return with_input_settings(weights, config.data)


def with_input_settings(weights: Weights, data: LabelledConfig) -> Weights:
    """Gives the weights the config's normalisation, value range and background, where it sets them.

    Raises:
        UserError: settings for another number of channels.
    """
    settings = {key: getattr(data, key) for key in ("mean", "std", "value_range", "background")}
    settings = {key: value for key, value in settings.items() if value}
    replace(DataConfig(), **settings).decode_options(weights.in_chans)
    return replace(weights, max_image_mb=data.max_image_mb, **settings)


def _new(model: ClassifierConfig) -> Weights:
    if not model.name:
        raise UserError("--init none makes a new model: say which by --model.name, such as vit_tiny_patch16_224")
    patch = [model.patch_size[0], model.patch_size[-1]] if model.patch_size else None
    sizes = {"embed_dim": model.embed_dim, "depth": model.depth, "num_heads": model.num_heads, "patch_size": patch}
    args = {key: value for key, value in sizes.items() if value is not None}
    bare = model.name.partition(".")[0]
    if not timm.is_model(bare):
        unknown = f"model.name: timm {timm.__version__} has no model {model.name!r}"
        raise UserError(f"{unknown}; near it: {similar_names(bare)}; timm.list_models() lists them all")
    named = open_weights(f"random:timm:{bare}")
    size = (model.img_size[0], model.img_size[-1]) if model.img_size else named.image_hw
    # timm's entry of that name describes weights that are not taken, so only its name, size and pooling count.
    pool = "avg" if named.pool == "token" else named.pool
    return Weights(named.name, args, None, size, model.in_chans, pool=pool, origin="none")
