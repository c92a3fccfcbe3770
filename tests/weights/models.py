"""Small weights of many kinds, with random values."""

import re
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor

from mpp.weights.base import Weights, build
from mpp.weights.numerics import Numerics

ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
HYBRID = Weights(
    "vit_base_r50_s16_224",
    ARGS | {"patch_size": 1},
    None,
    (32, 32),
    numerics=Numerics(original_stem=True, stem_units=(1, 1)),
)


def filled(weights: Weights) -> Weights:
    """With no weight at its initial value."""
    torch.manual_seed(0)
    state = build(weights).state_dict()
    noisy = {name: x + 0.05 * torch.randn_like(x) if x.is_floating_point() else x for name, x in state.items()}
    return replace(weights, state=noisy, origin="a test")


def vit(
    pool: str = "token", classes: tuple[str, ...] | None = ("a", "b"), name: str = "vit_base_patch16_224", **args: Any
) -> Weights:
    """A ViT for 32 x 32 pixels."""
    return filled(Weights(name, ARGS | args, None, (32, 32), pool=pool, classes=classes))


def timm_model(name: str = "vit_base_patch16_224", **args: Any) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **{"num_classes": 0, **args})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def dinov2_names(model: Any) -> dict[str, Tensor]:
    """As the authors' code writes timm's model: with registers, a position of the class token, and blocks in chunks."""
    state = {re.sub(r"^blocks\.", "blocks.0.", name): value for name, value in model.state_dict().items()}
    of_class = torch.randn(1, 1, model.embed_dim)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - of_class
    state["pos_embed"] = torch.cat([of_class, state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.zeros(1, model.embed_dim)}


def images(height: int = 32, width: int = 32, channels: int = 3, number: int = 2) -> torch.Tensor:
    return torch.randn(number, channels, height, width, generator=torch.Generator().manual_seed(1))
