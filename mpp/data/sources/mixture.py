"""Several sources as one: `folder:/a + shards:/b`, or with weights `3 * folder:/a + 1 * shards:/b`."""

from collections.abc import Iterator, Sequence

import numpy as np

from mpp.data.sources.base import (
    Source,
    SourceError,
    block,
    check_index,
    count,
    read_many,
    size_of,
    summary,
    warnings_of,
    where,
)

# What the draws are for; the loader numbers its own from 1.
_PASS, _SHUFFLE = 101, 102
_TOGETHER = 2**18
"""Images of a small part whose passes are drawn by one generator."""


class MixtureSource:
    """The images of its parts, one part after the other.

    Args:
        name: the string it was opened with.
        parts: at least one source; classes of the same name are the same class.
        weights: positive, one a part: how often images of the parts are drawn; None: every image alike.

    Raises:
        SourceError: weights that do not fit, or so small that a part would never be drawn.
    """

    def __init__(self, name: str, parts: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.name, self.parts = name, tuple(parts)
        self.warnings = sum(map(warnings_of, parts), ())
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)
        self._sizes = np.array([len(part) for part in self.parts], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._check_weights()
        self.quotas = _quotas(len(self), self._sizes if self.weights is None else np.array(self.weights))
        for part, quota in zip(self.parts, self.quotas, strict=True):
            if not quota:
                raise SourceError(
                    f"{name}: no image of {part.name} would ever be drawn, with an epoch of {len(self):,}; "
                    "give it more weight or leave it out"
                )
        named = [part.classes for part in self.parts]
        known = [classes for classes in named if classes is not None]
        self.classes = tuple(dict.fromkeys(sum(known, ()))) if len(known) == len(named) else None
        numbers = {name: label for label, name in enumerate(self.classes or ())}
        self._numbers = [
            np.array([numbers.get(label, -1) for label in classes] + [-1], dtype=np.int64) for classes in known
        ]
        bare = [part.name for part in self.parts if part.classes is None]
        self._shape = _block_shape(self.parts)
        self._aside = f"labels left aside, for {' and '.join(bare)} has none" if known and bare else ""

    def _check_weights(self) -> None:
        weights = self.weights
        if weights is None:
            return
        if len(weights) != len(self.parts):
            raise SourceError(f"{self.name}: {len(weights)} weights for {len(self.parts)} sources; give one each")
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise SourceError(f"{self.name}: the weight {weight:g} is not positive; write e.g. 3 * folder:DIR")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[int, int]:
        """Which part, and the index in it."""
        part = int(np.searchsorted(self._starts, check_index(index, len(self)), side="right")) - 1
        return part, index - int(self._starts[part])

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each image the number of its part, and its index there: int64 (n,) each."""
        of = np.searchsorted(self._starts, indices, side="right") - 1
        return of, indices - self._starts[of]

    def where(self, index: int) -> str:
        """What the part calls the image."""
        part, inner = self._find(index)
        return where(self.parts[part], inner)

    def size(self, index: int) -> int:
        """As `size_of` its part."""
        part, inner = self._find(index)
        return size_of(self.parts[part], inner)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """The image and its label among `classes`."""
        part, inner = self._find(index)
        image, label = self.parts[part].read(inner)
        return image, self._label(part, label)

    def read_many(self, indices: Sequence[int]) -> list[tuple[bytes | np.ndarray, int | None] | OSError]:
        """Several images and labels, or why they cannot be read: those of one part at once, if the part can."""
        places = [self._find(index) for index in indices]
        found: dict[tuple[int, int], tuple[bytes | np.ndarray, int | None] | OSError] = {}
        for part in sorted({part for part, _ in places}):
            inner = [index for of, index in places if of == part]
            for index, held in zip(inner, read_many(self.parts[part], inner), strict=True):
                found[part, index] = held if isinstance(held, OSError) else (held[0], self._label(part, held[1]))
        return [found[place] for place in places]

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """Images uint8 (B, H, W, C), where all parts hold theirs in arrays, and all have one size."""
        if self._shape is None:
            return None
        images = np.empty((len(indices), *self._shape), dtype=np.uint8)
        of = np.searchsorted(self._starts, indices, side="right") - 1
        for part in np.unique(of).tolist():
            found = block(self.parts[part], indices[of == part] - self._starts[part])
            if found is None:
                return None
            images[of == part] = found
        return images

    def _label(self, part: int, label: int | None) -> int | None:
        """A part's label, by number among `classes`."""
        return None if label is None or label < 0 or self.classes is None else int(self._numbers[part][label])

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 where an image has none, or None."""
        if self.classes is None:
            return None
        held = [part.labels() for part in self.parts]
        # -1 takes the last entry, which is -1.
        return np.concatenate(
            [numbers[labels] for numbers, labels in zip(self._numbers, held, strict=True) if labels is not None]
        )

    def describe(self) -> str:
        """One line: count, classes, the parts, and with weights the share that is drawn from each."""
        shares = self.quotas / len(self)
        parts = [
            f"{part.name}: {count(len(part), 'image')}"
            + ("" if self.weights is None else f", {share:.1%} of the images drawn")
            for part, share in zip(self.parts, shares, strict=True)
        ]
        return summary(len(self), self.classes, "; ".join(filter(None, (*parts, self._aside))))

    def draw(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which images an epoch shows, in order.

        Each part has an endless stream of permutations of its images. An epoch takes as many as the part's quota from
        where the one before it stopped, and shuffles what the parts gave. So every image of a part is seen equally
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


def _block_shape(parts: Sequence[Source]) -> tuple[int, ...] | None:
    """(H, W, C) of the images, where `block` gives those of all parts and they are of one size."""
    shapes: set[tuple[int, ...]] = set()
    for part in parts:
        found = block(part, np.zeros(1, dtype=np.int64))
        if found is None:
            return None
        shapes.add(found.shape[1:])
    return shapes.pop() if len(shapes) == 1 else None


def _quotas(total: int, weights: np.ndarray) -> np.ndarray:
    """int64, summing to `total`, in proportion to the weights by largest remainder."""
    exact = total * (weights / weights.sum())
    quotas = np.floor(exact).astype(np.int64)
    # Stable, so that among equal remainders the first part wins everywhere.
    largest = np.argsort(-(exact - quotas), kind="stable")
    quotas[largest[: total - int(quotas.sum())]] += 1
    return quotas
