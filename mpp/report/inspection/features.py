"""What features tell: principal components as colours and as a plane, and nearest neighbours. numpy in, numpy out."""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64, UInt8

_PERCENTILES = (1, 99)
"""Of a component over all patches: what is drawn as 0 and as 255; beyond them colours are clipped."""
_NOTHING = 1e-6
"""Spread of a component, relative to the largest feature, up to which it is rounding and counts as none."""
_AT_ONCE = 2**24
"""Numbers of the features that are normalised together, 128 MiB of them."""


def patch_colours(
    tokens: Float[np.ndarray, "batch patches dim"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "batch rows columns 3"]:
    """Patches as colours that are alike where their features are.

    The first three principal components over all patches of all images together are red, green and blue, as in DINOv2
    (arXiv 2304.07193, figure 1) but without its removal of the background. Each is scaled from its 1st to its 99th
    percentile; a component in which nothing differs is drawn as 128.

    Args:
        tokens: patch features of images, rows of the grid first.
        grid: rows and columns of patches.
    """
    points, _ = _principal(tokens.reshape(-1, tokens.shape[-1]), 3)
    low, high = np.percentile(points, _PERCENTILES, axis=0)
    span = high - low
    level = np.divide(points - low, span, out=np.full_like(points, 128 / 255), where=span > 0)
    return (level.clip(0, 1) * 255).round().astype(np.uint8).reshape(len(tokens), *grid, 3)


def project(features: Float[np.ndarray, "m dim"]) -> tuple[Float32[np.ndarray, "m 2"], Float64[np.ndarray, " 2"]]:
    """Features at their first two principal components, and the share of the variance that each explains."""
    points, share = _principal(features, 2)
    return points.astype(np.float32), share


def neighbours(
    features: Float[np.ndarray, "m dim"], queries: Int[np.ndarray, " q"], number: int
) -> tuple[Int64[np.ndarray, "q number"], Float32[np.ndarray, "q number"]]:
    """The rows most similar to some of them, nearest first, and their cosine similarity; never the query itself.

    Features are not centred, as usual in nearest-neighbour evaluations (that of DINO, arXiv 2104.14294, for one). A
    feature of zeros has similarity 0 with all. Of equal similarities the lower row comes first.

    Args:
        features: one row an image.
        queries: rows whose neighbours are asked for.
        number: of neighbours; where there are fewer other rows, all of them are given.
    """
    wanted = _unit(features[queries])
    chunk = max(1, _AT_ONCE // features.shape[1])
    parts = [wanted @ _unit(features[i : i + chunk]).T for i in range(0, len(features), chunk)]
    cosine = np.concatenate(parts, axis=1)
    np.put_along_axis(cosine, queries[:, None], -np.inf, axis=1)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : min(number, len(features) - 1)]
    return nearest.astype(np.int64), np.take_along_axis(cosine, nearest, axis=1).astype(np.float32)


def effective_rank(features: Float[np.ndarray, "m dim"]) -> float:
    """How many dimensions the features use: the exponential of the entropy of their normalised singular values.

    Of centred features, so that a constant counts as none: from 1, where all lie on a line, to dim; 0 where nothing
    differs. Roy and Vetterli, "The effective rank" (EUSIPCO 2007), equation 3.
    """
    centred = features.astype(np.float64)
    size = np.abs(centred).max()
    centred -= centred.mean(axis=0)
    # The squares of the singular values, from the smaller of the two products.
    squares = np.linalg.eigvalsh(centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T)
    values = np.sqrt(squares.clip(0))
    values = values[values > _NOTHING * size]
    share = values / values.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if len(values) else 0.0


def _unit(features: Float[np.ndarray, "m dim"]) -> Float64[np.ndarray, "m dim"]:
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, length, out=np.zeros_like(features), where=length > 0)


def _principal(
    features: Float[np.ndarray, "m dim"], number: int
) -> tuple[Float64[np.ndarray, "m number"], Float64[np.ndarray, " number"]]:
    """Coordinates in the first principal components, and their shares of the variance; zeros where there are fewer.

    The sign of a component means nothing: its loading of largest magnitude is made positive.
    """
    centred = features.astype(np.float64)
    size = np.abs(centred).max()
    centred -= centred.mean(axis=0)
    # Of dim x dim numbers, however many rows there are.
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    # The largest come last; features of one or two dimensions have no more components.
    variances, directions = variances[::-1][:number], directions[:, ::-1][:, :number]
    kept = np.sqrt(variances.clip(0)) > _NOTHING * size
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    directions = directions * np.where(kept, np.sign(largest), 0)
    total = centred.var(axis=0).sum()
    points, share = np.zeros((len(centred), number)), np.zeros(number)
    points[:, : len(kept)] = centred @ directions
    share[: len(kept)] = np.divide(variances * kept, total, out=np.zeros(len(kept)), where=kept)
    return points, share
