"""What timm's name and the settings of a model do not say of an architecture: other constants, other arguments.

Numerics                          where the original code of some weights computes otherwise than timm
original_stem, create_hybrid      hybrids (section 3.1) as the paper's JAX code has them, with stems of any depth
named_vit                         timm's name and arguments of a ViT whose shapes are known
read_init_args, write_init_args   arguments and numerics as texts that a config can hold: "mlp_ratio=2.0"
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from jaxtyping import Float
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.padding import pad_same
from timm.layers.std_conv import StdConv2dSame
from timm.models import build_model_with_cfg
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mpp.errors import UserError
from mpp.system.meta_device import on_meta

_SIZES = {  # width, blocks, heads
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}


@dataclass(frozen=True)
class Numerics:
    """Where the original of the weights computes otherwise than timm's model of that name."""

    norm_eps: float | None = None
    """Epsilon of every LayerNorm of a ViT. None: timm's."""
    original_stem: bool = False
    """A hybrid's ResNet as the paper's JAX code has it: GroupNorm eps 1e-6, (w - mean) / (std + 1e-5)."""
    stem_units: tuple[int, ...] | None = None
    """Units per stage of a hybrid's ResNet that timm has no name for."""


def create_hybrid(name: str, stem_units: tuple[int, ...], **settings: Any) -> nn.Module:
    """timm's hybrid of that name, but over a ResNetV2 of 1 to 4 stages of so many residual units.

    The first stage has stride 4, each further one twice as much. `settings` are VisionTransformer's, with `patch_size`
    in cells of the stem's map.
    """
    backbone = ResNetV2(
        list(stem_units),
        num_classes=0,
        in_chans=settings.get("in_chans", 3),
        global_pool="",
        stem_type="same",
        preact=False,
        conv_layer=functools.partial(StdConv2dSame, eps=1e-8),
    )
    settings["embed_layer"] = functools.partial(HybridEmbed, backbone=backbone)
    return build_model_with_cfg(VisionTransformer, name, False, **{"patch_size": 1, **settings})


class OriginalStdConv2d(nn.Conv2d):
    """Weight-standardised convolution with "SAME" padding, as `StdConv` in the original models_resnet.py.

    timm divides by sqrt(var + eps) instead, which differs for small kernels.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (var.sqrt() + 1e-5)
        x = pad_same(x, list(self.kernel_size), list(self.stride))
        return F.conv2d(x, weight, self.bias, self.stride)


def use_original_stem(model: nn.Module) -> None:
    """Makes the stem of a hybrid compute what the paper's JAX code computes, also at odd sizes; parameters stay."""
    backbone: Any = model.patch_embed.backbone  # pyright: ignore[reportAttributeAccessIssue]
    for parent in list(backbone.modules()):
        if isinstance(parent, nn.GroupNorm):
            parent.eps = 1e-6  # flax's default
        for name, conv in list(parent.named_children()):
            if isinstance(conv, StdConv2dSame):
                with on_meta():  # nothing to initialise: the parameter is handed over
                    sizes: Any = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
                    new = OriginalStdConv2d(*sizes, bias=False)
                new.weight = conv.weight  # pyright: ignore[reportAttributeAccessIssue]
                setattr(parent, name, new.train(conv.training))


def read_init_args(init_args: Sequence[str]) -> tuple[dict[str, Any], Numerics]:
    """Arguments for timm beside `model_args`, and the numerics, of texts such as "mlp_ratio=2.0", "norm_eps=1e-12".

    Raises UserError for texts of another form.
    """
    args: dict[str, Any] = {}
    for text in init_args:
        name, _, value = text.partition("=")
        try:
            args[name] = json.loads(value)
        except ValueError as error:
            raise UserError(f"init_args: {text!r} is not a name, = and a JSON value, such as mlp_ratio=2.0") from error
    return args, numerics_from({field.name: args.pop(field.name, None) for field in fields(Numerics)})


def numerics_from(values: Mapping[str, Any]) -> Numerics:
    """The numerics of JSON values; null or a missing key is timm's."""
    units = values.get("stem_units")
    return Numerics(values.get("norm_eps"), bool(values.get("original_stem")), None if units is None else tuple(units))


def write_init_args(args: Mapping[str, Any], numerics: Numerics) -> tuple[str, ...]:
    """The texts that `read_init_args` reads; numerics that are timm's are left out."""
    timms = asdict(Numerics())
    others = {key: value for key, value in asdict(numerics).items() if value != timms[key]}
    return tuple(f"{name}={json.dumps(value)}" for name, value in {**args, **others}.items())


def activation(module: nn.Module | None) -> str | None:
    """timm's name of the activation, gelu or gelu_tanh; None for any other."""
    # timm has a GELU of its own, beside torch's.
    names = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else names.get(type(module).__name__)


def mlp_ratio(dim: int, mlp: int) -> float:
    """timm's argument for an MLP of that width."""
    ratio = mlp / dim
    return ratio if int(dim * ratio) == mlp else (mlp + 0.5) / dim  # timm rounds down, as the division may have, too


def named_vit(patch: int | list[int], dim: int, depth: int, heads: int, mlp: int) -> tuple[str, dict[str, Any]]:
    """timm's name of a plain ViT of these sizes, and the arguments that the name does not say."""
    name = f"vit_{_SIZES.get((dim, depth, heads))}_patch{patch}_224"
    known = timm.is_model(name)
    args = {} if known and mlp == 4 * dim else vit_args(patch, dim, depth, heads, mlp)
    return name if known else "vit_base_patch16_224", args


def vit_args(patch: int | list[int], dim: int, depth: int, heads: int, mlp: int) -> dict[str, Any]:
    """timm's arguments of a ViT of these sizes."""
    sizes = {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    return sizes | {"mlp_ratio": mlp_ratio(dim, mlp)}
