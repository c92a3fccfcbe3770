"""Going on with masked patch prediction from weights that exist already.

complete_configs(init, weights, ...)     the configs, filled in from the weights, so that a run's config is whole
build_continued(model, init_args, ...)   the encoder that these configs describe, new
load_encoder(encoder, weights)           the weights put into it

timm has more arguments than `ModelConfig` has settings, and some weights come from code that computes otherwise than
timm: the rest are the `init_args`, texts such as "mlp_ratio=2.0" or "norm_eps=1e-12".
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer

from mpp.data.settings import DataConfig
from mpp.errors import UserError
from mpp.model.attention import Block
from mpp.model.encoder import Encoder, check_patches, check_vit, is_vit, model_args, put_on_device
from mpp.model.settings import ModelConfig
from mpp.system.meta_device import building_on, on_meta
from mpp.weights.base import Weights, classifier_names, create, load, resampled
from mpp.weights.numerics import activation, read_init_args, write_init_args

_ARCHITECTURE = ("name", "patch_size", "embed_dim", "depth", "num_heads", "in_chans", "pos_embed", "act")
_INPUT = ("mean", "std", "value_range", "background")
# timm keeps DeiT's models, which are ViTs of the same sizes, in a file of their own.
_DEIT = {"deit_": {}, "deit3_": {"no_embed_class": True, "init_values": 1e-6}}


def complete_configs(
    init: str, weights: Weights, model: ModelConfig, data: DataConfig
) -> tuple[ModelConfig, DataConfig, tuple[str, ...]]:
    """The configs with settings at their defaults filled in from the weights, and the `init_args`.

    Raises:
        UserError: weights that are not a ViT's or that masked patch prediction cannot go on from; settings of `model`
            that contradict them, or of `data` for another number of channels; a size of broken patches.
    """
    if weights.state is None:
        raise UserError(f"--init {init} has no weights to go on from; leave it out for new ones")
    weights, vit = _as_vit(weights), None
    if is_vit(weights.name):
        with on_meta():
            vit = create(replace(weights, state=None, pool="avg"))
    if not isinstance(vit, VisionTransformer):  # some of timm's files of ViTs have other classes as well
        raise UserError(
            f"--init {init} is timm's {weights.name!r}, not a VisionTransformer, which masked patch prediction needs; "
            "take one, such as vit_base_patch16_224 or DINOv2's vit_small_patch14_reg4_dinov2"
        )
    check_vit(vit, f"--init {init}")
    own = _config_of(weights, vit)
    others = {key: value for key, value in weights.args.items() if key not in model_args(own)}
    model = complete_model(init, model, own)
    check_patches(vit, model.image_hw, "model.img_size", stem=True)
    data = complete_data(data, DataConfig(**{key: getattr(weights, key) for key in _INPUT}))
    data.decode_options(model.in_chans)
    return model, data, write_init_args(others, weights.numerics)


def complete_model(init: str, given: ModelConfig, own: ModelConfig) -> ModelConfig:
    """The given settings with the weights' own architecture, and with their size unless another was given.

    Raises UserError for settings that were given and contradict the weights.
    """
    default = ModelConfig()
    for key in _ARCHITECTURE:
        value, its = getattr(given, key), getattr(own, key)
        pairs = [(x[0], x[-1]) if isinstance(x, tuple) and x else x for x in (value, its)]  # 16 is 16 x 16
        if value not in (getattr(default, key), "auto") and pairs[0] != pairs[1]:
            shown, other = (" x ".join(map(str, x)) if isinstance(x, tuple) else x for x in (value, its))
            raise UserError(f"model.{key} {shown} contradicts --init {init}, which has {other}; leave it out")
    architecture = {key: getattr(own, key) for key in _ARCHITECTURE}
    size = own.img_size if given.img_size in (default.img_size, "auto") else given.img_size
    return replace(given, img_size=size, **architecture)


def complete_data(given: DataConfig, own: DataConfig) -> DataConfig:
    """The given settings; normalisation and values at their defaults become the weights' own."""
    default = DataConfig()
    missing = [key for key in _INPUT if getattr(given, key) == getattr(default, key)]
    return replace(given, **{key: getattr(own, key) for key in missing})


def build_continued(
    config: ModelConfig,
    init_args: Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """As `build_encoder`, for an architecture that `config` cannot name alone.

    Raises:
        UserError: arguments that timm refuses; a kernel that cannot run; `init_args` of another form.
    """
    device = torch.device(device)
    args, numerics = read_init_args(init_args)
    args = model_args(config) | args
    weights = Weights(config.name, args, None, config.image_hw, config.in_chans, numerics=numerics)
    with on_meta():
        plain = all(type(block) is TimmBlock for block in create(weights).blocks)
    if plain:
        weights = replace(weights, args=args | {"block_fn": Block})
    with building_on(device):
        vit = create(weights, drop_path=config.drop_path)
    return put_on_device(Encoder(vit), config, device, dtype)


def load_encoder(encoder: Encoder, weights: Weights) -> None:
    """Puts the weights into the encoder of their architecture; position embeddings are resampled to its size.

    Their head, or their pooling by attention, is left out. A last norm after the pooling becomes the encoder's last
    norm, of each token (as in `mpp.report.inspection`): the mean of its tokens is nearly what they pool. Raises
    UserError for names or shapes that do not fit.
    """
    weights = _as_vit(weights)
    dropped = (*classifier_names(encoder.vit), "head.", "attn_pool.")
    state = {
        re.sub("^fc_norm[.]", "norm.", name): value
        for name, value in (weights.state or {}).items()
        if not name.startswith(dropped)
    }
    load(encoder.vit, resampled(state, weights, encoder.vit), weights.label, head=False)


def _as_vit(weights: Weights) -> Weights:
    """DeiT's models as timm's ViT of that size; others as they are."""
    for prefix, args in _DEIT.items():
        name = weights.name.replace(prefix, "vit_", 1)
        if weights.name.startswith(prefix) and timm.is_model(name):
            return replace(weights, name=name, args=args | dict(weights.args))
    return weights


def _config_of(weights: Weights, vit: Any) -> ModelConfig:
    """The settings that describe the architecture, as far as there are any."""
    (height, width), (rows, columns) = weights.image_hw, vit.patch_embed.patch_size
    hybrid = hasattr(vit.patch_embed, "backbone")  # whose stem sets the patches
    mlp = getattr(vit.blocks[0], "mlp", None)
    return ModelConfig(
        name=weights.name,
        img_size=(height,) if height == width else (height, width),
        patch_size=() if hybrid else (rows,) if rows == columns else (rows, columns),
        in_chans=weights.in_chans,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        pos_embed="learned" if vit.pos_embed is not None else "none",
        act="gelu_tanh" if activation(getattr(mlp, "act", None)) == "gelu_tanh" else "gelu",
    )
