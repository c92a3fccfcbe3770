"""Sections about features: patches by their principal components, images on a plane, and nearest neighbours."""

import numpy as np
from jaxtyping import Float, Float64, Int, Int64, UInt8

from mpp.objective.reconstruction import to_rgb
from mpp.report.charts import Points, scatter_chart
from mpp.report.inspection import InspectionContext, enlarged, sheets_by_model
from mpp.report.page import Block, Gallery, Picture, Section, Sheet, Text
from mpp.report.settings import folder_name

_PERCENTILES = (1, 99)  # of a component over all patches: drawn as 0 and 255
_ROUNDING = 1e-6  # spread of a component, relative to the largest feature, up to which it is rounding
_QUERIES, _NEIGHBOURS = 6, 6
_NAMED = 6  # classes with a colour of their own: one is left for the others


def principal_axes(
    features: Float[np.ndarray, "m dim"], number: int
) -> tuple[Float64[np.ndarray, "number dim"], Float64[np.ndarray, " number"]]:
    """The directions of largest variance, of length 1, and their shares of it; zeros where nothing more differs.

    The sign of a direction means nothing: its value of largest magnitude is made positive.
    """
    centred, product, size = _centred(features)
    variances, directions = np.linalg.eigh(product / len(centred))  # the largest come last
    variances, directions = variances[::-1][:number].clip(0), directions.T[::-1][:number]
    real = np.sqrt(variances) > _ROUNDING * size
    if len(product) != centred.shape[1]:
        directions = directions @ centred
        directions /= np.linalg.norm(directions, axis=1, keepdims=True).clip(min=np.finfo(np.float64).tiny)
    signs = np.sign(np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1))
    axes, share = np.zeros((number, features.shape[1])), np.zeros(number)
    axes[: len(real)] = directions * signs * real[:, None]
    share[: len(real)][real] = variances[real] / centred.var(axis=0).sum()
    return axes, share


def _centred(
    features: Float[np.ndarray, "m dim"],
) -> tuple[Float64[np.ndarray, "m dim"], Float64[np.ndarray, "least least"], float]:
    """The centred features, the smaller of their two products with themselves, and their largest magnitude before."""
    centred = features.astype(np.float64)
    size = float(np.abs(centred).max())
    centred -= centred.mean(axis=0)
    return centred, centred @ centred.T if centred.shape[1] > len(centred) else centred.T @ centred, size


def principal_components(
    features: Float[np.ndarray, "m dim"], number: int
) -> tuple[Float64[np.ndarray, "m number"], Float64[np.ndarray, " number"]]:
    """Coordinates along `principal_axes`, and the shares of the variance."""
    axes, share = principal_axes(features, number)
    return (features - features.mean(axis=0, dtype=np.float64)) @ axes.T, share


