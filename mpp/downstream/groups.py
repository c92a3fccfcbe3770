"""Groups: images that belong together, such as those of a scene, a patient or a video, and draws that keep them so.

    names of groups (a CSV's column `group`, or a pattern on the images' names) -> a number for each image
    -> strata: each group by its rarest class -> groups drawn within each stratum, or dealt to folds

Letters: n images, g groups of those that are drawn from.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

from mpp.data.sources.base import Source, SourceError, count
from mpp.data.sources.names import printable

ALONE = -1
"""The number of an image without a group: it is one by itself."""
_TRIES = 10
_LARGEST = np.iinfo(np.int64).max


def groups_of(source: Source, pattern: str = "") -> Int64[np.ndarray, " n"] | None:
    """Numbers the groups of a source's images, equal names alike in every source; ALONE where an image has none.

    With a `pattern`, its first group in an image's name is the image's group; without, the source's own groups count,
    and there are None where it has none.
    """
    if pattern:
        found = (re.search(pattern, source.record(index)) for index in range(len(source)))
        names: Sequence[str] = [(match[1] or "") if match else "" for match in found]
    elif (own := source.groups()) is not None:
        names = own
    else:
        return None
    known = {name: _number(name) if name else ALONE for name in set(names)}
    return np.fromiter((known[name] for name in names), np.int64, len(names))


def _number(name: str) -> int:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") & int(_LARGEST)


def check_groups(groups: Int64[np.ndarray, " n"], source: Source, pattern: str) -> str:
    """Describes the groups of training images in a line; raises SourceError where they part nothing."""
    numbers, sizes = np.unique(groups[groups != ALONE], return_counts=True)
    by = f"data.group {pattern!r}" if pattern else "the column group"
    if not len(numbers):
        example = printable(source.record(0)) if pattern else ""
        what = f"matches no name of the images of {source.name}, such as {example}" if pattern else "is empty"
        raise SourceError(f"{by} {what}; give a pattern such as '(patient[0-9]+)', or leave it out")
    alone = len(groups) - int(sizes.sum())
    if len(numbers) + alone < 2:
        one = "so there is nothing to hold out: give a pattern that tells scenes, patients or videos apart"
        raise SourceError(f"{by} puts all {len(groups):,} images of {source.name} into one group, {one}")
    sized = f"{sizes.min():,} to {sizes.max():,} images (median {np.median(sizes):,.0f})"
    by_itself = f"; {count(alone, 'image')} without a group, each by itself" if alone else ""
    return f"{count(len(numbers), 'group')} of {sized} stay together{by_itself}"


def shared_groups(
    groups: Int64[np.ndarray, " n"] | None, others: Int64[np.ndarray, " m"] | None
) -> tuple[int, Bool[np.ndarray, " m"]]:
    """Counts the groups on both sides, and marks the images of `others` that are in one."""
    if groups is None or others is None:
        return 0, np.zeros(0 if others is None else len(others), dtype=bool)
    both = np.intersect1d(groups, others)
    both = both[both != ALONE]
    return len(both), np.isin(others, both)


def _classes_of(
    labels: Int[np.ndarray, " n"], sets: UInt8[np.ndarray, "s K"] | None
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Pairs images with their classes; an image with an empty set of labels with one more class."""
    if sets is None:
        return np.arange(len(labels)), labels
    images, classes = np.nonzero(np.column_stack([sets, ~sets.any(axis=1)])[labels])
    return images, classes


