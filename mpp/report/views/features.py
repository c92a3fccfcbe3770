"""Sections about features: patches by their main components, images on a plane, and nearest neighbours."""

import numpy as np
from jaxtyping import Float, Int

from mpp.objective.picture import to_rgb
from mpp.report.inspection.features import neighbours, patch_colours, project
from mpp.report.page.charts import Points, scatter_chart
from mpp.report.page.parts import Block, Gallery, Picture, Section, Sheet, Text
from mpp.report.views.drawing import visible
from mpp.report.views.seen import Seen, by_side

_QUERIES, _NEIGHBOURS = 6, 6
_NAMED = 6  # classes that have a colour of their own: one is left for the others


def patch_section(seen: Seen) -> Section:
    """Patch features of the drawn images as colours."""
    images = [visible(image) for image in to_rgb(seen.drawn)]
    sides = [
        (name, list(patch_colours(side.tokens(seen.drawn).cpu().numpy(), side.encoder.grid)))
        for name, side in seen.sides
    ]
    reading = (
        "Patches of one colour have similar features (their first three principal components over all these images are "
        "drawn as red, green and blue): the more the colours follow objects and parts, the more the features tell."
    )
    told = ": its patches' features, {} model, as colours"
    sheets = by_side("patches", images, sides, told, pixelated=True)
    return Section("patch-features", "Map of the patch features", reading, sheets)


def image_section(seen: Seen) -> Section:
    """Features of whole images: on a plane, and which are nearest to which."""
    charts = tuple(_plane(name, features, seen) for name, features in seen.features)
    classes = seen.labelled.classes if seen.labelled.classes and (seen.labelled.labels >= 0).any() else None
    coloured = "coloured by label" if classes else "without labels"
    reading = (
        f"Each dot is an image ({coloured}) at the first two principal components of its features; below, the images "
        "whose features are most similar (cosine) to the first of the row."
    )
    blocks: list[Block] = [Gallery(charts)]
    if len(seen.labelled.pixels) > _NEIGHBOURS:
        blocks.append(_nearest(seen, classes))
    else:
        blocks.append(Text(f"Neighbours need more than {_NEIGHBOURS} images."))
    return Section("image-features", "Images by their features", reading, tuple(blocks))


def _plane(name: str, features: Float[np.ndarray, "m dim"], seen: Seen) -> Picture:
    points, share = project(features)
    groups = _groups(points, seen.labelled.labels, seen.labelled.classes)
    return scatter_chart(
        f"plane_{name.replace(' ', '_').replace('-', '_')}",
        f"{len(points)} images by the first two principal components of the {name} model's features.",
        groups,
        x=f"component 1 ({share[0]:.0%} of the variance)",
        y=f"component 2 ({share[1]:.0%})",
        caption=name,
    )


def _groups(
    points: Float[np.ndarray, "m 2"], labels: Int[np.ndarray, " m"], classes: tuple[str, ...] | None
) -> list[Points]:
    """The points of each of the most frequent classes, and the rest faintly."""
    known = labels[labels >= 0]
    if classes is None or not len(known):
        return [Points("images", points[:, 0], points[:, 1])]
    names, counts = np.unique(known, return_counts=True)
    shown = names[np.argsort(-counts, kind="stable")[:_NAMED]]
    rest = ~np.isin(labels, shown)
    named = [
        Points(classes[label], points[labels == label, 0], points[labels == label, 1], colour=number)
        for number, label in enumerate(np.sort(shown))
    ]
    others = [Points("others", points[rest, 0], points[rest, 1], colour=_NAMED, faint=True)] if rest.any() else []
    return named + others


def _nearest(seen: Seen, classes: tuple[str, ...] | None) -> Sheet:
    images, labels = to_rgb(seen.labelled.pixels), seen.labelled.labels
    queries = np.arange(min(_QUERIES, len(images)))
    rows, titles = [], []
    found = [(name, neighbours(features, queries, _NEIGHBOURS)[0]) for name, features in seen.features]
    for number in queries:
        for side, (name, near) in enumerate(found):
            titles.append(name)
            cells = [_tile(f"near_{number}_{side}", images[number], _class(int(labels[number]), classes))]
            for place, index in enumerate(near[number]):
                told = _class(int(labels[index]), classes)
                cells.append(_tile(f"near_{number}_{side}_{place}", images[index], told))
            rows.append(tuple(cells))
    columns = ("image", *(f"{place}." for place in range(1, _NEIGHBOURS + 1)))
    return Sheet(columns, tuple(rows), tuple(titles), tile=96)


def _class(label: int, classes: tuple[str, ...] | None) -> str:
    return classes[label] if classes is not None and label >= 0 else ""


def _tile(name: str, image: np.ndarray, told: str) -> Picture:
    return Picture(name, f"An image of {told}." if told else "An image.", image, told)
