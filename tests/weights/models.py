"""Small weights of many kinds, with random values."""

from dataclasses import replace
from typing import Any

import torch

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


def images(height: int = 32, width: int = 32, channels: int = 3, number: int = 2) -> torch.Tensor:
    return torch.randn(number, channels, height, width, generator=torch.Generator().manual_seed(1))
