"""What can be seen in the weights alone: embedding filters and position embeddings (section 4.5, figure 7)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mpp.model.encoder import Encoder


@dataclass(frozen=True, eq=False)
class Filters:
    """Filters of the input.

    Attributes:
        kernels: one picture each, in the input's channels; no range: scale them to draw them.
        kind: "components": principal components of the patch embedding's filters, of length 1 each, the first explains
            most. "convolution": the first filters of a hybrid's ResNet, as they are applied.
        share: of components, the share of the filters' variance that each explains; they add up to 1 at most. Empty
            for a convolution.
    """

    kernels: Float32[np.ndarray, "n height width channels"]
    kind: Literal["components", "convolution"]
    share: Float64[np.ndarray, " components"]


def embedding_filters(encoder: Encoder, number: int = 28) -> Filters:
    """The first principal components of the learned embedding filters (section 4.5, figure 7, left).

    Each of the D output dimensions of the linear embedding is a filter of the patch's size. Their principal components,
    about their mean, are what the embedding looks for in a patch. A component's sign means nothing: its value of
    largest magnitude is made positive.

    Hybrids embed feature maps, not pixels; of those the filters of the first convolution are returned, in their order.

    Args:
        encoder: any.
        number: of filters at most; a narrow embedding or a small patch has fewer.
    """
    embed: Any = encoder.vit.patch_embed
    if hasattr(embed, "backbone"):
        kernels = _first_convolution(embed.backbone, encoder.in_chans)[:number]
        return Filters(kernels.permute(0, 2, 3, 1).numpy().copy(), "convolution", np.empty(0))
    weight = embed.proj.weight.detach().cpu().double()
    filters = weight.flatten(1) - weight.flatten(1).mean(dim=0)
    _, scale, directions = torch.linalg.svd(filters, full_matrices=False)
    count = min(number, len(filters) - 1, filters.shape[1])  # D filters about their mean span D - 1 dimensions
    kept = directions[:count]
    kept = kept * kept.gather(1, kept.abs().argmax(dim=1, keepdim=True)).sign()
    share = scale.square() / scale.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    kernels = kept.unflatten(1, weight.shape[1:]).permute(0, 2, 3, 1)
    return Filters(kernels.float().numpy(), "components", share[:count].numpy())


class _FirstKernel(TorchFunctionMode):
    """Sees the kernel that the first convolution applies, which a standardised one computes from its weights."""

    seen: Tensor | None = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.conv2d and self.seen is None:
            self.seen = args[1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _first_convolution(backbone: nn.Module, channels: int) -> Float32[Tensor, "out channels height width"]:
    image = next(backbone.parameters()).new_zeros(1, channels, 64, 64)  # of any size
    with _FirstKernel() as kernel:
        backbone(image)
    assert kernel.seen is not None, "a ResNet starts with a convolution"
    return kernel.seen.detach().cpu().float()


def position_similarity(encoder: Encoder) -> Float32[np.ndarray, "rows columns rows columns"] | None:
    """Cosine similarity of each patch's position embedding with those of all patches (figure 7, centre).

    `[r, c]` is the tile of the patch in row r and column c, -1 to 1, and 1 at its own place. Embeddings of class and
    register tokens are left out. None where the encoder has no table of positions.
    """
    table = _positions(encoder)
    if table is None:
        return None
    unit = F.normalize(table.detach().cpu().double(), dim=-1)
    return (unit @ unit.T).float().reshape(*encoder.grid, *encoder.grid).numpy()


def _positions(encoder: Encoder) -> Tensor | None:
    if encoder.position is not None:
        return encoder.position()
    if encoder.vit.pos_embed is None:
        return None
    # Where class and register tokens have positions, they come first.
    return encoder.vit.pos_embed[0, -encoder.grid[0] * encoder.grid[1] :]
