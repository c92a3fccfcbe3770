"""Sections about the weights alone: embedding filters and position embeddings (section 4.5, figure 7)."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64
from torch import nn
from torch.nn import functional as F

from mpp.model.encoder import Encoder
from mpp.report.features import principal_axes
from mpp.report.inspection import InspectionContext, heat, tiled
from mpp.report.page import Gallery, Picture, Section, Text
from mpp.report.settings import folder_name

_ACROSS = 7  # the 28 components of the paper's figure in four rows
_LARGEST = 1000  # pixels of a side of the similarity tiles


class Filters(NamedTuple):
    """Filters of the input."""

    kernels: Float32[np.ndarray, "n height width channels"]
    """In the input's channels, without a range."""
    share: Float64[np.ndarray, " components"]
    """Of the filters' variance that each component explains; empty for a convolution's filters."""


def embedding_filters(encoder: Encoder, number: int = 28) -> Filters:
    """The first principal components of the learned embedding filters, about their mean (figure 7, left).

    A component's sign means nothing: its value of largest magnitude is made positive. A narrow embedding or a small
    patch has fewer than `number`. Hybrids embed feature maps, not pixels; of those the filters of the first convolution
    are returned, without the scaling of each that some apply.
    """
    embed: Any = encoder.vit.patch_embed
    if hasattr(embed, "backbone"):
        first = next(module for module in embed.backbone.modules() if isinstance(module, nn.Conv2d))
        kernels = first.weight.detach().cpu().float()[:number]
        return Filters(kernels.permute(0, 2, 3, 1).numpy(), np.empty(0))
    weight = embed.proj.weight.detach().cpu().double().numpy()
    filters = weight.reshape(len(weight), -1)
    count = min(number, len(filters) - 1, filters.shape[1])  # D filters about their mean span D - 1 dimensions
    axes, share = principal_axes(filters, count)
    return Filters(axes.reshape(count, *weight.shape[1:]).transpose(0, 2, 3, 1).astype(np.float32), share)


def position_similarity(encoder: Encoder) -> Float32[np.ndarray, "rows columns rows columns"] | None:
    """Cosine similarity of each patch's position embedding with those of all patches (figure 7, centre).

    `[r, c]` is the tile of the patch in row r and column c, -1 to 1. None where the encoder has no table of positions.
    """
    if encoder.position is not None:
        table = encoder.position()
    elif encoder.vit.pos_embed is not None:
        # Where class and register tokens have positions, they come first.
        table = encoder.vit.pos_embed[0, -encoder.grid[0] * encoder.grid[1] :]
    else:
        return None
    unit = F.normalize(table.detach().cpu().double(), dim=-1)
    return (unit @ unit.T).float().reshape(*encoder.grid, *encoder.grid).numpy()


def filter_section(context: InspectionContext) -> Section:
    """The first 28 principal components of the embedding filters, or a hybrid's first convolution."""
    found = [(name, embedding_filters(model.encoder)) for name, model in context.models]
    title, what = "Embedding filters", "Each tile is a principal component of the filters that embed a patch"
    if not len(found[0][1].share):
        title, what = "First convolution", "Each tile is a filter of the stem's first convolution"
    reading = (
        f"{what}, stretched to the full range of colours: smooth gradients, stripes and blobs of colour, like a basis "
        "for the structure of small patches, have been learnt; noise has not."
    )
    pictures = []
    for name, (kernels, shares) in found:
        share = f"; together {shares.sum():.0%} of the variance" if len(shares) else ""
        n, height, width, channels = kernels.shape
        alt = f"{n} filters of {height} x {width} pixels of the {name} model{share}."
        rgb = kernels[..., :3] if channels >= 3 else kernels[..., :1].repeat(3, axis=-1)
        # Each tile from black at its smallest value to white at its largest; mid-grey where all are equal.
        low, high = (end(axis=(1, 2, 3), keepdims=True) for end in (rgb.min, rgb.max))
        level = np.divide(rgb - low, high - low, out=np.full_like(rgb, 128 / 255), where=high > low)
        picture = tiled((255 * level).round().astype(np.uint8), _ACROSS, gap=max(1, height // 8))
        pictures.append(Picture(f"filters_{folder_name(name)}", alt, picture, f"{name}{share}", True, 420))
    return Section("filters", title, reading, (Gallery(tuple(pictures)),), "section 4.5, figure 7 (left)")


def position_section(context: InspectionContext) -> Section:
    """Similarity of position embeddings, a tile for each patch."""
    pictures = []
    for name, model in context.models:
        similarity = position_similarity(model.encoder)
        if similarity is None:
            continue
        rows, columns = model.encoder.grid
        times = max(1, min(3, _LARGEST // (max(rows, columns) * (max(rows, columns) + 1))))
        tiles = heat(similarity.reshape(rows * columns, rows, columns), -1.0)
        picture = tiled(tiles.repeat(times, axis=1).repeat(times, axis=2), columns, gap=times)
        alt = f"{rows} x {columns} tiles of cosine similarity between position embeddings of the {name} model."
        pictures.append(Picture(f"positions_{folder_name(name)}", alt, picture, name, True, 420))
    block = Gallery(tuple(pictures)) if pictures else Text("This model has no table of position embeddings.")
    reading = (
        "The tile in row r and column c shows how similar (cosine, -1 dark to 1 bright) the position embedding of that "
        "patch is to those of all patches, itself the brightest: a model that has learnt where patches are shows a "
        "bright spot at the tile's own place, fading with distance, often along rows and columns."
    )
    return Section("positions", "Position embeddings", reading, (block,), "section 4.5, figure 7 (centre)")
