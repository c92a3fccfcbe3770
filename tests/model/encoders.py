"""Small encoders of many kinds, with random weights."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mpp.model.encoder import Encoder, build_encoder
from mpp.model.settings import ModelConfig

TINY = ModelConfig("vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), depth=2, embed_dim=48, num_heads=3)


def small(name: str, **changes: Any) -> ModelConfig:
    """A model of another architecture in the size of TINY."""
    return ModelConfig(name, **{"img_size": (32,), "depth": 2, "embed_dim": 48, "num_heads": 3, **changes})


def tiny(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


CASES = {
    "plain": TINY,
    "explicit attention": tiny(attention="explicit"),
    "tanh gelu": tiny(act="gelu_tanh"),
    "one channel": tiny(in_chans=1),
    "eight channels": tiny(in_chans=8),
    "wide image": tiny(img_size=(16, 40)),
    "flat patches": tiny(img_size=(32, 24), patch_size=(8, 4)),
    "no positions": tiny(pos_embed="none"),
    "2d positions": tiny(pos_embed="2d", img_size=(16, 40)),
    "sincos2d positions": tiny(pos_embed="sincos2d", img_size=(16, 40)),
    "stochastic depth, not in training": tiny(drop_path=0.5),
    "hybrid": ModelConfig("vit_tiny_r_s16_p8_224", img_size=(64,), depth=2),
    "hybrid, 2d positions": ModelConfig("vit_tiny_r_s16_p8_224", img_size=(64, 32), depth=1, pos_embed="2d"),
    "registers, class without position": small("vit_small_patch14_reg4_dinov2", img_size=(28, 42)),
    "registers, 2d positions": small("vit_small_patch14_reg4_dinov2", img_size=(28, 42), pos_embed="2d"),
    "swiglu": small("vit_giant_patch14_reg4_dinov2", img_size=(28,)),
    "any image size": small("test_vit", img_size=(32, 48)),
    "any image size, 2d positions": small("test_vit", img_size=(32, 48), pos_embed="2d"),
    "any image size, no class token": small("test_vit2", patch_size=(8,)),
    "any image size, no positions": small("test_vit2", patch_size=(8,), pos_embed="none"),
    "norm before the blocks": small("vit_base_patch16_clip_224"),
    "norm after attention": small("beit3_base_patch16_224"),
    "norm after the branches": small("vit_base_patch16_rpn_224"),
    "rms norm": small("aimv2_large_patch14_224", img_size=(28,)),
}


def scramble(module: nn.Module) -> None:
    """Moves every weight away from its initial value, which is often 0, 1 or tiny."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


def build(config: ModelConfig) -> Encoder:
    """The encoder in float64 with random weights."""
    torch.manual_seed(0)
    encoder = build_encoder(config).double().eval()
    scramble(encoder)
    return encoder


def pictures(config: ModelConfig) -> Tensor:
    """Two normalised images."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, config.in_chans, *config.image_hw, generator=generator, dtype=torch.float64)


def choose(encoder: Encoder, k: int = 5) -> Tensor:
    """k patches of each of two images, in no order."""
    patches = encoder.grid[0] * encoder.grid[1]
    generator = torch.Generator().manual_seed(4)
    return torch.rand(2, patches, generator=generator).argsort(dim=1)[:, : min(k, patches)]
