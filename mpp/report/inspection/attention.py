"""Where attention goes: how far, how concentrated, and through all layers (figures 6 and 7, appendices D.7 and D.8).

statistics = attention_statistics(inspected, batches)      mean distance and entropy of every layer and head
maps       = attention_rollout(inspected, images)          what the representation is made of, patch by patch
weights    = patch_attention(inspected, images, (3, 5))    what one patch looks at, in every layer and head

One layer's weights are held at a time, of as many images as fit.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from mpp.errors import RunError, UserError
from mpp.objective.objective import patch_distances
from mpp.report.inspection.opening import Inspected

_AT_ONCE = 2**25
"""Attention weights of a layer that are computed together, 128 MiB of them; a few copies come on top."""


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """Measures of every layer (first to last) and head, over many images.

    Attributes:
        distance: mean attention distance in pixels of the input (appendix D.7), averaged over images.
        entropy: of the attention weights in nats, averaged over images: 0 where each patch attends to one token,
            `largest_entropy` where all tokens count alike.
        distance_std: standard deviation of the distance from image to image.
        entropy_std: likewise.
        uniform_distance: the mean distance in pixels of a head to which all patches count alike, to compare with.
        images: how many were looked at.
        tokens: of an image, class and register tokens included.
    """

    distance: Float64[np.ndarray, "layers heads"]
    entropy: Float64[np.ndarray, "layers heads"]
    distance_std: Float64[np.ndarray, "layers heads"]
    entropy_std: Float64[np.ndarray, "layers heads"]
    uniform_distance: float
    images: int
    tokens: int

    @property
    def largest_entropy(self) -> float:
        """ln(tokens), in nats."""
        return math.log(self.tokens)


@torch.inference_mode()
def attention_statistics(
    inspected: Inspected, batches: Iterable[UInt8[Tensor, "_ channels height width"]]
) -> AttentionStatistics:
    """How far and how concentrated each head attends (figure 7, right, and appendix D.7, which averages 128 images).

    Args:
        inspected: the encoder.
        batches: images of its size, 0 to 255; empty batches are left out.

    Raises:
        UserError: an encoder whose attention weights cannot be had (see `Encoder.attention_maps`).
        RunError: no image at all.
    """
    encoder, prefix = inspected.encoder, inspected.encoder.num_prefix_tokens
    pixels_apart = _pixels_apart(inspected)
    of_images: list[np.ndarray] = []  # each (2, layers, batch, heads)
    for images in batches:
        for part in _parts(inspected, images):
            layers = []
            for weights in encoder.attention_maps(inspected.pixels(part)):
                from_patches = weights[:, :, prefix:]
                layers.append(
                    torch.stack([mean_distance(from_patches[..., prefix:], pixels_apart), entropy(from_patches)])
                )
            of_images.append(torch.stack(layers, dim=1).double().cpu().numpy())
    if not of_images:
        raise RunError("attention is measured over images, and there is none: none could be decoded, or none was given")
    found = np.concatenate(of_images, axis=2)
    (distance, spread), (distance_std, spread_std) = found.mean(axis=2), found.std(axis=2)
    return AttentionStatistics(
        distance=distance,
        entropy=spread,
        distance_std=distance_std,
        entropy_std=spread_std,
        uniform_distance=float(pixels_apart.double().mean()),
        images=found.shape[2],
        tokens=len(pixels_apart) + prefix,
    )


def mean_distance(
    weights: Float[Tensor, "batch heads n n"], distance: Float[Tensor, "n n"]
) -> Float[Tensor, "batch heads"]:
    """Distance from a patch to what it attends to, averaged by the attention weights, then over patches (D.7).

    Args:
        weights: from patches to patches, 0 to 1; what went to other tokens is left out, and rows are made to sum to 1.
        distance: between the centres of any two patches, in pixels.

    Returns:
        In pixels, of every image and head.
    """
    total = weights.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)
    return ((weights * distance).sum(dim=-1) / total).mean(dim=-1)


def entropy(weights: Float[Tensor, "batch heads queries tokens"]) -> Float[Tensor, "batch heads"]:
    """Entropy of the attention weights of a query over all tokens in nats, 0 to ln(tokens), averaged over queries."""
    return torch.special.entr(weights).sum(dim=-1).mean(dim=-1)


@torch.inference_mode()
def attention_rollout(
    inspected: Inspected, images: UInt8[Tensor, "batch channels height width"]
) -> Float32[np.ndarray, "batch rows columns"]:
    """`rollout_map` of these images (figure 6, appendix D.8), for the representation that the encoder is read by.

    Raises:
        UserError: an encoder whose attention weights cannot be had.
    """
    encoder = inspected.encoder
    maps = []
    for part in _parts(inspected, images):
        mixed = rollout(encoder.attention_maps(inspected.pixels(part)))
        maps.append(rollout_map(mixed, encoder.grid, encoder.num_prefix_tokens, inspected.pool))
    return torch.cat(maps).float().cpu().numpy()


def rollout(maps: Iterable[Float[Tensor, "batch heads tokens tokens"]]) -> Float[Tensor, "batch tokens tokens"]:
    """What each output token is made of, in input tokens: attention multiplied through the layers; rows sum to 1.

    Of a layer the weights are averaged over heads, and half is what the residual connection keeps:
    A = 0.5 mean(weights) + 0.5 I. The result is A_L ... A_2 A_1 (appendix D.8; Abnar and Zuidema, 2020, section 3).

    Args:
        maps: weights of each layer, the first one first.

    Raises:
        ValueError: no layer.
    """
    mixed = None
    for weights in maps:
        mean = weights.mean(dim=1)
        layer = 0.5 * (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype))
        mixed = layer if mixed is None else layer @ mixed
    if mixed is None:
        raise ValueError("rollout needs the weights of one layer at least")
    return mixed


def rollout_map(
    mixed: Float[Tensor, "batch tokens tokens"], grid: tuple[int, int], prefix: int, pool: str
) -> Float[Tensor, "batch rows columns"]:
    """The share of each patch in an image's representation, by `rollout`; each image's map sums to 1.

    Args:
        mixed: from `rollout`.
        grid: rows and columns of patches.
        prefix: tokens before the patches, whose share is left out.
        pool: "token": of the class token, the first; "mean": of the mean of the patch tokens.

    Raises:
        ValueError: pool="token" where no token comes before the patches.
    """
    if pool == "token" and not prefix:
        raise ValueError("pool=token needs a class token, which this encoder has not: take pool=mean")
    row = mixed[:, 0] if pool == "token" else mixed[:, prefix:].mean(dim=1)
    share = row[:, prefix:]
    return (share / share.sum(dim=1, keepdim=True)).unflatten(1, grid)


@torch.inference_mode()
def patch_attention(
    inspected: Inspected, images: UInt8[Tensor, "batch channels height width"], patch: tuple[int, int]
) -> Float32[np.ndarray, "layers batch heads rows columns"]:
    """Attention weights from one patch to all patches, in every layer and head.

    They add up to less than 1 where class or register tokens take a part.

    Args:
        inspected: the encoder.
        images: of its size, 0 to 255.
        patch: row and column, from 0.

    Raises:
        UserError: a patch outside the grid; an encoder whose attention weights cannot be had.
    """
    encoder, (row, column) = inspected.encoder, patch
    rows, columns = encoder.grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise UserError(f"patch {row},{column} is not in the grid of {rows} x {columns} patches; they count from 0")
    prefix = encoder.num_prefix_tokens
    query = prefix + row * columns + column
    parts = []
    for part in _parts(inspected, images):
        maps = encoder.attention_maps(inspected.pixels(part))
        parts.append(torch.stack([weights[:, :, query, prefix:] for weights in maps]))
    return torch.cat(parts, dim=1).unflatten(-1, encoder.grid).float().cpu().numpy()


def _pixels_apart(inspected: Inspected) -> Float[Tensor, "n n"]:
    return patch_distances(inspected.encoder.grid, inspected.encoder.patch).to(inspected.device).float().sqrt()


def _parts(inspected: Inspected, images: Tensor) -> Iterator[Tensor]:
    """The images in parts of which a layer's weights fit into memory."""
    encoder = inspected.encoder
    tokens = encoder.grid[0] * encoder.grid[1] + encoder.num_prefix_tokens
    heads = max(getattr(getattr(block, "attn", None), "num_heads", 1) for block in encoder.vit.blocks)
    part = max(1, _AT_ONCE // (heads * tokens**2))
    return iter(images.split(part)) if len(images) else iter(())
