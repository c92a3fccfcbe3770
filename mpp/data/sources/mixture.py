"""Several sources as one: `folder:/a + shards:/b`, or with weights `3 * folder:/a + 1 * shards:/b`."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from mpp.data.sources.base import ClassNames, Placement, Sample, Source, SourceError, check_index, count

# What the draws are for; the loader numbers its own from 1.
_PASS, _SHUFFLE = 101, 102
_TOGETHER = 2**18
"""Images of a small part whose passes are drawn by one generator."""


class MixtureSource(Source):
    """The images of its parts, one part after the other.

    Args:
        name: the string it was opened with.
        parts: at least one source; classes of the same name are the same class.
        weights: positive, one a part: how often images of the parts are drawn; None: every image alike.

    Raises SourceError: weights that do not fit, or so small that a part would never be drawn.
    """

    def __init__(self, name: str, parts: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.parts, self.weights = tuple(parts), None if weights is None else tuple(map(float, weights))
        self.warnings = sum((part.warnings for part in parts), ())
        self.reads_together = any(part.reads_together for part in parts)
        self._sizes = np.array([len(part) for part in self.parts], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        if self.weights is not None and len(self.weights) != len(parts):
            raise SourceError(f"{name}: {len(self.weights)} weights for {len(parts)} sources; give one each")
        for weight in self.weights or ():
            if not 0 < weight < float("inf"):
                raise SourceError(f"{name}: the weight {weight:g} is not positive; write e.g. 3 * folder:DIR")
        self.quotas = _quotas(len(self), self._sizes if self.weights is None else np.array(self.weights))
        for part, quota in zip(self.parts, self.quotas.tolist(), strict=True):
            if not quota:
                raise SourceError(
                    f"{name}: no image of {part.name} would ever be drawn, with an epoch of {len(self):,}; "
                    "give it more weight or leave it out"
                )
        super().__init__(name, *self._joined_labels(), "; ".join(self._notes()))

    def _joined_labels(self) -> tuple[np.ndarray | None, ClassNames]:
        """Labels and classes of all parts, the classes by name; None where a part has none, or several an image."""
        if any(part.classes is None or part.label_sets() is not None for part in self.parts):
            return None, None
        classes = tuple(dict.fromkeys(name for part in self.parts for name in part.classes or ()))
        label_of = {name: label for label, name in enumerate(classes)}
        joined = []
        for part in self.parts:
            # A label of -1 takes the last entry, which is -1.
            numbers = np.array([*(label_of[name] for name in part.classes or ()), -1], dtype=np.int64)
            labels = part.labels()
            joined.append(np.full(len(part), -1) if labels is None else numbers[labels])
        return np.concatenate(joined), classes

    def _notes(self) -> Iterator[str]:
        """The parts, with weights the share that is drawn from each, and labels left aside; for `describe`."""
        for part, share in zip(self.parts, self.quotas / len(self), strict=True):
            drawn = "" if self.weights is None else f", {share:.1%} of the images drawn"
            yield f"{part.name}: {count(len(part), 'image')}{drawn}"
        bare = [part.name for part in self.parts if part.classes is None]
        if 0 < len(bare) < len(self.parts):
            yield f"labels left aside, for {' and '.join(bare)} has none"
        elif several := [part.name for part in self.parts if part.label_sets() is not None]:
            yield f"labels left aside, for {' and '.join(several)} has several an image: join them into one source"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        """The part, and the index in it."""
        part = int(np.searchsorted(self._starts, check_index(index, len(self)), side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def _by_part(self, indices: np.ndarray) -> Iterator[tuple[Source, np.ndarray, np.ndarray]]:
        """Each part that has some of these images, their rows in `indices`, and their indices in the part."""
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        for part in np.unique(part_of).tolist():
            rows = np.flatnonzero(part_of == part)
            yield self.parts[part], rows, indices[rows] - self._starts[part]

    def image(self, index: int) -> bytes | np.ndarray:
        part, inner = self._find(index)
        return part.image(inner)

    def location(self, index: int) -> str:
        part, inner = self._find(index)
        return part.location(inner)

    def record(self, index: int) -> str:
        part, inner = self._find(index)
        return part.record(inner)

    def groups(self) -> Sequence[str] | None:
        groups = [part.groups() for part in self.parts]
        if all(of is None for of in groups):
            return None
        return [name for of, part in zip(groups, self.parts, strict=True) for name in of or [""] * len(part)]

    def size(self, index: int) -> int:
        part, inner = self._find(index)
        return part.size(inner)

    def _read_together(self, indices: Sequence[int]) -> list[Sample | OSError]:
        found = dict[int, Sample | OSError]()
        for part, rows, inner in self._by_part(np.array([check_index(index, len(self)) for index in indices])):
            for row, sample in zip(rows.tolist(), part.read_many(inner.tolist()), strict=True):
                label = self.label(indices[row])
                found[row] = sample if isinstance(sample, OSError) else (sample[0], label)
        return [found[row] for row in range(len(indices))]

    def placement(self, indices: np.ndarray) -> Placement:
        joined = super().placement(indices)
        joined = Placement(joined.place.copy(), joined.size.copy(), joined.local)
        for part, rows, inner in self._by_part(indices):
            for whole, some in zip(joined, part.placement(inner), strict=True):
                whole[rows] = some
        return joined

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        yield json.dumps(self.weights)
        for part in self.parts:
            yield part.fingerprint(times=times, most=most, labelled=labelled)

    def draw(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which images an epoch shows, in order.

        Each part has an endless stream of permutations of its images. An epoch takes as many as the part's quota from
        where the one before it stopped, and shuffles what the parts gave. So every image of a part comes equally
        often, give or take once, and no (pass, index) ever comes twice.

        Args:
            seed: of all the orders, from 0.
            epoch: from 0; any epoch costs the same.

        Returns:
            The pass that each image belongs to and its index: int64 (len,), int64 (len,).
        """
        # Pass and index in one number, so that one shuffle in place will do; passes count from the part's first here.
        packed, first, filled = np.empty(len(self), dtype=np.int64), epoch * self.quotas // self._sizes, 0
        for part, (start, quota) in enumerate(zip(self._starts.tolist(), self.quotas.tolist(), strict=False)):
            for turn, indices in self._stream(seed, part, epoch * quota, (epoch + 1) * quota):
                packed[filled : filled + len(indices)] = (turn - first[part]) * len(self) + indices + start
                filled += len(indices)
        np.random.default_rng([_SHUFFLE, seed, epoch]).shuffle(packed)
        passes = packed // len(self)
        indices = packed - passes * len(self)
        passes += first[np.searchsorted(self._starts, indices, side="right") - 1]
        return passes, indices

    def _stream(self, seed: int, part: int, at: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pass and index in the part of the images from `at` to `stop` of its stream, piece by piece.

        A generator draws several passes of a small part: one for each would take longer than the images.
        """
        size = int(self._sizes[part])
        many = max(1, _TOGETHER // size)
        while at < stop:
            piece, begin = divmod(at, many * size)
            end = min(many * size, begin + stop - at)
            generator = np.random.default_rng([_PASS, seed, part, piece])
            turns = np.arange(begin, end) // size + piece * many
            yield turns, generator.permuted(np.tile(np.arange(size), (many, 1)), axis=1).reshape(-1)[begin:end]
            at += end - begin


def _quotas(total: int, weights: np.ndarray) -> np.ndarray:
    """int64, summing to `total`, in proportion to the weights by largest remainder."""
    exact = total * (weights / weights.sum())
    quotas = np.floor(exact).astype(np.int64)
    # Stable, so that among equal remainders the first part wins everywhere.
    largest = np.argsort(-(exact - quotas), kind="stable")
    quotas[largest[: total - int(quotas.sum())]] += 1
    return quotas
