"""What a fine-tuning starts from: named weights, or a new architecture, and what the config says of their input."""

import difflib
from dataclasses import replace

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import timm

from mpp.data.settings import DataConfig
from mpp.downstream.settings import ClassifierConfig, FinetuneConfig, LabelledConfig
from mpp.errors import UserError
from mpp.weights.base import Weights
from mpp.weights.opening import open_weights


def starting_weights(config: FinetuneConfig) -> Weights:
    """What the run starts from: the weights that `init` names or, for none, a new architecture; then what the config
    says of size and normalisation.

    Raises:
        UserError: no such weights; settings of a new model beside weights that have their own.
    """
    model = config.model
    if not config.init:
        raise UserError("nothing to start from: give --init runs/first, say, or --init none --model.name NAME")
    if config.init == "none":
        weights = _new(model)
    else:
        weights = open_weights(config.init)
        fresh = ClassifierConfig()
        for key in ("name", "patch_size", "embed_dim", "depth", "num_heads", "in_chans"):
            if getattr(model, key) != getattr(fresh, key):
                raise UserError(f"model.{key} is for --init none; {config.init} has its own")
    size = (model.img_size[0], model.img_size[-1]) if model.img_size else weights.image_hw
    if config.init == "none":
        weights = replace(weights, image_hw=size)
    return described(weights, config.data)


def described(weights: Weights, data: LabelledConfig) -> Weights:
    """The weights with what the config says of their input.

    Raises:
        UserError: settings of another number of channels.
    """
    told = {key: getattr(data, key) for key in ("mean", "std", "value_range", "background")}
    replace(DataConfig(), **{key: value for key, value in told.items() if value}).reading(weights.in_chans)
    return replace(weights, max_image_mb=data.max_image_mb, **{key: value for key, value in told.items() if value})


def _new(model: ClassifierConfig) -> Weights:
    if not model.name:
        raise UserError("--init none makes a new model: say which by --model.name, such as vit_tiny_patch16_224")
    told = {"embed_dim": model.embed_dim, "depth": model.depth, "num_heads": model.num_heads}
    if model.patch_size:
        told["patch_size"] = [model.patch_size[0], model.patch_size[-1]]  # pyright: ignore[reportArgumentType]
    args = {key: value for key, value in told.items() if value is not None}
    bare = model.name.partition(".")[0]
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), 3)
        known = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them all"
        raise UserError(f"model.name: timm {timm.__version__} has no model {model.name!r}; {known}")
    weights = open_weights(f"random:timm:{bare}")
    # timm's entry of that name describes weights that are not taken.
    own = Weights(weights.name, args, None, weights.image_hw, model.in_chans, pool=weights.pool, origin="none")
    return replace(own, pool="avg") if own.pool == "token" else own
