"""Weights out: an encoder as a folder that timm loads."""

import dataclasses
from pathlib import Path
from typing import Any

import mpp.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import timm
import torch
from torch import Tensor

from mpp.model.config import ModelConfig
from mpp.model.encoder import Encoder, create_vit


def timm_state(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's weights under timm's names, a 2-D position embedding written out as timm's table."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.vit.state_dict().items()}
    if encoder.position is not None:
        table = encoder.position().detach().float().cpu()
        if not encoder.vit.no_embed_class:  # then timm's table has rows for the class and register tokens too
            table = torch.cat([table.new_zeros(encoder.num_prefix_tokens, table.shape[1]), table])
        state["pos_embed"] = table[None].contiguous()
    return state


def save_timm_folder(
    encoder: Encoder, config: ModelConfig, folder: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Writes `folder` so that `timm.create_model(f"local-dir:{folder}", pretrained=True)` gives this encoder.

    The model is headless; its forward gives mean-pooled patch tokens, since masked patch prediction never trains
    the class token. `mean` and `std` (0 to 1 scale, one number or one per channel) go into its data config.
    """
    if encoder.position is not None:
        config = dataclasses.replace(config, pos_embed="learned")
    with torch.random.fork_rng(devices=[]):
        vit = create_vit(dataclasses.replace(config, drop_path=0.0))
    vit.load_state_dict(timm_state(encoder))
    # The name's default entry describes somebody else's weights.
    untold: Any = vit
    untold.pretrained_cfg = {**untold.pretrained_cfg, "tag": "mpp", "license": None, "url": None, "hf_hub_id": None}
    data_config = {
        "input_size": (config.in_chans, *config.image_hw),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": _per_channel(mean, config.in_chans),
        "std": _per_channel(std, config.in_chans),
    }
    timm.models.save_for_hf(vit, str(folder), data_config=data_config, safe_serialization=True)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values
