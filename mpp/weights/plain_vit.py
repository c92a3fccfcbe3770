"""What a timm VisionTransformer has beside the paper's plain encoder, which is all that other libraries know."""

from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


def extras(model: Any) -> str | None:
    """The first thing that the encoder has and the paper's has not, as a reason, or None: it is plain."""
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}"
    checks = _around(model)
    return next((reason for reason, fine in checks.items() if not fine), None)


def _around(vit: Any) -> dict[str, bool]:
    """What would be said of the encoder around its blocks, and whether it need not be said."""
    embed, block = vit.patch_embed, vit.blocks[0]
    checks = {
        "it has no class token": vit.has_class_token,
        "it has register tokens": not vit.num_reg_tokens,
        "it has no table of position embeddings": vit.pos_embed is not None,
        "its class token has no position embedding": not vit.no_embed_class,
        f"its patch embedding is a {type(embed).__name__}": type(embed) is PatchEmbed,
        "its patch embedding has a norm": _is_nothing(getattr(embed, "norm", None)),
        "its patch embedding has no bias": getattr(embed.proj, "bias", None) is not None,
        "it has a norm before its blocks": _is_nothing(vit.norm_pre),
        "its last norm is missing or after the pooling": _is_nothing(vit.fc_norm)
        and isinstance(vit.norm, nn.LayerNorm),
        "it pools by attention": vit.attn_pool is None,
        f"its blocks are {type(block).__name__}": type(block) is Block,
    }
    return checks | (_within(block) if type(block) is Block else {})


def _within(block: Any) -> dict[str, bool]:
    attention, mlp = block.attn, block.mlp
    if type(attention) is not Attention or type(mlp) is not Mlp:
        return {f"its blocks have {type(attention).__name__} and {type(mlp).__name__}": False}
    return {
        "it normalises queries and keys": _is_nothing(attention.q_norm),
        "it has layer scale": _is_nothing(block.ls1),
        "its blocks have further norms": _is_nothing(attention.norm) and _is_nothing(mlp.norm),
        "its attention is gated": attention.gate is None,
        "its projections have no bias": attention.proj.bias is not None,
        "its norms are not LayerNorm": isinstance(block.norm1, nn.LayerNorm),
        f"its activation is {type(mlp.act).__name__}": activation(mlp.act) is not None,
    }


def _is_nothing(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def activation(module: nn.Module) -> str | None:
    """timm's name of the activation, gelu or gelu_tanh, or None for anything else."""
    # timm has a GELU of its own, beside torch's.
    names = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else names.get(type(module).__name__)
