"""Settings of the encoder. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.config import CHOSEN, Auto


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: any timm VisionTransformer by its timm name, hybrids included."""

    name: str = field(default="vit_base_patch16_224", metadata=CHOSEN)
    """timm name, e.g. vit_tiny_patch16_224, vit_large_patch16_224, vit_base_r50_s16_224. auto: vit_tiny, vit_small or
    vit_base, by the number of images and the device."""
    img_size: tuple[int, ...] | Auto = field(default=(224,), metadata=CHOSEN)
    """Input size in pixels: one number for a square, two for height and width. auto: that of the images, at most 224
    (128 on a CPU); with patches that fit, where the name is auto too."""
    patch_size: tuple[int, ...] = ()
    """Patch size in pixels, one number or two. Empty: the size in the name."""
    in_chans: int = 3
    """Image channels."""
    embed_dim: int | None = None
    """Token width. None: the width in the name."""
    depth: int | None = None
    """Number of transformer blocks. None: the depth in the name."""
    num_heads: int | None = None
    """Attention heads. None: the number in the name."""
    attention: Literal["auto", "xformers", "sdpa", "explicit"] = "auto"
    """Attention kernel: auto takes the faster at the start, on CUDA of xformers (where it runs) and sdpa, on a CPU of
    sdpa and explicit, which needs more memory."""
    pos_embed: Literal["learned", "none", "2d", "sincos2d"] = "learned"
    """Position embedding: timm's learned 1-D, none, learned 2-D (the paper's D.4), fixed sine-cosine 2-D."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """MLP activation. The paper's JAX code computes GELU by its tanh form."""
    drop_path: float = 0.0
    """Stochastic depth rate at the last block, rising linearly from 0."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a second forward pass."""

    def __post_init__(self) -> None:
        for key in ("img_size", "patch_size"):
            value = getattr(self, key)
            if value == "auto":
                continue
            if len(value) > 2 or any(v < 1 for v in value) or (key == "img_size" and not value):
                raise ValueError(f"model.{key} takes one or two positive numbers, got {list(value)}")
        for key in ("in_chans", "embed_dim", "depth", "num_heads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be in [0, 1), got {self.drop_path}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        assert self.img_size != "auto"
        return self.img_size[0], self.img_size[-1]
