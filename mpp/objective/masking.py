"""Which patches are corrupted, and how (paper, appendix B.1.2).

1. `pick_patches` chooses exactly K = round(ratio * N) patches of every image.
2. `draw_corruption` decides for each of them, independently: replace its embedding by the learnable [mask] embedding
   (80 %), by a random other patch's embedding (10 %), or leave it (10 %).
3. `corrupt` applies that to patch embeddings to which no position embedding has been added yet.

All draws are pure functions of a generator and are made for the whole global batch at once, of which each device takes
its rows: the corruption is the same on any number of devices.
"""

import itertools
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

MASK, RANDOM, UNCHANGED = 0, 1, 2
KINDS = ("masked", "random", "unchanged")


class Corruption(NamedTuple):
    """The corruption of a batch of B images, K patches each."""

    picked: Int[Tensor, "B K"]
    """int64, the corrupted patches, ascending."""
    kinds: Int[Tensor, "B K"]
    """int64, MASK, RANDOM or UNCHANGED."""
    other: Int[Tensor, "B K"]
    """int64, for RANDOM the patch whose embedding is taken, counted through `group` images (row-major)."""
    group: int = 1
    """Number of consecutive images that `other` counts through; 1 keeps replacements within the image."""

    def rows(self, start: int, stop: int) -> "Corruption":
        """The corruption of images start to stop; both must be multiples of `group`."""
        if start % self.group or stop % self.group:
            raise ValueError(f"rows {start}:{stop} cut through a group of {self.group} images")
        return Corruption(self.picked[start:stop], self.kinds[start:stop], self.other[start:stop], self.group)


def num_picked(ratio: float, patches: int) -> int:
    """K = round(ratio * N), at least 1."""
    return max(round(ratio * patches), 1)


def pick_patches(
    batch: int, grid: tuple[int, int], ratio: float, generator: Generator, style: str = "uniform"
) -> Int[Tensor, "B K"]:
    """K patches of each image, ascending: uniformly without replacement, or in rectangular blocks ("block").

    Blocks have areas from 4 patches to a fifth of the grid and log-uniform aspect ratios from 0.3 to 1/0.3 (as in
    BEiT, arXiv 2106.08254, algorithm 1); they are laid until K patches are covered, and the last one is cut to fit.
    """
    patches = grid[0] * grid[1]
    k = num_picked(ratio, patches)
    if style == "block":
        return _pick_blocks(batch, grid, k, generator)
    order = torch.rand(batch, patches, generator=generator, device=generator.device).argsort(dim=1)
    return order[:, :k].sort(dim=1).values


_ROUNDS, _AT_ONCE = 128, 16
"""Blocks that an image may take on a device, and how many are in memory at once. Of 14 x 14 patches 60 % take 10 blocks
in the mean and 24 in one image of 10,000; 90 % take 35 and 86."""


def _pick_blocks(
    batch: int, grid: tuple[int, int], k: int, generator: Generator, rounds: int | None = None
) -> Int[Tensor, "B K"]:
    """Lays one block a round in every image: on a CPU until all have K patches, else (or given `rounds`) so often.

    Waiting for a device after each round would cost more than superfluous blocks. Patches that are still missing after
    the last round are picked at random.
    """
    (rows, columns), device = grid, generator.device
    if rounds is None and device.type != "cpu":
        rounds = _ROUNDS
    drawn = rounds or 1  # at once
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    never = torch.iinfo(torch.int32).max
    covered = torch.full((batch, rows, columns), never, dtype=torch.int32, device=device)  # in which round first
    for begin in range(1) if rounds else itertools.count():
        draw = torch.rand(drawn, batch, 4, generator=generator, device=device).unbind(2)
        smallest = min(4, k)
        area = smallest + draw[0] * (max(rows * columns / 5, smallest) - smallest)
        aspect = torch.exp((2 * draw[1] - 1) * math.log(1 / 0.3))
        height = (area * aspect).sqrt().round().clamp(1, rows)
        width = (area / aspect).sqrt().round().clamp(1, columns)
        top, left = (draw[2] * (rows - height + 1)).floor(), (draw[3] * (columns - width + 1)).floor()
        top, height, left, width = (x.long()[..., None] for x in (top, height, left, width))
        in_rows, in_columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
        number = torch.arange(begin, begin + drawn, dtype=torch.int32, device=device).view(-1, 1, 1, 1)
        for r, c, n in zip(*(x.split(_AT_ONCE) for x in (in_rows, in_columns, number)), strict=True):
            laid = torch.where(r[..., :, None] & c[..., None, :], n, never)
            covered = torch.minimum(covered, laid.amin(dim=0))
        if rounds is None and bool(((covered < never).sum(dim=(1, 2)) >= k).all()):
            break
    covered, order = covered.flatten(1), torch.arange(rows * columns, dtype=torch.float64, device=device)
    order = order.expand(batch, -1) / (rows * columns)  # the last block is cut by rows
    if rounds:
        order = torch.where(covered < never, order, torch.rand(order.shape, generator=generator, device=device))
    return (covered + order).argsort(dim=1)[:, :k].sort(dim=1).values


