"""Position embeddings against their formulas, written as loops."""

import math

import numpy as np
import pytest
import torch

from mpp.errors import UserError
from mpp.model.posembed import Learned2d, build_position, sincos2d


def by_loops(height: int, width: int, dim: int) -> np.ndarray:
    """big_vision's posemb_sincos_2d: [sin x, cos x, sin y, cos y], rows first."""
    quarter = dim // 4
    table = np.zeros((height * width, dim))
    for row in range(height):
        for column in range(width):
            for i in range(quarter):
                omega = 1 / 10_000 ** (i / (quarter - 1))
                for part, angle in enumerate((column * omega, row * omega)):
                    table[row * width + column, 2 * part * quarter + i] = math.sin(angle)
                    table[row * width + column, (2 * part + 1) * quarter + i] = math.cos(angle)
    return table


@pytest.mark.parametrize(("height", "width", "dim"), [(4, 4, 16), (3, 5, 8), (5, 2, 48), (14, 14, 192)])
def test_sincos2d_is_its_formula(height: int, width: int, dim: int) -> None:
    np.testing.assert_allclose(sincos2d(height, width, dim).numpy(), by_loops(height, width, dim), atol=1e-7)


def test_sincos2d_of_the_smallest_width_is_finite() -> None:
    expected = [[math.sin(x), math.cos(x), math.sin(y), math.cos(y)] for y in range(2) for x in range(3)]
    np.testing.assert_allclose(sincos2d(2, 3, 4).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 7)])
def test_learned2d_is_column_half_beside_row_half(height: int, width: int) -> None:
    position = Learned2d(height, width, 10)
    expected = [torch.cat([position.x[c], position.y[r]]) for r in range(height) for c in range(width)]
    torch.testing.assert_close(position(), torch.stack(expected), rtol=0, atol=0)


def test_learned2d_learns_both_halves() -> None:
    position = Learned2d(3, 5, 8)
    position().sum().backward()
    torch.testing.assert_close(position.x.grad, torch.full((5, 4), 3.0))
    torch.testing.assert_close(position.y.grad, torch.full((3, 4), 5.0))


def test_sincos2d_learns_and_saves_nothing() -> None:
    position = build_position("sincos2d", (3, 5), 8)
    assert position is not None
    assert not list(position.parameters())
    assert not position.state_dict()


@pytest.mark.parametrize("kind", ["2d", "sincos2d"])
def test_the_table_has_a_row_for_each_patch(kind: str) -> None:
    position = build_position(kind, (3, 5), 8)
    assert position is not None
    assert position().shape == (15, 8)


@pytest.mark.parametrize("kind", ["learned", "none"])
def test_timms_own_forms_need_no_module(kind: str) -> None:
    assert build_position(kind, (3, 5), 8) is None


@pytest.mark.parametrize(("kind", "dim", "parts"), [("2d", 7, 2), ("sincos2d", 6, 4)])
def test_a_width_that_cannot_be_split_is_refused(kind: str, dim: int, parts: int) -> None:
    with pytest.raises(UserError, match=f"{kind} needs a token width divisible by {parts}, got {dim}"):
        build_position(kind, (3, 5), dim)
