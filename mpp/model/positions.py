"""Position embeddings that know the grid: the 2-D-aware forms of the paper's ablation (appendix D.4, table 8)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpp.errors import UserError


def sincos2d(height: int, width: int, dim: int, temperature: float = 10_000.0) -> Float[Tensor, "n dim"]:
    """Fixed sine-cosine embedding of a (height, width) grid, rows first: [sin x, cos x, sin y, cos y].

    As in big_vision's `posemb_sincos_2d`, computed in float64 and returned as float32.
    """
    rows, columns, parts = (torch.arange(number, dtype=torch.float64) for number in (height, width, dim // 4))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    omega = temperature ** -(parts / max(dim // 4 - 1, 1))
    angle_x, angle_y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    return torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1).float()


def resample_table(
    table: Float[Tensor, "1 n dim"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 m dim"]:
    """Position embeddings of an `old` grid of (rows, columns) for a `new` one, both rows first.

    Bilinear with aligned corners, in float64: what the paper's code computes by `scipy.ndimage.zoom(order=1)`, without
    the last row and column of zeros that it returns at some sizes.
    """
    grid = table.double().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=new, mode="bilinear", align_corners=True)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


class Learned2d(nn.Module):
    """Learned column and row embeddings of half the width each, concatenated (the paper's "2-D pos. emb.")."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.empty(width, dim // 2))
        self.y = nn.Parameter(torch.empty(height, dim // 2))
        for table in (self.x, self.y):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self) -> Float[Tensor, "n dim"]:
        """The table of all positions, rows first."""
        height, width = len(self.y), len(self.x)
        x = self.x.expand(height, width, -1)
        y = self.y[:, None].expand(height, width, -1)
        return torch.cat([x, y], dim=-1).flatten(0, 1)


class SinCos2d(nn.Module):
    """`sincos2d` as a module without parameters; its table is not saved."""

    table: Tensor

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", sincos2d(height, width, dim), persistent=False)

    def forward(self) -> Float[Tensor, "n dim"]:
        return self.table


def build_position(kind: str, grid: tuple[int, int], dim: int) -> nn.Module | None:
    """The 2-D-aware embedding named `kind`; None for those that timm's encoder has itself (learned, none).

    Raises UserError for a token width that the form cannot split.
    """
    if kind in ("learned", "none"):
        return None
    parts, form = {"2d": (2, Learned2d), "sincos2d": (4, SinCos2d)}[kind]
    if dim % parts:
        raise UserError(f"model.pos_embed {kind} needs a token width divisible by {parts}, got {dim}")
    return form(*grid, dim)
