"""Patch tokens of a frozen encoder, without class token and registers: float16, in memory or made anew each time.

fit into a share of memory -> one pass over the images, cached on disk as features are -> rows of an array
do not                     -> the encoder runs again whenever they are read
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mpp import dist
from mpp.data.sources.base import Source, count
from mpp.downstream.feature_cache import cached_features
from mpp.downstream.features import FrozenEncoder, in_order
from mpp.errors import RunError
from mpp.model.kernel_choice import EVALUATION_BATCH
from mpp.system.cache import shown_size
from mpp.system.cores import memory
from mpp.system.progress import Progress

_SHARE = 0.5  # of the memory, what the tokens of all images may take
_ROUNDING = 1e-7  # of a mean square: a variance below it is rounding

Found = tuple[Float[Tensor, "b patches d"], Int64[np.ndarray, " b"]]
"""Tokens on the encoder's device, and which image each row is of."""


class TokenReader:
    """Reads the patch tokens of the first of the encoder's layers.

    Args:
        images: how many will be read in all; by that it is decided whether the tokens are kept.
        cache: whether kept ones are cached on disk.

    Attributes:
        kept: whether they are kept in memory.
        note: says so in a line.
    """

    def __init__(self, frozen: FrozenEncoder, images: int, cache: bool) -> None:
        self.frozen, self._cache = frozen, cache
        blank = torch.zeros(1, frozen.weights.in_chans, *frozen.image_hw, dtype=torch.uint8, device=frozen.device)
        _, self.patches, self.width = frozen.read(blank, "none").shape
        size, room = images * self.patches * self.width * 2, memory()
        self.kept = not dist.any_rank(size * dist.world_from_environment().local_size > _SHARE * room)
        what = f"patch tokens of {count(images, 'image')}, {self.patches} x {self.width} each, {shown_size(size)}"
        where = "kept in memory"
        if not self.kept:
            where = f"more than half of the memory, {shown_size(room)}: the encoder runs again in each epoch"
        self.note = f"{what} in float16: {where}"

    def extract(self, source: Source, indices: Int64[np.ndarray, " m"]) -> tuple["Tokens", Int64[np.ndarray, " n"]]:
        """Gives tokens of those of these images, ascending, that can be decoded, and their numbers.

        Raises:
            ValueError: tokens that are not finite.
            RunError: no image that can be decoded.
        """
        self.frozen.settle()  # by the kernel's name tokens are cached, too
        tokens = Tokens(self, source, indices)
        return tokens, tokens.decoded

    def rows(self, source: Source, indices: Int64[np.ndarray, " m"]) -> tuple[np.ndarray, Int64[np.ndarray, " n"]]:
        """Gives the tokens to keep, (n, patches * d), from the cache or by all ranks together."""
        if not self._cache:
            return self._pass(source, indices)
        key = {**self.frozen.key(source, indices), "layer": self.frozen.layers[0], "tokens": "float16"}
        return cached_features(key, lambda: self._pass(source, indices), np.float16)

    def _pass(self, source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rank, size = dist.rank_and_size()
        mine = indices[rank::size]
        rows, decoded = np.empty((len(mine), self.patches * self.width), dtype=np.float16), [mine[:0]]
        done = 0
        with Progress("reading images", len(mine)) as progress:
            for tokens, images in self.stream(source, mine, EVALUATION_BATCH):
                rows[done : done + len(images)] = tokens.flatten(1).cpu().numpy()
                done += len(images)
                decoded.append(images)
                progress.to(done)
        if size == 1:
            return rows[:done], np.concatenate(decoded)
        return in_order(dist.gather((rows[:done], np.concatenate(decoded))))

    def stream(self, source: Source, indices: Int64[np.ndarray, " m"], batch_size: int) -> Iterator[Found]:
        """Runs the encoder on these images in order; those that cannot be decoded are left out of their batch."""
        with contextlib.closing(self.frozen.batches(source, indices, batch_size)) as batches:
            for batch in batches:
                if len(batch["images"]):
                    images = batch["images"].to(self.frozen.device, non_blocking=True)
                    yield self.frozen.read(images, "none").half(), batch["index"].numpy().copy()


class Tokens:
    """Patch tokens of `decoded` images, read in any order.

    Attributes:
        decoded: the number of each image in its source, ascending (n,).
        mean, std: of each dimension over all tokens, float64 (d,); std is infinite for one that is always the same.
    """

    def __init__(self, reader: TokenReader, source: Source, indices: Int64[np.ndarray, " m"]) -> None:
        self._reader, self._source = reader, source
        self._rows: np.ndarray | None = None
        if reader.kept:
            self._rows, self.decoded = reader.rows(source, indices)
            every = cut(np.arange(len(self.decoded)))
            self.mean, self.std, _ = _moments(zip(self.batches(every), every, strict=True), source, reader.width)
        else:
            found = reader.stream(source, indices, EVALUATION_BATCH)
            self.mean, self.std, self.decoded = _moments(found, source, reader.width)

    def __len__(self) -> int:
        return len(self.decoded)

    @property
    def device(self) -> torch.device:
        """Of the encoder."""
        return self._reader.frozen.device

    def batches(self, positions: Sequence[Int64[np.ndarray, " b"]]) -> Iterator[Float[Tensor, "b patches d"]]:
        """Gives float16 tokens of images by their positions in `decoded`; all batches but the last are of one size.

        Raises RunError where an image could be read before and no longer can.
        """
        if self._rows is not None:
            for some in positions:
                rows = torch.from_numpy(self._rows[some]).to(self.device)
                yield rows.unflatten(1, (self._reader.patches, -1))
        elif positions:
            order = self.decoded[np.concatenate(positions)]
            for some, (tokens, images) in zip(
                positions, self._reader.stream(self._source, order, len(positions[0])), strict=True
            ):
                if not np.array_equal(images, self.decoded[some]):
                    raise RunError(f"images of {self._source.name} that could be read before no longer can: try again")
                yield tokens


def cut(positions: Int64[np.ndarray, " n"], size: int = EVALUATION_BATCH) -> list[Int64[np.ndarray, " b"]]:
    """Cuts positions into batches."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _moments(
    found: Iterable[Found], source: Source, width: int
) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, " d"], Int64[np.ndarray, " n"]]:
    """Mean and standard deviation of each dimension over all tokens, and the images that they are of."""
    total, squares, tokens, images = np.zeros(width), np.zeros(width), 0, [np.empty(0, dtype=np.int64)]
    for some, of in found:
        flat = some.float().flatten(0, 1)
        total += flat.sum(0, dtype=torch.float64).cpu().numpy()
        squares += flat.square().sum(0, dtype=torch.float64).cpu().numpy()
        tokens += len(flat)
        images.append(of)
    if not tokens:
        raise RunError(f"none of the images of {source.name} that are needed could be decoded")
    if not np.isfinite(squares).all():
        raise ValueError("patch tokens are NaN, infinite or beyond float16 (65,504): has the encoder diverged?")
    mean, square = total / tokens, squares / tokens
    variance = square - mean**2
    std = np.where(variance > _ROUNDING * square, np.sqrt(variance.clip(min=0)), np.inf)
    return mean, std, np.concatenate(images)
