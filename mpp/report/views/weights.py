"""Sections about the weights alone: embedding filters and position embeddings (section 4.5, figure 7)."""

import numpy as np
from jaxtyping import Float, UInt8

from mpp.report.inspection.opening import Inspected
from mpp.report.inspection.weights import Filters, embedding_filters, position_similarity
from mpp.report.page.parts import Block, Gallery, Picture, Section, Text
from mpp.report.views.drawing import Pixels, enlarged, heat, tiled, to_range
from mpp.report.views.seen import Seen

_ACROSS = 7  # the 28 components of the paper's figure in four rows
_LARGEST = 1000  # pixels of a side of the similarity tiles


def filter_section(seen: Seen) -> Section:
    """The first 28 principal components of the embedding filters, or a hybrid's first convolution."""
    found = [(name, embedding_filters(side.encoder)) for name, side in seen.sides]
    pictures = tuple(_filters(name, filters) for name, filters in found)
    if found[0][1].kind == "convolution":
        title, what = "First convolution", "Each tile is a filter of the stem's first convolution"
    else:
        title, what = "Embedding filters", "Each tile is a principal component of the filters that embed a patch"
    reading = (
        f"{what}, stretched to the full range of colours: smooth gradients, stripes and blobs of colour, like a basis "
        "for the structure of small patches, have been learnt; noise has not."
    )
    return Section("filters", title, reading, (Gallery(pictures),), "section 4.5, figure 7 (left)")


def _filters(name: str, filters: Filters) -> Picture:
    tiles = np.stack([_rgb(kernel) for kernel in filters.kernels])
    share = f"; together {filters.share.sum():.0%} of the variance" if len(filters.share) else ""
    picture = tiled(tiles, _ACROSS, gap=max(1, tiles.shape[1] // 8))
    return Picture(
        f"filters_{_slug(name)}",
        f"{len(tiles)} filters of {tiles.shape[1]} x {tiles.shape[2]} pixels of the {name} model{share}.",
        picture,
        f"{name}{share}",
        pixelated=True,
        width=420,
    )


def _rgb(kernel: Float[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "height width 3"]:
    shown = kernel[..., :3] if kernel.shape[-1] >= 3 else kernel[..., :1].repeat(3, axis=-1)
    return to_range(shown)


def position_section(seen: Seen) -> Section:
    """Similarity of position embeddings, a tile for each patch."""
    blocks: list[Block] = []
    for name, side in seen.sides:
        similarity = position_similarity(side.encoder)
        if similarity is not None:
            blocks.append(_similarity(name, similarity, side))
    pictures = tuple(block for block in blocks if isinstance(block, Picture))
    shown: Block = Gallery(pictures) if pictures else Text("This model has no table of position embeddings.")
    reading = (
        "The tile in row r and column c shows how similar (cosine, -1 dark to 1 bright) the position embedding of that "
        "patch is to those of all patches, itself the brightest: a model that has learnt where patches are shows a "
        "bright spot at the tile's own place, fading with distance, often along rows and columns."
    )
    return Section("positions", "Position embeddings", reading, (shown,), "section 4.5, figure 7 (centre)")


def _similarity(name: str, similarity: Float[np.ndarray, "rows columns rows columns"], side: Inspected) -> Picture:
    rows, columns = side.encoder.grid
    tiles: Pixels = heat(similarity.reshape(rows * columns, rows, columns), -1, 1)
    times = max(1, min(3, _LARGEST // (max(rows, columns) * (max(rows, columns) + 1))))
    picture = tiled(np.stack([enlarged(tile, times) for tile in tiles]), columns, gap=max(1, times))
    return Picture(
        f"positions_{_slug(name)}",
        f"{rows} x {columns} tiles of cosine similarity between position embeddings of the {name} model.",
        picture,
        name,
        pixelated=True,
        width=420,
    )


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")
