"""Measures of attention and their sections: how far heads look, rollout, single heads (section 4.5, figures 6 and 7).

Only one layer's weights are in memory at a time, of as many images as fit.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from mpp.objective.objective import patch_distances
from mpp.objective.reconstruction import to_rgb
from mpp.report.charts import Points, scatter_chart
from mpp.report.inspection import (
    BATCH,
    ImageBatch,
    Inspected,
    InspectionContext,
    enlarged,
    framed,
    heat,
    lit,
    sheets_by_model,
    tiled,
)
from mpp.report.page import Gallery, Picture, Section, Sheet

_AT_ONCE = 2**25
"""Attention weights of a layer that are computed together, 128 MiB of them; a few copies come on top."""
_FEWEST = 128  # images that the paper averages over
_HEADS_OF = 4  # images whose heads are drawn one by one


class AttentionStatistics(NamedTuple):
    """Means over many images, of every layer (first to last) and head."""

    distance: Float64[np.ndarray, "layers heads"]
    """Mean attention distance in pixels of the input (appendix D.7)."""
    entropy: Float64[np.ndarray, "layers heads"]
    """Of the attention weights in nats, from 0 for one token to ln(tokens) for all alike."""
    uniform_distance: float
    """The distance in pixels of a head to which all patches count alike, to compare with."""
    tokens: int
    """Of an image, class and register tokens included."""


@torch.inference_mode()
def attention_statistics(inspected: Inspected, images: ImageBatch) -> AttentionStatistics:
    """Measures how far and how concentrated each head attends, over one image or more (figure 7, right; D.7).

    Raises:
        UserError: an encoder whose attention weights are not available (see `Encoder.attention_maps`).
    """
    encoder, prefix = inspected.encoder, inspected.encoder.num_prefix_tokens
    apart = patch_distances(encoder.grid, encoder.patch).to(inspected.device).float().sqrt()
    total = np.zeros(())
    for maps in _maps(inspected, images):
        from_patches = (weights[:, :, prefix:] for weights in maps)
        layers = [torch.stack([mean_distance(of[..., prefix:], apart), entropy(of)]) for of in from_patches]
        total = total + torch.stack(layers).double().sum(dim=2).cpu().numpy()
    distance, spread = (total / len(images)).swapaxes(0, 1)
    return AttentionStatistics(distance, spread, float(apart.double().mean()), len(apart) + prefix)


def mean_distance(
    weights: Float[Tensor, "batch heads n n"], distance: Float[Tensor, "n n"]
) -> Float[Tensor, "batch heads"]:
    """Distance from a patch to those that it attends to, averaged by the attention weights, then over patches (D.7).

    The weights, 0 to 1, are from patches to patches; rows are made to sum to 1, since other tokens take a share.
    """
    total = weights.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)
    return ((weights * distance).sum(dim=-1) / total).mean(dim=-1)


def entropy(weights: Float[Tensor, "batch heads queries tokens"]) -> Float[Tensor, "batch heads"]:
    """Entropy of the attention weights of a query over all tokens in nats, 0 to ln(tokens), averaged over queries."""
    return torch.special.entr(weights).sum(dim=-1).mean(dim=-1)


@torch.inference_mode()
def attention_rollout(inspected: Inspected, images: ImageBatch) -> Float32[np.ndarray, "batch rows columns"]:
    """The share of each patch in each image's representation, by `rollout` (figure 6); each map sums to 1.

    Raises:
        UserError: an encoder whose attention weights are not available.
    """
    prefix, shares = inspected.encoder.num_prefix_tokens, []
    for maps in _maps(inspected, images):
        mixed = rollout(maps)
        row = mixed[:, 0] if inspected.pool == "token" else mixed[:, prefix:].mean(dim=1)
        share = row[:, prefix:]
        shares.append((share / share.sum(dim=1, keepdim=True)).unflatten(1, inspected.encoder.grid))
    return torch.cat(shares).float().cpu().numpy()


def rollout(maps: Iterable[Float[Tensor, "batch heads tokens tokens"]]) -> Float[Tensor, "batch tokens tokens"]:
    """The share of input tokens in each output token, by the weights of each layer, one or more; rows sum to 1.

    Of a layer the weights are averaged over heads, and half is the residual connection: A = 0.5 mean(weights) + 0.5 I.
    The result is A_L ... A_2 A_1 (appendix D.8; Abnar and Zuidema, 2020, section 3).
    """
    mixed = None
    for weights in maps:
        mean = weights.mean(dim=1)
        layer = 0.5 * (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype))
        mixed = layer if mixed is None else layer @ mixed
    assert mixed is not None, "rollout needs the weights of one layer at least"
    return mixed


@torch.inference_mode()
def patch_attention(
    inspected: Inspected, images: ImageBatch, patch: tuple[int, int]
) -> Float32[np.ndarray, "layers batch heads rows columns"]:
    """Attention weights from one patch (row and column, from 0) to all patches, in every layer and head.

    They add up to less than 1 where class or register tokens take a share.

    Raises:
        UserError: an encoder whose attention weights are not available.
    """
    encoder, prefix = inspected.encoder, inspected.encoder.num_prefix_tokens
    query = prefix + patch[0] * encoder.grid[1] + patch[1]
    parts = [torch.stack([of[:, :, query, prefix:] for of in maps]) for maps in _maps(inspected, images)]
    return torch.cat(parts, dim=1).unflatten(-1, encoder.grid).float().cpu().numpy()


def _maps(inspected: Inspected, images: Tensor) -> Iterator[Iterable[Tensor]]:
    """The attention weights, layer by layer, of parts of the images of which a layer's fit into memory."""
    encoder = inspected.encoder
    tokens = encoder.grid[0] * encoder.grid[1] + encoder.num_prefix_tokens
    heads = max(getattr(getattr(block, "attn", None), "num_heads", 1) for block in encoder.vit.blocks)
    for part in images.split(min(BATCH, max(1, _AT_ONCE // (heads * tokens**2)))):
        yield encoder.attention_maps(inspected.pixels(part))


def distance_section(context: InspectionContext) -> Section:
    """Mean attention distance and entropy by layer and head."""
    images = context.images.pixels[: max(_FEWEST, len(context.images.pixels) // 4)]
    measured = [(name, attention_statistics(model, images)) for name, model in context.models]
    name, own = measured[0]
    depth = np.repeat(np.arange(1.0, len(own.distance) + 1), own.distance.shape[1])
    largest = math.log(own.tokens)
    first, last = (f"{own.distance[at].min():.1f} to {own.distance[at].max():.1f}" for at in (0, -1))
    spread = f"{own.entropy.min():.2f} to {own.entropy.max():.2f}"
    words = {
        "distance": (
            f"Mean attention distance of the {name} model: {first} pixels in the first layer, {last} in the last.",
            "mean attention distance (pixels)",
            f"Attention distance; if all patches counted alike it would be {own.uniform_distance:.1f} pixels.",
        ),
        "entropy": (
            f"Entropy of attention of the {name} model: {spread} nats; the largest possible is {largest:.2f}.",
            "entropy of attention (nats)",
            f"Entropy; if all {own.tokens} tokens counted alike it would be {largest:.2f} nats.",
        ),
    }
    charts = []
    for measure, (alt, axis, caption) in words.items():
        points = [
            Points(label, depth, getattr(of, measure).ravel(), colour=number, faint=number > 0)
            for number, (label, of) in enumerate(measured)
        ]
        charts.append(scatter_chart(f"attention_{measure}", alt, points, x="layer", y=axis, caption=caption))
    reading = (
        f"Each dot is one head, averaged over {len(images)} images: low dots look next to the patch, high ones across "
        "the whole image, and a trained model usually has both kinds in its first layers and mostly far-reaching heads "
        "in its last."
    )
    paper = "section 4.5, figure 7 (right), appendix D.7"
    return Section("attention-distance", "Attention distance", reading, (Gallery(tuple(charts)),), paper)


def rollout_section(context: InspectionContext) -> Section:
    """Attention rollout over images."""
    images = [enlarged(image) for image in to_rgb(context.drawn)]
    shares = [(name, attention_rollout(model, context.drawn)) for name, model in context.models]
    models = [(name, [lit(*pair) for pair in zip(images, of, strict=True)]) for name, of in shares]
    whose = "class token" if context.model.pool == "token" else "mean of the patch tokens"
    reading = (
        f"The brighter a part of the image is left, the more of it, through all layers, is in the {whose}: "
        "averaged over heads, with the residual connection as half of each layer, and multiplied through the layers."
    )
    sheets = sheets_by_model("rollout", images, models, ", lit where the {} model looks")
    return Section("rollout", "Attention rollout", reading, sheets, "section 4.5, figure 6, appendix D.8")


def heads_section(context: InspectionContext) -> Section:
    """Attention of one patch, head by head."""
    images, (row, column) = context.drawn[:_HEADS_OF], context.patch
    models = [(name, patch_attention(model, images, context.patch)) for name, model in context.models]
    layers, _, heads = models[0][1].shape[:3]
    patch = context.model.encoder.patch
    stops, cells = [], [[] for _ in range(1 + len(models))]
    for i, image in enumerate(to_rgb(images)):
        stops.append(f"image {i + 1}")
        large = enlarged(image)
        times = len(large) // len(image)
        large = framed(large, row, column, (patch[0] * times, patch[1] * times))
        cells[0].append(Picture(f"heads_{i}", f"Image {i + 1}, the patch framed.", large))
        for j, (name, weights) in enumerate(models):
            alt = f"Attention of that patch in image {i + 1}, {name} model: a row a layer, a column a head."
            tiles = weights[:, i].reshape(-1, *weights.shape[3:])
            tiles = tiles / np.maximum(tiles.max(axis=(1, 2), keepdims=True), 1e-12)
            cells[1 + j].append(Picture(f"heads_{i}_{j}", alt, tiled(heat(tiles, 0.0), heads), pixelated=True))
    reading = (
        f"Rows are the {layers} layers, the first on top, columns the {heads} heads: each tile shows which patches the "
        f"framed one (row {row}, column {column}, from 0) attends to, from nothing (dark) to the tile's most (bright)."
    )
    columns = ("image", *(name for name, _ in models))
    sheet = Sheet(columns, (tuple(map(tuple, cells)),), stops=tuple(stops), slider="image", tile=320)
    return Section("heads", "Single heads", reading, (sheet,), "section 4.5")
