"""Which patches are corrupted and how: exact counts, the draws' probabilities within 5 sigma, and no leak."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.masking import (
    MASK,
    RANDOM,
    UNCHANGED,
    Corruption,
    _pick_blocks,
    corrupt,
    draw_corruption,
    num_picked,
    pick_patches,
)
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.target import ColourTarget

Grid = tuple[int, int]
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
ratios = st.floats(0.01, 1.0)
seeds = st.integers(0, 2**32)
styles = st.sampled_from(["uniform", "block"])
unhurried = settings(deadline=None, max_examples=60, derandomize=True)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def within(count: float, trials: int, probability: float, sigmas: float = 5) -> bool:
    """Whether a count is within `sigmas` of a binomial's mean."""
    return abs(count - trials * probability) <= sigmas * math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize(
    ("ratio", "patches", "k"), [(0.5, 196, 98), (0.15, 196, 29), (0.5, 64, 32), (1.0, 9, 9), (0.01, 9, 1)]
)
def test_k_of_the_papers_ratios(ratio: float, patches: int, k: int) -> None:
    assert num_picked(ratio, patches) == k


@unhurried
@given(grids, ratios, seeds, styles)
def test_exactly_k_patches_of_every_image_are_picked_ascending_and_distinct(
    grid: Grid, ratio: float, seed: int, style: str
) -> None:
    patches = grid[0] * grid[1]
    picked = pick_patches(3, grid, ratio, seeded(seed), style)
    assert picked.shape == (3, num_picked(ratio, patches))
    assert picked.dtype == torch.int64
    assert (picked.diff(dim=1) > 0).all()
    assert picked.min() >= 0
    assert picked.max() < patches
    assert torch.equal(picked, pick_patches(3, grid, ratio, seeded(seed), style))


@pytest.mark.parametrize("style", ["uniform", "block"])
def test_images_and_seeds_differ(style: str) -> None:
    first, second = (pick_patches(2, (8, 8), 0.5, seeded(seed), style) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def pair_counts(picked: Tensor, grid: Grid) -> dict[tuple[int, int], int]:
    """How often any two patches are picked together."""
    taken = torch.zeros(len(picked), grid[0] * grid[1]).scatter(1, picked, 1.0)
    together = (taken.T @ taken).long()
    return {(a, b): int(together[a, b]) for a, b in itertools.combinations(range(grid[0] * grid[1]), 2)}


def test_uniform_picking_takes_every_patch_and_every_pair_equally_often() -> None:
    trials = 20_000
    picked = pick_patches(trials, (3, 4), 5 / 12, seeded(0))
    counts, pairs = picked.flatten().bincount(minlength=12), pair_counts(picked, (3, 4))
    assert all(within(count, trials, 5 / 12) for count in counts.tolist()), counts
    assert all(within(count, trials, 5 * 4 / (12 * 11)) for count in pairs.values()), pairs


@pytest.mark.parametrize("grid", [(8, 8), (5, 9)])
def test_block_picking_takes_neighbours_together_more_often_than_uniform_picking(grid: Grid) -> None:
    trials, patches = 4000, grid[0] * grid[1]
    k = num_picked(0.4, patches)
    counts = pair_counts(pick_patches(trials, grid, 0.4, seeded(0), "block"), grid)
    neighbours = [n for (a, b), n in counts.items() if b - a == grid[1] or (b - a == 1 and b % grid[1])]
    chance = k * (k - 1) / (patches * (patches - 1))
    assert sum(neighbours) / len(neighbours) / trials > 1.2 * chance


def picked_by_hand(batch: int, grid: Grid, k: int, generator: Generator) -> list[list[int]]:
    """BEiT's algorithm, an image and a patch at a time, with one draw of four numbers for every image's next block."""
    rows, columns = grid
    taken: list[list[int]] = [[] for _ in range(batch)]
    while any(len(own) < k for own in taken):
        for own, draw in zip(taken, torch.rand(batch, 4, generator=generator), strict=True):
            smallest = min(4, k)
            area = smallest + draw[0] * (max(rows * columns / 5, smallest) - smallest)
            aspect = torch.exp((2 * draw[1] - 1) * math.log(1 / 0.3))
            height = int((area * aspect).sqrt().round().clamp(1, rows))
            width = int((area / aspect).sqrt().round().clamp(1, columns))
            top, left = int(draw[2] * (rows - height + 1)), int(draw[3] * (columns - width + 1))
            for row, column in itertools.product(range(top, top + height), range(left, left + width)):
                if len(own) < k and row * columns + column not in own:
                    own.append(row * columns + column)
    return [sorted(own) for own in taken]


@pytest.mark.parametrize("rounds", [None, 128])
@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.6), ((8, 8), 0.15), ((4, 6), 0.8), ((1, 7), 0.4)])
def test_blocks_are_laid_by_the_algorithm(grid: Grid, ratio: float, rounds: int | None) -> None:
    """Also by a fixed number of rounds, as on a device, where 4 images at once draw what they draw round by round."""
    k = num_picked(ratio, grid[0] * grid[1])
    ours, theirs = seeded(1), seeded(1)
    assert _pick_blocks(4, grid, k, ours, rounds).tolist() == picked_by_hand(4, grid, k, theirs)
    assert rounds or torch.equal(ours.get_state(), theirs.get_state())


