"""Going on with masked patch prediction from weights that are there already.

settled(init, weights, model, data)      the configs with what the weights say, so that a run's config is whole
build_continued(model, init_args, ...)   the encoder that these configs describe, new
load_first(encoder, weights)             the weights put into it

timm has more arguments than `ModelConfig` has settings, and some weights come from code that computes otherwise than
timm: what the settings cannot say are the `init_args`, texts such as "mlp_ratio=2.0" or "norm_eps=1e-12".
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import timm
import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer

from mpp.data.settings import DataConfig
from mpp.errors import UserError
from mpp.model.block import Block
from mpp.model.encoder import Encoder, check_size, check_vit, put_on_device
from mpp.model.settings import ModelConfig
from mpp.weights.base import Weights, create, is_vit, load, resampled
from mpp.weights.heads import classifier_names
from mpp.weights.init_args import parse_init_args, write_init_args
from mpp.weights.plain_vit import activation
from mpp.weights.timm_folder import model_args

_ARCHITECTURE = ("name", "patch_size", "embed_dim", "depth", "num_heads", "in_chans", "pos_embed", "act")
_INPUT = ("mean", "std", "value_range", "background")
# timm keeps DeiT's models, which are ViTs of the same sizes, in a file of their own.
_DEIT = {"deit_": {}, "deit3_": {"no_embed_class": True, "init_values": 1e-6}}


def settled(
    init: str, weights: Weights, model: ModelConfig, data: DataConfig
) -> tuple[ModelConfig, DataConfig, tuple[str, ...]]:
    """The configs with what the weights say where they are at their defaults, and the `init_args`.

    Raises:
        UserError: weights that are not a ViT's or that masked patch prediction cannot go on from; settings of `model`
            that contradict them, or of `data` for another number of channels; a size of broken patches.
    """
    if weights.state is None:
        raise UserError(f"--init {init} has no weights to go on from; leave it out for new ones")
    weights = _as_vit(weights)
    if not is_vit(weights.name):
        raise UserError(
            f"--init {init} is timm's {weights.name!r}, not a VisionTransformer, which masked patch prediction needs; "
            "take one, such as vit_base_patch16_224"
        )
    with torch.device("meta"):
        vit: Any = create(replace(weights, state=None, pool="avg"))
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"--init {init} is timm's {weights.name!r}, a {type(vit).__name__}; masked patch prediction needs a "
            "VisionTransformer"
        )
    check_vit(vit, f"--init {init}")
    own, init_args = _said(weights, vit)
    model = adopted(init, model, own)
    check_size(vit, model.image_hw)
    told = DataConfig(**{key: getattr(weights, key) for key in _INPUT})
    data = adopted_input(data, told)
    data.decode_options(model.in_chans)
    return model, data, init_args


def adopted(init: str, given: ModelConfig, own: ModelConfig) -> ModelConfig:
    """The settings given, with the weights' own architecture, and with their size unless another was given.

    Raises:
        UserError: settings that were given and contradict the weights.
    """
    default = ModelConfig()
    for key in _ARCHITECTURE:
        value, its = getattr(given, key), getattr(own, key)
        if value != getattr(default, key) and _pair(value) != _pair(its):
            raise UserError(
                f"model.{key} {_shown(value)} contradicts --init {init}, which has {_shown(its)}; leave it out"
            )
    told = {key: getattr(own, key) for key in _ARCHITECTURE}
    return replace(given, img_size=own.img_size if given.img_size == default.img_size else given.img_size, **told)


def adopted_input(given: DataConfig, own: DataConfig) -> DataConfig:
    """The settings given, and of those at their defaults what the weights have of normalisation and values."""
    default = DataConfig()
    left = [key for key in _INPUT if getattr(given, key) == getattr(default, key)]
    return replace(given, **{key: getattr(own, key) for key in left})


def build_continued(
    config: ModelConfig,
    init_args: Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """As `build_encoder`, of an architecture that `config` cannot name alone.

    Raises:
        UserError: what timm refuses; a kernel that cannot run; `init_args` of another form.
    """
    device = torch.device(device)
    args, numerics = parse_init_args(init_args)
    args = model_args(config) | args
    told = Weights(config.name, args, None, config.image_hw, config.in_chans, numerics=numerics)
    with torch.device("meta"):
        plain = all(type(block) is TimmBlock for block in create(told).blocks)
    if plain:
        told = replace(told, args=args | {"block_fn": Block})
    with torch.device("meta" if device.type == "meta" else "cpu"):
        vit = create(told, drop_path=config.drop_path)
    return put_on_device(Encoder(vit), config, device, dtype)


def load_first(encoder: Encoder, weights: Weights) -> None:
    """Puts the weights into the encoder of their architecture; position embeddings are resampled to its size.

    Their head, or their pooling by attention, is left out. A last norm that they have after the pooling becomes the
    encoder's last norm, of each token (as in `mpp.report.inspection`): the mean of its tokens is nearly what they pool.

    Raises:
        UserError: names or shapes that do not fit.
    """
    weights = _as_vit(weights)
    dropped = (*classifier_names(encoder.vit), "head.", "attn_pool.")
    kept = {name: value for name, value in (weights.state or {}).items() if not name.startswith(dropped)}
    state = {re.sub("^fc_norm[.]", "norm.", name): value for name, value in kept.items()}
    if encoder.vit.pos_embed is not None and "pos_embed" in state:
        state["pos_embed"] = resampled(state["pos_embed"], weights, encoder.vit)
    load(encoder.vit, state, weights.origin or weights.name, head=False)


def _as_vit(weights: Weights) -> Weights:
    """Of DeiT's models the same as timm's ViT of that size; others as they are."""
    for prefix, args in _DEIT.items():
        name = weights.name.replace(prefix, "vit_", 1)
        if weights.name.startswith(prefix) and timm.is_model(name):
            return replace(weights, name=name, args=args | dict(weights.args))
    return weights


def _said(weights: Weights, vit: Any) -> tuple[ModelConfig, tuple[str, ...]]:
    """What the settings can say of the architecture, in full, and the rest."""
    sizes, rest = vit.patch_embed.patch_size, dict(weights.args)
    hybrid = hasattr(vit.patch_embed, "backbone")  # whose stem sets the patches
    tanh = activation(vit.blocks[0].mlp.act) == "gelu_tanh" if hasattr(vit.blocks[0], "mlp") else False
    height, width = weights.image_hw
    own = ModelConfig(
        name=weights.name,
        img_size=(height,) if height == width else (height, width),
        patch_size=() if hybrid else (sizes[0],) if sizes[0] == sizes[1] else tuple(sizes),
        in_chans=weights.in_chans,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        pos_embed="learned" if vit.pos_embed is not None else "none",
        act="gelu_tanh" if tanh else "gelu",
    )
    for key in model_args(own):
        rest.pop(key, None)
    return own, write_init_args(rest, weights.numerics)


def _pair(value: Any) -> Any:
    """Sizes of one number and of two equal ones are the same."""
    return (value[0], value[-1]) if isinstance(value, tuple) and value else value


def _shown(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)
