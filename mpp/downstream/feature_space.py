"""Likeness of features: cosines between images, the nearest of an image, and groups of images that are alike.

Products are made block by block, on any device, so that memory grows with the number of images and not with its square.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

_ROWS, _COLUMNS = 2048, 16384  # of a block of products
_ROUNDING = 1e-6  # of a cosine


class Space:
    """Standardises features as those of a file: each number has mean 0 and standard deviation 1 there.

    Args:
        features: (n, d) of any float type; a number that is the same throughout becomes 0.

    Attributes:
        rows: float32 (n, d) on the CPU, standardised, then each of length 1.
    """

    def __init__(self, features: Float[np.ndarray, "n d"]) -> None:
        rows = features.astype(np.float32)
        self._mean = rows.mean(axis=0, dtype=np.float64)
        rows -= self._mean.astype(np.float32)
        self._scale = np.sqrt(np.einsum("nd,nd->d", rows, rows, dtype=np.float64) / max(1, len(rows)))
        self._scale[self._scale <= 1e-6 * np.abs(self._mean)] = np.inf
        rows /= self._scale.astype(np.float32)
        self.rows = _of_length_1(rows)

    def of(self, features: Float[np.ndarray, "q d"]) -> Float[Tensor, "q d"]:
        """Features of other images in the same way."""
        return _of_length_1(((features - self._mean) / self._scale).astype(np.float32))


def _of_length_1(rows: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.div_(tensor.norm(dim=1, keepdim=True).clamp_(min=1e-12))


def nearest(
    space: Space, queries: Float[Tensor, "q d"], itself: Int64[np.ndarray, " q"], top: int, device: Any = "cpu"
) -> tuple[Float[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """Cosines and rows of the images that are most like each query, the most alike first.

    Args:
        queries: as `Space` gives them.
        itself: the row of a query that is one of the images, and comes last with a cosine of -2; else -1.
        top: k, or the number of images where that is less.
    """
    found = []
    for begin in range(0, len(queries), _ROWS):
        some = queries[begin : begin + _ROWS].to(device)
        own = torch.from_numpy(itself[begin : begin + _ROWS]).to(device)[:, None]
        cosines, rows = some.new_empty(len(some), 0), own[:, :0]
        for start in range(0, len(space.rows), _COLUMNS):
            block = space.rows[start : start + _COLUMNS].to(device)
            row = torch.arange(start, start + len(block), device=device).expand(len(some), -1)
            cosines = torch.cat([cosines, (some @ block.T).masked_fill_(row == own, -2)], dim=1)
            cosines, chosen = cosines.topk(min(top, cosines.shape[1]), dim=1)
            rows = torch.cat([rows, row], dim=1).gather(1, chosen)
        found.append((cosines.cpu().numpy(), rows.cpu().numpy()))
    return np.concatenate([cosines for cosines, _ in found]), np.concatenate([rows for _, rows in found])


def groups_alike(
    space: Space, least: float, device: Any = "cpu"
) -> tuple[list[Int64[np.ndarray, " members"]], Float[np.ndarray, " n"]]:
    """Groups of images, each like another of its group with a cosine of at least `least`, by their first images.

    Also gives each image's cosine with the one that is most like it; -2 where it is in no group.
    """
    parent, highest = np.arange(len(space.rows)), np.full(len(space.rows), -2, dtype=np.float32)
    for start in range(0, len(parent), _ROWS):
        block = space.rows[start : start + _ROWS].to(device)
        for first in range(start, len(parent), _COLUMNS):
            cosines = block @ space.rows[first : first + _COLUMNS].to(device).T
            if first == start:  # each pair once, and no image with itself
                cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).tril_(), -2)
            one, other = (cosines >= least - _ROUNDING).nonzero(as_tuple=True)
            values = cosines[one, other].cpu().numpy()
            one, other = one.cpu().numpy() + start, other.cpu().numpy() + first
            for rows in (one, other):
                np.maximum.at(highest, rows, values)
            _join(parent, one, other)
    root = _roots(parent, np.arange(len(parent)))
    order = np.argsort(root, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(root[order])) + 1)
    return [group for group in groups if len(group) > 1], highest


def _join(parent: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Joins the trees in which these pairs of images are; the root of a tree is its first image."""
    roots, ends = np.unique(_roots(parent, np.stack([one, other])), return_inverse=True)
    ends = ends.reshape(2, -1)
    graph = coo_array((np.ones(ends.shape[1], dtype=bool), tuple(ends)), shape=(len(roots), len(roots)))
    _, first, component = np.unique(
        connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
    )
    parent[roots] = roots[first[component]]


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    while not np.array_equal(above := parent[rows], rows):
        rows = above
    return rows