def patch_colours(
    tokens: Float[np.ndarray, "batch patches dim"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "batch rows columns 3"]:
    """Patches as colours that are alike where their features are.

    The first three principal components over all patches of all images together are red, green and blue, as in DINOv2
    (arXiv 2304.07193, figure 1) but without its removal of the background. Each is scaled from its 1st to its 99th
    percentile; a component in which nothing differs is drawn as 128.
    """
    points, _ = principal_components(tokens.reshape(-1, tokens.shape[-1]), 3)
    low, high = np.percentile(points, _PERCENTILES, axis=0)
    span = high - low
    level = np.divide(points - low, span, out=np.full_like(points, 128 / 255), where=span > 0)
    return (level.clip(0, 1) * 255).round().astype(np.uint8).reshape(len(tokens), *grid, 3)


def neighbours(
    features: Float[np.ndarray, "m dim"], queries: Int[np.ndarray, " q"], number: int
) -> Int64[np.ndarray, "q number"]:
    """The rows most similar to the query rows by cosine, nearest first, but for the query itself.

    Features are not centred, as usual in nearest-neighbour evaluations (DINO, arXiv 2104.14294). A feature of zeros
    has similarity 0 with all. Of equal similarities the lower row comes first; of fewer rows all are given.
    """
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(min=np.finfo(np.float64).tiny)
    cosine = unit[queries] @ unit.T
    np.put_along_axis(cosine, queries[:, None], -np.inf, axis=1)
    return np.argsort(-cosine, axis=1, kind="stable")[:, : min(number, len(features) - 1)]


def effective_rank(features: Float[np.ndarray, "m dim"]) -> float:
    """Number of dimensions that the features use: the exponential of the entropy of their normalised singular values.

    Of centred features: from 1, where all lie on a line, to dim; 0 where nothing differs. Roy and Vetterli, "The
    effective rank" (EUSIPCO 2007), equation 3.
    """
    _, product, size = _centred(features)
    values = np.sqrt(np.linalg.eigvalsh(product).clip(0))  # the singular values
    values = values[values > _ROUNDING * size]
    share = values / values.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if len(values) else 0.0


def patch_section(context: InspectionContext) -> Section:
    """Patch features of the drawn images as colours."""
    images = [enlarged(image) for image in to_rgb(context.drawn)]
    models = [
        (name, list(patch_colours(model.tokens(context.drawn).cpu().numpy(), model.encoder.grid)))
        for name, model in context.models
    ]
    reading = (
        "Patches of one colour have similar features (their first three principal components over all these images are "
        "drawn as red, green and blue): the more the colours follow objects and parts, the more the features tell."
    )
    alt = ": its patches' features, {} model, as colours"
    sheets = sheets_by_model("patches", images, models, alt, pixelated=True)
    return Section("patch-features", "Map of the patch features", reading, sheets)


def image_section(context: InspectionContext) -> Section:
    """Features of whole images: on a plane, and the nearest neighbours of some."""
    labelled = context.labelled
    classes = labelled.classes if labelled.classes and (labelled.labels >= 0).any() else None
    charts = []
    for name, features in context.features:
        points, share = principal_components(features, 2)
        charts.append(
            scatter_chart(
                f"plane_{folder_name(name)}",
                f"{len(points)} images by the first two principal components of the {name} model's features.",
                _groups(points, labelled.labels, classes),
                x=f"component 1 ({share[0]:.0%} of the variance)",
                y=f"component 2 ({share[1]:.0%})",
                caption=name,
            )
        )
    reading = (
        f"Each dot is an image ({'coloured by label' if classes else 'without labels'}) at the first two principal "
        "components of its features; below, the images whose features are most similar (cosine) to the first of the "
        "row."
    )
    enough = len(labelled.pixels) > _NEIGHBOURS
    nearest: Block = _nearest(context, classes) if enough else Text(f"Neighbours need more than {_NEIGHBOURS} images.")
    return Section("image-features", "Images by their features", reading, (Gallery(tuple(charts)), nearest))


def _groups(
    points: Float[np.ndarray, "m 2"], labels: Int[np.ndarray, " m"], classes: tuple[str, ...] | None
) -> list[Points]:
    """The points of each of the most frequent classes, and the rest faintly."""
    if classes is None:
        return [Points("images", points[:, 0], points[:, 1], colour=0)]
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    frequent = np.sort(names[np.argsort(-counts, kind="stable")[:_NAMED]])
    groups = [
        Points(classes[label], points[labels == label, 0], points[labels == label, 1], colour=number)
        for number, label in enumerate(frequent)
    ]
    rest = ~np.isin(labels, frequent)
    return groups + [Points("others", points[rest, 0], points[rest, 1], colour=_NAMED, faint=True)] * bool(rest.any())


def _nearest(context: InspectionContext, classes: tuple[str, ...] | None) -> Sheet:
    images, labels = to_rgb(context.labelled.pixels), context.labelled.labels
    queries = np.arange(min(_QUERIES, len(images)))
    found = [(name, neighbours(features, queries, _NEIGHBOURS)) for name, features in context.features]

    def tile(name: str, index: int) -> Picture:
        label = classes[labels[index]] if classes and labels[index] >= 0 else ""
        return Picture(name, f"An image of {label}." if label else "An image.", images[index], label)

    rows = [
        (tile(f"near_{i}_{j}", i), *(tile(f"near_{i}_{j}_{k}", index) for k, index in enumerate(near[i].tolist())))
        for i in queries.tolist()
        for j, (_, near) in enumerate(found)
    ]
    columns = ("image", *(f"{number}." for number in range(1, _NEIGHBOURS + 1)))
    return Sheet(columns, tuple(rows), tuple(name for name, _ in found) * len(queries), tile=96)