def strata(
    labels: Int[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"] | None,
    sets: UInt8[np.ndarray, "s K"] | None = None,
) -> tuple[Int64[np.ndarray, " g"], Int64[np.ndarray, " n"]]:
    """Gives the stratum of each group, the rarest of its classes, and the group of each image.

    Groups of the images that have a label are numbered from 0; other images have -1. With `sets` labels number them.
    """
    used = np.flatnonzero(labels >= 0)
    group = np.full(len(labels), -1)
    if groups is None:
        group[used] = np.arange(len(used))
        if sets is None:
            return labels[used], group
    else:
        own = np.where(groups[used] == ALONE, -2 - np.arange(len(used)), groups[used])
        _, group[used] = np.unique(own, return_inverse=True)
    image, label = _classes_of(labels[used], sets)
    by_size = np.argsort(np.bincount(label), kind="stable")
    rank = np.empty_like(by_size)
    rank[by_size] = np.arange(len(rank))
    rarest = np.full(int(group.max(initial=-1)) + 1, len(rank))
    np.minimum.at(rarest, group[used][image], rank[label])
    return by_size[rarest], group


def strata_of(
    truth: Int[np.ndarray, " n"] | UInt8[np.ndarray, "n K"], groups: Int64[np.ndarray, " n"] | None
) -> tuple[Int64[np.ndarray, " g"], Int64[np.ndarray, " n"]]:
    """Gives `strata` of images that all have a class, or of their sets."""
    return strata(truth, groups) if truth.ndim == 1 else strata(np.arange(len(truth)), groups, truth)


def draw_groups(
    labels: Int[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"] | None,
    share: float,
    rng: np.random.Generator,
    leave: int,
    sets: UInt8[np.ndarray, "s K"] | None = None,
) -> Bool[np.ndarray, " n"]:
    """Draws groups with about a share of the images of each stratum; at least one, but always `leave` of them stay.

    With `leave` 0 each class has images among those drawn, and a smaller share of one seed is part of a larger one.
    With 1 each class keeps images, and of 10 draws the one is taken whose shares of the classes are nearest.
    """
    stratum, group = strata(labels, groups, sets)
    used = np.flatnonzero(group >= 0)
    group, drawn = group[used], np.zeros(len(labels), dtype=bool)
    image, label = _classes_of(labels[used], sets)
    draws = [_draw(stratum, group, image, label, share, rng, leave) for _ in range(_TRIES if leave else 1)]
    images = np.bincount(label)

    def missed(taken: np.ndarray) -> float:
        of_classes = np.bincount(label[taken[group[image]]], minlength=len(images))
        return float(np.abs(of_classes / np.maximum(images, 1) - share)[images > 0].sum())

    drawn[used] = min(draws, key=missed)[group]
    return drawn


def _draw(
    stratum: np.ndarray,
    group: np.ndarray,
    image: np.ndarray,
    label: np.ndarray,
    share: float,
    rng: np.random.Generator,
    leave: int,
) -> Bool[np.ndarray, " g"]:
    """Draws groups once; `group` is that of each image, `image` and `label` are pairs."""
    drawn, sizes = np.zeros(len(stratum), dtype=bool), np.bincount(group, minlength=len(stratum))
    order = rng.permutation(len(stratum))
    order = order[np.argsort(stratum[order], kind="stable")]
    for members in np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1):
        wanted, most = share * sizes[members].sum(), len(members) - leave
        if most < 1:
            continue
        if leave:
            taken = _nearest(sizes[members], wanted)[:most]
            drawn[members[taken] if len(taken) else members[sizes[members].argmin()]] = True
        else:
            reached = np.abs(np.cumsum(sizes[members]) - wanted).argmin()
            drawn[members[: reached + 1]] = True
    # A class that is the rarest of no group gives, or keeps, one of the groups that have it.
    other = np.setdiff1d(label, stratum)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    first, last = np.full(int(label.max(initial=0)) + 1, len(order)), np.full(int(label.max(initial=0)) + 1, -1)
    np.minimum.at(first, label, rank[group[image]])
    np.maximum.at(last, label, rank[group[image]])
    drawn[order[last[other] if leave else first[other]]] = not leave
    return drawn


def _nearest(sizes: Int[np.ndarray, " k"], wanted: float) -> list[int]:
    """Takes one after the other of those that bring the sum nearer to what is wanted."""
    taken, total = list[int](), 0
    for number, size in enumerate(sizes.tolist()):
        if abs(total + size - wanted) < abs(total - wanted):
            taken.append(number)
            total += size
    return taken
