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


def test_k_of_the_papers_ratios() -> None:
    assert [num_picked(*of) for of in ((0.5, 196), (0.15, 196), (1.0, 9), (0.01, 9))] == [98, 29, 9, 1]


@unhurried
@given(grids, ratios, seeds, styles)
def test_exactly_k_patches_of_every_image_are_picked_ascending_and_distinct(
    grid: Grid, ratio: float, seed: int, style: str
) -> None:
    picked = pick_patches(3, grid, ratio, seeded(seed), style)
    assert (picked.shape, picked.dtype) == ((3, num_picked(ratio, grid[0] * grid[1])), torch.int64)
    assert (picked.diff(dim=1) > 0).all()
    assert picked.min() >= 0
    assert picked.max() < grid[0] * grid[1]
    assert torch.equal(picked, pick_patches(3, grid, ratio, seeded(seed), style))


def test_uniform_picking_takes_every_patch_and_every_pair_equally_often() -> None:
    trials = 20_000
    picked = pick_patches(trials, (3, 4), 5 / 12, seeded(0))
    taken = torch.zeros(trials, 12).scatter(1, picked, 1.0)
    together = taken.T @ taken
    assert all(within(count, trials, 5 / 12) for count in together.diagonal().tolist()), together
    pairs = together[torch.triu(torch.ones(12, 12), 1) > 0].tolist()
    assert all(within(count, trials, 5 * 4 / (12 * 11)) for count in pairs), together


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
def test_kinds_have_the_probabilities_of_the_split_independently(split: tuple[float, float, float], group: int) -> None:
    kinds = draw_corruption(torch.tensor([[0, 1]]).expand(40_000, 2), 9, seeded(0), split, group).kinds
    for a, b in itertools.product((MASK, RANDOM, UNCHANGED), repeat=2):
        assert within(int(((kinds[:, 0] == a) & (kinds[:, 1] == b)).sum()), 40_000, split[a] * split[b])


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
    own = (picked.view(2, group, -1) + patches * torch.arange(group)[:, None]).flatten(1).tolist()
    kinds_of, others_of = (x.view(2, -1).tolist() for x in (drawn.kinds, drawn.other))
    for mine, kinds, others in zip(own, kinds_of, others_of, strict=True):
        hidden = {p for p, kind in zip(mine, kinds, strict=True) if kind == MASK}
        for p, kind, source in zip(mine, kinds, others, strict=True):
            allowed = set(range(group * patches)) - {p}
            assert kind != RANDOM or source in (allowed - hidden or allowed)


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


CONFIG = ModelConfig("vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), depth=2, embed_dim=48, num_heads=3)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_a_masked_patchs_own_pixels_never_reach_its_prediction_but_all_visible_ones_do(seed: int, group: int) -> None:
    torch.manual_seed(seed)
    target, normalise = ColourTarget((8, 8), 3), Normalise((0.5,), (0.5,), 3)
    model = MaskedPatchPrediction(build_encoder(CONFIG), target, normalise).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    drawn = draw_corruption(pick_patches(4, (4, 4), 0.5, seeded(seed)), 16, seeded(seed + 1), group=group)
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    output = model.predict(pixels, drawn)
    scalars = output @ torch.randn(output.shape[-1], dtype=torch.float64)
    assert (drawn.kinds == MASK).any()
    for image, j in itertools.product(range(4), range(8)):
        (gradient,) = torch.autograd.grad(scalars[image, j], pixels, retain_graph=True)
        reached = gradient[image].view(3, 4, 8, 4, 8).abs().amax(dim=(0, 2, 4)).flatten() > 0  # of each patch
        own, kind = drawn.picked[image, j], drawn.kinds[image, j]
        assert kind == RANDOM or reached[own] == (kind == UNCHANGED)
        assert reached[sorted(set(range(16)) - set(drawn.picked[image].tolist()))].all()