def test_what_too_few_blocks_leave_is_filled_up_evenly() -> None:
    trials, grid = 4000, (5, 6)
    picked = _pick_blocks(trials, grid, 30, seeded(0), 16)
    assert torch.equal(picked, torch.arange(30).expand(trials, -1))
    picked = _pick_blocks(trials, grid, 29, seeded(0), 16)
    assert (picked.diff(dim=1) > 0).all()
    corners = [trials - int((picked == corner).sum()) for corner in (0, 5, 24, 29)]  # how often it is left out
    assert max(corners) < 1.3 * min(corners)


KINDS_OF = [(0.8, 0.1, 0.1), (0.5, 0.2, 0.3), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


@pytest.mark.parametrize("split", KINDS_OF)
@pytest.mark.parametrize("group", [1, 4])
def test_kinds_have_the_probabilities_of_the_split(split: tuple[float, float, float], group: int) -> None:
    picked = pick_patches(4000, (4, 4), 0.5, seeded(0))
    kinds = draw_corruption(picked, 16, seeded(1), split, group).kinds
    for kind, probability in zip((MASK, RANDOM, UNCHANGED), split, strict=True):
        assert within(int((kinds == kind).sum()), kinds.numel(), probability)


def test_kinds_of_two_patches_of_an_image_are_independent() -> None:
    kinds = draw_corruption(torch.tensor([[0, 1]]).expand(40_000, 2), 9, seeded(0), (0.5, 0.3, 0.2)).kinds
    for a, b in itertools.product(range(3), repeat=2):
        both = int(((kinds[:, 0] == a) & (kinds[:, 1] == b)).sum())
        assert within(both, 40_000, (0.5, 0.3, 0.2)[a] * (0.5, 0.3, 0.2)[b])


@unhurried
@given(st.integers(1, 7), st.integers(1, 7), ratios, seeds, st.sampled_from([1, 2, 3]), st.sampled_from(KINDS_OF[:2]))
def test_a_replacement_is_never_the_patch_itself_and_hidden_only_where_nothing_else_is_left(
    rows: int, columns: int, ratio: float, seed: int, group: int, split: tuple[float, float, float]
) -> None:
    patches = rows * columns
    if patches * group < 2:
        return
    picked = pick_patches(2 * group, (rows, columns), ratio, seeded(seed))
    drawn = draw_corruption(picked, patches, seeded(seed + 1), split, group)
    for start in range(0, 2 * group, group):
        images = range(group)
        own = [[image * patches + p for p in drawn.picked[start + image].tolist()] for image in images]
        kinds = drawn.kinds[start : start + group].tolist()
        hidden = {own[i][j] for i in images for j, kind in enumerate(kinds[i]) if kind == MASK}
        for i, j in itertools.product(images, range(picked.shape[1])):
            if kinds[i][j] != RANDOM:
                continue
            source = int(drawn.other[start + i, j])
            allowed = set(range(group * patches)) - {own[i][j]}
            assert source in (allowed - hidden or allowed)


def test_two_patches_both_random_take_each_other() -> None:
    drawn = draw_corruption(torch.tensor([[0, 1]]), 2, seeded(0), (0.0, 1.0, 0.0))
    assert drawn.other.tolist() == [[1, 0]]


@pytest.mark.parametrize("group", [1, 2])
def test_replacements_come_equally_often_from_every_allowed_patch(group: int) -> None:
    patches, picked = 5, torch.tensor([[0, 2, 3]])
    drawn = draw_corruption(picked.expand(40_000 * group, 3), patches, seeded(0), (0.5, 0.5, 0.0), group)
    own = (picked + patches * torch.arange(group)[:, None]).flatten().tolist()
    kinds, other = drawn.kinds.view(-1, group * 3), drawn.other.view(-1, group * 3)
    code = (kinds * 2 ** torch.arange(group * 3)).sum(dim=1)  # which of them are masked
    for pattern in code.unique().tolist():
        rows = code == pattern
        row_kinds = kinds[rows][0].tolist()
        hidden = {p for p, kind in zip(own, row_kinds, strict=True) if kind == MASK}
        for j in (j for j, kind in enumerate(row_kinds) if kind == RANDOM):
            allowed = set(range(group * patches)) - hidden - {own[j]}
            counts = other[rows, j].bincount(minlength=group * patches).tolist()
            assert all(within(counts[p], sum(counts), 1 / len(allowed)) for p in allowed), (pattern, counts)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no other patch to take; set objective\.split to 0\.9 0 0\.1"):
        draw_corruption(torch.tensor([[0]]), 1, seeded(0))
    assert draw_corruption(torch.tensor([[0]]), 1, seeded(0), (0.9, 0.0, 0.1)).kinds.shape == (1, 1)
    with pytest.raises(ValueError, match="batch of 3 images is not a multiple of the group of 2"):
        draw_corruption(pick_patches(3, (2, 2), 0.5, seeded(0)), 4, seeded(0), group=2)
    for start, stop in ((1, 4), (0, 3)):
        with pytest.raises(ValueError, match=f"rows {start}:{stop} cut through a group of 2"):
            sample(2)[1].rows(start, stop)


def sample(group: int, seed: int = 0, batch: int = 6) -> tuple[Tensor, Corruption, Tensor]:
    """Tokens of a 3x4 grid, a corruption with all three kinds, and a mask token."""
    picked = pick_patches(batch, (3, 4), 0.5, seeded(seed))
    drawn = draw_corruption(picked, 12, seeded(seed + 1), (0.4, 0.4, 0.2), group)
    return torch.randn(batch, 12, 5, generator=seeded(seed + 2)), drawn, torch.randn(5, generator=seeded(seed + 3))


def test_corrupt_by_hand() -> None:
    tokens = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    drawn = Corruption(torch.tensor([[0, 2, 3]]), torch.tensor([[MASK, RANDOM, UNCHANGED]]), torch.tensor([[3, 1, 0]]))
    assert corrupt(tokens, drawn, torch.tensor([9.0])).flatten().tolist() == [9, 2, 2, 4]


@pytest.mark.parametrize("group", [1, 2, 3])
def test_corrupt_equals_a_loop_for_the_whole_batch_and_for_its_rows(group: int) -> None:
    tokens, drawn, mask = sample(group)
    expected, before = tokens.clone(), tokens.clone()
    for image, j in itertools.product(range(6), range(6)):
        at, kind, source = (int(x[image, j]) for x in drawn[:3])
        if kind == MASK:
            expected[image, at] = mask
        elif kind == RANDOM:
            expected[image, at] = tokens[image // group * group + source // 12, source % 12]
    assert torch.equal(corrupt(tokens, drawn, mask), expected)
    assert torch.equal(tokens, before)
    assert corrupt(tokens.bfloat16(), drawn, mask).dtype == torch.bfloat16
    for start in range(0, 6, group):
        rows = corrupt(tokens[start : start + group], drawn.rows(start, start + group), mask)
        assert torch.equal(rows, expected[start : start + group])


@pytest.mark.parametrize("group", [1, 3])
def test_every_patch_gets_the_gradient_of_all_copies_of_it_and_mask_of_all_masked(group: int) -> None:
    tokens, drawn, mask = sample(group)
    tokens.requires_grad_()
    mask.requires_grad_()
    towards = torch.randn(tokens.shape, generator=seeded(9))
    (corrupt(tokens, drawn, mask) * towards).sum().backward()
    expected = towards.clone()
    for image, j in itertools.product(range(6), range(6)):
        at, kind, source = (int(x[image, j]) for x in drawn[:3])
        if kind != UNCHANGED:
            expected[image, at] -= towards[image, at]
        if kind == RANDOM:
            expected[image // group * group + source // 12, source % 12] += towards[image, at]
    torch.testing.assert_close(tokens.grad, expected, rtol=0, atol=1e-5)
    masked = torch.zeros(6, 12).scatter(1, drawn.picked, (drawn.kinds == MASK).float())
    torch.testing.assert_close(mask.grad, torch.einsum("bnd,bn->d", towards, masked), rtol=0, atol=1e-5)


CONFIG = ModelConfig("vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), depth=2, embed_dim=48, num_heads=3)


def pixel_gradients(group: int, seed: int) -> tuple[Corruption, Tensor]:
    """For each corrupted patch (image, j): how its prediction depends on the pixels of each patch (image', patch)."""
    torch.manual_seed(seed)
    model: MaskedPatchPrediction = MaskedPatchPrediction(
        build_encoder(CONFIG), ColourTarget((8, 8), 3), Normalise((0.5,), (0.5,), 3)
    ).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    picked = pick_patches(4, (4, 4), 0.5, seeded(seed))
    drawn = draw_corruption(picked, 16, seeded(seed + 1), group=group)
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    output = model.predict(pixels, drawn)
    towards = torch.randn(output.shape[-1], dtype=torch.float64)
    rows = []
    for image, j in itertools.product(range(4), range(8)):
        (gradient,) = torch.autograd.grad(output[image, j] @ towards, pixels, retain_graph=True)
        rows.append(gradient.abs().view(4, 3, 4, 8, 4, 8).amax(dim=(1, 3, 5)).flatten(1))
    return drawn, torch.stack(rows).view(4, 8, 4, 16)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_masked_patchs_own_pixels_never_reach_its_prediction(seed: int, group: int) -> None:
    drawn, gradients = pixel_gradients(group, seed)
    own = torch.stack([gradients[i, j, i, drawn.picked[i, j]] for i in range(4) for j in range(8)]).view(4, 8)
    masked = drawn.kinds == MASK
    assert masked.any()
    assert (own[masked] == 0).all()
    # The control: what is left unchanged does reach its own prediction.
    assert (own[drawn.kinds == UNCHANGED] > 0).all()


@pytest.mark.parametrize("group", [1, 4])
def test_every_uncorrupted_patch_of_the_image_reaches_every_prediction(group: int) -> None:
    drawn, gradients = pixel_gradients(group, 0)
    for image in range(4):
        visible = sorted(set(range(16)) - set(drawn.picked[image].tolist()))
        assert (gradients[image, :, image, visible] > 0).all()
