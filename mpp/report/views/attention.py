"""Sections about attention: how far it reaches, what images become of, and what single heads look at."""

import numpy as np

from mpp.objective.picture import to_rgb
from mpp.report.inspection.attention import attention_rollout, attention_statistics, patch_attention
from mpp.report.page.charts import Points, scatter_chart
from mpp.report.page.parts import Gallery, Picture, Section, Sheet
from mpp.report.views.drawing import framed, heat, lit, tiled, visible
from mpp.report.views.seen import Seen, batches, by_side

_FEWEST = 128  # images that the paper averages over
_HEADS_OF = 4  # images whose heads are drawn one by one


def distance_section(seen: Seen) -> Section:
    """Mean attention distance and entropy by layer and head."""
    images = seen.images.pixels[: max(_FEWEST, len(seen.images.pixels) // 4)]
    found = [(name, attention_statistics(side, batches(images))) for name, side in seen.sides]
    (name, own), *_ = found
    heads = own.distance.shape[1]
    depth = np.repeat(np.arange(1, len(own.distance) + 1), heads)

    def points(measure: str) -> list[Points]:
        return [
            Points(label, depth, getattr(of, measure).ravel(), colour=number, faint=number > 0)
            for number, (label, of) in enumerate(found)
        ]

    first, last = own.distance[0], own.distance[-1]
    charts = (
        scatter_chart(
            "attention_distance",
            f"Mean attention distance of the {name} model: {first.min():.1f} to {first.max():.1f} pixels in the first "
            f"layer, {last.min():.1f} to {last.max():.1f} in the last.",
            points("distance"),
            x="layer",
            y="mean attention distance (pixels)",
            caption=f"Attention distance; if all patches counted alike it would be {own.uniform_distance:.1f} pixels.",
        ),
        scatter_chart(
            "attention_entropy",
            f"Entropy of attention of the {name} model: {own.entropy.min():.2f} to {own.entropy.max():.2f} nats; "
            f"the largest possible is {own.largest_entropy:.2f}.",
            points("entropy"),
            x="layer",
            y="entropy of attention (nats)",
            caption=f"Entropy; if all {own.tokens} tokens counted alike it would be {own.largest_entropy:.2f} nats.",
        ),
    )
    reading = (
        f"Each dot is one head, averaged over {own.images} images: low dots look next to the patch, high ones across "
        "the whole image, and a trained model usually has both kinds in its first layers and mostly far-reaching heads "
        "in its last."
    )
    paper = "section 4.5, figure 7 (right), appendix D.7"
    return Section("attention-distance", "Attention distance", reading, (Gallery(charts),), paper)


def rollout_section(seen: Seen) -> Section:
    """Attention rollout over images."""
    images = [visible(image) for image in to_rgb(seen.drawn)]
    sides = [
        (name, [lit(image, share) for image, share in zip(images, attention_rollout(side, seen.drawn), strict=True)])
        for name, side in seen.sides
    ]
    whose = "class token" if seen.model.pool == "token" else "mean of the patch tokens"
    reading = (
        f"The brighter a part of the image is left, the more of it, through all layers, is in the {whose}: "
        "averaged over heads, with the residual connection as half of each layer, and multiplied through the layers."
    )
    sheets = by_side("rollout", images, sides, ", lit where the {} model looks")
    return Section("rollout", "Attention rollout", reading, sheets, "section 4.5, figure 6, appendix D.8")


def heads_section(seen: Seen) -> Section:
    """What one patch looks at, head by head."""
    images, (row, column) = seen.drawn[:_HEADS_OF], seen.patch
    sides = [(name, patch_attention(side, images, seen.patch)) for name, side in seen.sides]
    patch = seen.model.encoder.patch
    stops, cells = [], [[] for _ in range(1 + len(sides))]
    for number, image in enumerate(to_rgb(images)):
        stops.append(f"image {number + 1}")
        large = visible(image)
        times = len(large) // len(image)
        large = framed(large, row, column, (patch[0] * times, patch[1] * times))
        cells[0].append(Picture(f"heads_{number}", f"Image {number + 1}, the patch framed.", large))
        for side, (name, weights) in enumerate(sides):
            alt = f"Attention of that patch in image {number + 1}, {name} model: a row a layer, a column a head."
            drawn = _heads(weights[:, number])
            cells[1 + side].append(Picture(f"heads_{number}_{side}", alt, drawn, pixelated=True))
    layers, _, heads = sides[0][1].shape[:3]
    reading = (
        f"Rows are the {layers} layers, the first on top, columns the {heads} heads: each tile shows which patches the "
        f"framed one (row {row}, column {column}, from 0) attends to, from nothing (dark) to the tile's most (bright)."
    )
    titles = ("image", *(name for name, _ in sides))
    sheet = Sheet(titles, (tuple(map(tuple, cells)),), stops=tuple(stops), slider="image", tile=320)
    return Section("heads", "Single heads", reading, (sheet,), "section 4.5")


def _heads(weights: np.ndarray) -> np.ndarray:
    """(layers, heads, rows, columns) as tiles, each by its own largest weight."""
    tiles = weights.reshape(-1, *weights.shape[2:])
    tiles = tiles / np.maximum(tiles.max(axis=(1, 2), keepdims=True), 1e-12)
    return tiled(heat(tiles, 0, 1), weights.shape[1])
