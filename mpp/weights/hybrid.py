"""Hybrids, a ResNet before the patches (section 3.1): stems of any depth, and the paper's own numerics."""

import functools
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import torch
from jaxtyping import Float
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.padding import pad_same
from timm.layers.std_conv import StdConv2dSame
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

_WEIGHT_EPS = 1e-5  # added to the standard deviation of a kernel, not to its variance
_NORM_EPS = 1e-6  # flax's default, of every GroupNorm of the stem


def create_hybrid(stem_units: tuple[int, ...], **settings: Any) -> nn.Module:
    """timm's VisionTransformer over a ResNetV2 of that many units per stage, freshly initialised.

    Built as timm builds the hybrids that it has names for, with the same names of parameters: `patch_embed.backbone`
    holds the ResNet, whose first stage has stride 4 and each further one twice the stride of the one before it.

    Args:
        stem_units: residual units per stage; () is the root convolution and its max pool alone.
        settings: for VisionTransformer: img_size, in_chans, patch_size (in cells of the stem's map; 1 if not given),
            embed_dim, depth, num_heads, ...; names of layers as timm.create_model takes them.
    """
    settings.setdefault("patch_size", 1)
    channels = settings.get("in_chans", 3)
    convolution = functools.partial(StdConv2dSame, eps=1e-8)
    if stem_units:
        stages = len(stem_units)
        backbone: nn.Module = ResNetV2(
            list(stem_units),
            channels=tuple(256 * 2**stage for stage in range(stages)),
            num_classes=0,
            in_chans=channels,
            global_pool="",
            output_stride=4 * 2 ** (stages - 1),
            stem_type="same",
            preact=False,
            conv_layer=convolution,
        )
    else:
        backbone = create_resnetv2_stem(channels, stem_type="same", preact=False, conv_layer=convolution)
    return VisionTransformer(embed_layer=functools.partial(HybridEmbed, backbone=backbone), **settings)


class OriginalStdConv2d(nn.Conv2d):
    """Weight-standardised convolution with "SAME" padding, as `StdConv` in the original models_resnet.py.

    timm divides by sqrt(var + eps) instead, which differs where a kernel is small.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (var.sqrt() + _WEIGHT_EPS)
        x = pad_same(x, list(self.kernel_size), list(self.stride))
        return F.conv2d(x, weight, self.bias, self.stride)


def use_original_stem(model: nn.Module) -> None:
    """Makes the stem of a hybrid compute what the paper's JAX code computes, at odd sizes too; parameters stay.

    GroupNorm with epsilon 1e-6, and kernels standardised as (w - mean) / (std + 1e-5).
    """
    backbone: Any = model.patch_embed.backbone  # pyright: ignore[reportAttributeAccessIssue]
    for parent in list(backbone.modules()):
        if isinstance(parent, nn.GroupNorm):
            parent.eps = _NORM_EPS
        for name, conv in list(parent.named_children()):
            if isinstance(conv, StdConv2dSame):
                setattr(parent, name, _original(conv))


def _original(conv: Any) -> OriginalStdConv2d:
    with torch.device("meta"):  # nothing to initialise: the parameter is handed over
        new = OriginalStdConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=False)
    new.weight = conv.weight
    return new.train(conv.training)
