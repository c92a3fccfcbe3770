"""Masked image modelling in other libraries, with our sizes and batch: vit-pytorch's MPP and transformers' ViT.

Each in two forms: like ours (arithmetic, fused optimiser, clipping, compilation), and at its own defaults.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from benchmarks.step_sides import Setting, Side, plain_side, plain_step, random_images, timm_model
from mpp.dist import World
from mpp.errors import UserError, install
from mpp.system.meta_device import on_meta
from mpp.training.parallel import prepare

VIT_PYTORCH = "1.15.7"
MakeSide = Callable[[Setting], Side]


class Missing(UserError):
    """A library that is not here, and how to get it."""


def vit_pytorch(setting: Setting) -> Side:
    """`vit_pytorch.mpp.MPP` around `vit_pytorch.ViT`, like ours. Its blocks are compiled; the rest cannot be."""
    model, loss = _vit_pytorch(setting)
    prepare(model.transformer.transformer, setting.device, World(), setting.compile)
    return plain_side(setting, model, loss)


def transformers(setting: Setting) -> Side:
    """`ViTForMaskedImageModeling`, like ours."""
    model, loss = _transformers(setting)
    prepare(model, setting.device, World(), setting.compile)
    return plain_side(setting, model, loss)


def vit_pytorch_default(setting: Setting) -> Side:
    """As its README has it: fp32, Adam at torch's defaults, no clipping, not compiled."""
    setting = replace(setting, precision="fp32", compile="off")
    model, loss = _vit_pytorch(setting)
    optimizer = Adam(model.parameters(), lr=3e-4)
    return Side(setting, model, optimizer, plain_step(loss, setting, model, optimizer, 0.0))


def transformers_default(setting: Setting) -> Side:
    """As its `Trainer` has it: fp32, fused AdamW, gradients clipped to norm 1, not compiled."""
    setting = replace(setting, precision="fp32", compile="off")
    model, loss = _transformers(setting)
    optimizer = AdamW(model.parameters(), lr=5e-5, fused=True)
    return Side(setting, model, optimizer, plain_step(loss, setting, model, optimizer, 1.0))


PEERS: dict[str, MakeSide] = {
    "vit-pytorch MPP": vit_pytorch,
    "vit-pytorch MPP, its defaults": vit_pytorch_default,
    "transformers MIM": transformers,
    "transformers MIM, its defaults": transformers_default,
}


def _vit_pytorch(setting: Setting) -> tuple[Any, Callable[[], Tensor]]:
    """Its README's probabilities; images from 0 to 1, from which it makes its targets.

    Raises:
        Missing: not installed, or a version whose MPP crashes.
        UserError: images or patches that are not square.
    """
    if importlib.util.find_spec("vit_pytorch") is None:
        raise Missing(f"vit-pytorch is not installed: {install('bench')}")
    version = importlib.metadata.version("vit-pytorch")
    if version != VIT_PYTORCH:
        raise Missing(f"the MPP of vit-pytorch {version} may crash: pip install vit-pytorch=={VIT_PYTORCH}")
    package, module = (importlib.import_module(name) for name in ("vit_pytorch", "vit_pytorch.mpp"))
    image, patch, dim, depth, heads, mlp = _sizes(setting)
    both = {"patch_size": patch, "dim": dim, "channels": setting.model.in_chans}
    vit = package.ViT(
        image_size=image, num_classes=1000, depth=depth, heads=heads, dim_head=dim // heads, mlp_dim=mlp, **both
    )
    model = module.MPP(transformer=vit, mask_prob=0.15, random_patch_prob=0.30, replace_prob=0.50, **both)
    model.to(setting.device)
    images = random_images(setting).float() / 255
    return model, lambda: model(images)


def _transformers(setting: Setting) -> tuple[Any, Callable[[], Tensor]]:
    """Half of the patches masked, as in its documentation; the loader would have drawn them, so they are given.

    Raises:
        Missing: not installed.
        UserError: images or patches that are not square.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Missing(f"transformers is not installed: {install('bench')}")
    package: Any = importlib.import_module("transformers")
    image, patch, dim, depth, heads, mlp = _sizes(setting)
    config = package.ViTConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image,
        patch_size=patch,
        num_channels=setting.model.in_chans,
        encoder_stride=patch,
    )
    model = package.ViTForMaskedImageModeling(config).to(setting.device).train()
    pixels = random_images(setting).float() / 127.5 - 1
    masked = (torch.rand(setting.batch, (image // patch) ** 2) < 0.5).to(setting.device)
    return model, lambda: model(pixels, bool_masked_pos=masked).loss


def _sizes(setting: Setting) -> tuple[int, int, int, int, int, int]:
    """Sides of image and patch, width, depth, heads and the MLP's width of timm's model."""
    with on_meta():
        vit: Any = timm_model(setting.model)
    block, (height, width), (patch, across) = vit.blocks[0], setting.model.image_hw, vit.patch_embed.patch_size
    if (height, patch) != (width, across):
        raise UserError("the other libraries take square images and patches: leave them out with --peers off")
    return height, patch, vit.embed_dim, len(vit.blocks), block.attn.num_heads, block.mlp.fc1.out_features