def others(picked: Int[Tensor, "B K"], patches: int) -> Int[Tensor, "B rest"]:
    """The patches of each image that are not picked, ascending."""
    left = torch.ones(len(picked), patches, dtype=torch.int8, device=picked.device).scatter(1, picked, 0)
    # Sorted, not nonzero: of a known size, so that nothing waits for the device.
    return left.argsort(dim=1, descending=True, stable=True)[:, : patches - picked.shape[1]]


def draw_corruption(
    picked: Int[Tensor, "B K"],
    patches: int,
    generator: Generator,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    group: int = 1,
) -> Corruption:
    """Draws the kind of every picked patch, and for random replacements the other patch.

    The other patch is uniform over all patches of the image (of the `group` images for group > 1) but the patch itself
    and those hidden behind [mask]: the pixels of a masked patch reach its own prediction on no path (except in hybrids,
    whose convolutions see beyond a patch). If all others are masked, a masked one is taken, never the patch itself.

    Raises:
        ValueError: a single patch, which has no other; a batch that is not a multiple of `group`.
    """
    batch, k = picked.shape
    if split[RANDOM] > 0 and patches * group < 2:
        raise ValueError("an image of one patch has no other patch to take; set objective.split to 0.9 0 0.1")
    if batch % group:
        raise ValueError(f"a batch of {batch} images is not a multiple of the group of {group}")
    device = picked.device
    draw = torch.rand(batch, k, generator=generator, device=device)
    kinds = torch.where(draw < split[MASK] + split[RANDOM], RANDOM, UNCHANGED).masked_fill(draw < split[MASK], MASK)
    uniform = torch.rand(batch, k, generator=generator, device=device, dtype=torch.float64)

    hidden = torch.zeros(batch, patches, dtype=torch.bool, device=device).scatter(1, picked, kinds == MASK)
    hidden = hidden.view(batch // group, group * patches)
    own = (picked.view(-1, group, k) + patches * torch.arange(group, device=device)[None, :, None]).flatten(1)
    other = _draw_other(hidden, own, uniform.view(batch // group, group * k))
    return Corruption(picked, kinds, other.view(batch, k), group)


def _draw_other(
    hidden: Bool[Tensor, "G M"], own: Int[Tensor, "G J"], uniform: Float[Tensor, "G J"]
) -> Int[Tensor, "G J"]:
    """For each own patch another of the M, uniform over those not hidden."""
    visible_first = hidden.to(torch.int8).argsort(dim=1, stable=True)
    rank = torch.empty_like(visible_first).scatter(
        1, visible_first, torch.arange(hidden.shape[1], device=hidden.device).expand_as(visible_first)
    )
    count = (~hidden).sum(dim=1, keepdim=True)
    choices = count - (~hidden).gather(1, own).long()
    chosen = (uniform * choices).long().clamp(max=(choices - 1).clamp(min=0))
    chosen = chosen + (chosen >= rank.gather(1, own)).long()  # steps over the patch itself
    return visible_first.gather(1, chosen.clamp(max=hidden.shape[1] - 1))


def corrupt(
    tokens: Float[Tensor, "B N D"], corruption: Corruption, mask_token: Float[Tensor, " D"]
) -> Float[Tensor, "B N D"]:
    """The patch embeddings with the picked ones corrupted, as a new tensor."""
    batch, patches, _ = tokens.shape
    picked, kinds, other, group = corruption
    # Whole rows are copied once, each from where its embedding comes: x 3 faster on the CPU than gather and scatter.
    row = torch.arange(batch * patches, device=tokens.device).view(batch, patches)
    first = row[::group, :1].repeat_interleave(group, dim=0)  # of the group
    source = row.scatter(1, picked, torch.where(kinds == RANDOM, first + other, row.gather(1, picked)))
    taken = tokens.flatten(0, 1).index_select(0, source.flatten()).view_as(tokens)
    masked = torch.zeros_like(row, dtype=torch.bool).scatter(1, picked, kinds == MASK)
    return torch.where(masked[..., None], mask_token.to(tokens.dtype), taken)
