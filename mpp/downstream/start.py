"""Encoders to start from, frozen or to be tuned, with settings of their input; and a head that reads them well."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import mpp.system.timm_import  # noqa: F401

# isort: split
import numpy as np
import timm
import torch
from torch import Tensor, nn

from mpp import dist
from mpp.data.settings import DataConfig
from mpp.data.transform import EvalTransform, normalise
from mpp.data.workers import worker_count
from mpp.dist import World
from mpp.downstream.features import FrozenEncoder, extract_by_all
from mpp.downstream.labelled import Labelled
from mpp.downstream.logistic import fit_linear
from mpp.downstream.settings import ClassifierConfig, EncoderConfig, FinetuneConfig, LabelledConfig
from mpp.errors import UserError
from mpp.model.encoder import similar_names
from mpp.training.parallel import autocast, choose_precision
from mpp.training.run_folder import once_a_machine
from mpp.weights.base import Weights, classifier_names
from mpp.weights.opening import open_weights

_HEAD_L2 = 50  # of the sum of the losses: about the best of a grid at 50, 200 and 500 images of CIFAR-10


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


def linear_head(model: nn.Module) -> nn.Linear | None:
    """Gives the classification head of a timm model; None if that is not one linear layer."""
    modules = dict(model.named_modules())
    layers = [modules.get(prefix.removesuffix(".")) for prefix in classifier_names(model)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def fit_head(
    model: Any,
    labelled: Labelled,
    weights: Weights,
    image_hw: tuple[int, int],
    device: torch.device,
    precision: str,
    workers: int,
) -> None:
    """Sets the new head of a model on `device` to the logistic regression of the training images, by all ranks.

    The first steps, of a head that knows nothing yet, would else spoil the encoder (A. Kumar et al., "Fine-Tuning can
    Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022). A class without training images is
    made as likely as the least likely one.

    Raises:
        UserError: a model whose head is not one linear layer.
    """
    head = linear_head(model)
    if head is None:
        raise UserError(f"model.head probe: the head of {weights.name} is not one linear layer; take linear")

    def encode(images: Tensor) -> Tensor:
        with autocast(precision, device):
            tokens = model.forward_features(normalise(images, weights.mean, weights.std))
            return model.forward_head(tokens, pre_logits=True).float()

    model.eval()
    images = labelled.train, labelled.train_indices, EvalTransform(image_hw, weights.framing), weights.reading
    features, decoded = extract_by_all(encode, *images, device, workers=workers)
    model.train()
    truth = labelled.truth(labelled.train_labels[decoded])
    probe = fit_linear(features, truth, len(labelled.classes), _HEAD_L2 / len(features))
    known = np.isfinite(probe.bias)
    weight = probe.weights / probe.std[:, None]
    bias = np.where(known, probe.bias, probe.bias[known].min()) - probe.mean @ weight
    weight, bias = dist.gather((weight, bias))[0]  # the first rank's: processors may round differently
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight.T))
        head.bias.copy_(torch.from_numpy(bias))


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
