"""Position embeddings against their formulas, written as loops."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mpp.errors import UserError
from mpp.model.positions import Learned2d, build_position, resample_table, sincos2d


@pytest.mark.parametrize(("height", "width", "dim"), [(4, 4, 16), (3, 5, 8), (5, 2, 48), (14, 14, 192), (2, 3, 4)])
def test_sincos2d_is_its_formula(height: int, width: int, dim: int) -> None:
    """big_vision's posemb_sincos_2d: [sin x, cos x, sin y, cos y], rows first."""
    quarter = dim // 4
    table = np.zeros((height * width, dim))
    for row in range(height):
        for column in range(width):
            for i in range(quarter):
                omega = 1 / 10_000 ** (i / max(quarter - 1, 1))
                for part, angle in enumerate((column * omega, row * omega)):
                    table[row * width + column, 2 * part * quarter + i] = math.sin(angle)
                    table[row * width + column, (2 * part + 1) * quarter + i] = math.cos(angle)
    np.testing.assert_allclose(sincos2d(height, width, dim).numpy(), table, atol=1e-7)
    position = build_position("sincos2d", (height, width), dim)
    assert position is not None
    assert torch.equal(position(), sincos2d(height, width, dim))
    assert not position.state_dict()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 7)])
def test_learned2d_is_column_half_beside_row_half_and_learns_both(height: int, width: int) -> None:
    position = build_position("2d", (height, width), 10)
    assert isinstance(position, Learned2d)
    expected = [torch.cat([position.x[c], position.y[r]]) for r in range(height) for c in range(width)]
    torch.testing.assert_close(position(), torch.stack(expected), rtol=0, atol=0)
    position().sum().backward()
    torch.testing.assert_close(position.x.grad, torch.full((width, 5), float(height)))
    torch.testing.assert_close(position.y.grad, torch.full((height, 5), float(width)))


def test_timms_own_forms_need_no_module_and_a_width_that_cannot_be_split_is_refused() -> None:
    assert [build_position(kind, (3, 5), 8) for kind in ("learned", "none")] == [None, None]
    for kind, dim, parts in (("2d", 7, 2), ("sincos2d", 6, 4)):
        with pytest.raises(UserError, match=f"{kind} needs a token width divisible by {parts}, got {dim}"):
            build_position(kind, (3, 5), dim)


CASES = [f"{kind}_{sizes}" for kind in ("cls", "nocls") for sizes in ("4to6", "6to4", "14to24", "7to12")]


@pytest.mark.parametrize("case", CASES)
def test_resampling_is_that_of_the_authors(case: str, shared: Callable[[str], Path]) -> None:
    given = np.load(shared("fixtures/posembed_resize.npz"))
    prefix = 1 if case.startswith("cls") else 0
    old, new = (int(size) for size in case.partition("_")[2].split("to"))
    table = torch.from_numpy(given[f"in/{case}"])[:, prefix:]
    ours = resample_table(table, (old, old), (new, new))
    np.testing.assert_allclose(ours.numpy(), given[f"out/{case}"][:, prefix:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"), [((3, 5), (7, 2)), ((8, 8), (26, 16)), ((1, 4), (3, 3)), ((4, 4), (1, 1)), ((3, 5), (3, 5))]
)
def test_resampling_is_bilinear_with_aligned_corners(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Along columns, then rows: new corner lies on old corner, and the rest in equal steps between."""
    table = torch.randn(1, old[0] * old[1], 6, generator=torch.Generator().manual_seed(0))
    expected = table[0].double().numpy().reshape(*old, 6)
    for axis in (0, 1):
        at = np.linspace(0, old[axis] - 1, new[axis]) if new[axis] > 1 else np.zeros(1)
        line = np.arange(old[axis])
        expected = np.apply_along_axis(lambda values, at=at, line=line: np.interp(at, line, values), axis, expected)
    np.testing.assert_allclose(resample_table(table, old, new)[0].numpy(), expected.reshape(-1, 6), atol=1e-6)
