"""timm's block, which can also compute some of its tokens only, and a sequence of blocks."""

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpp.model.attention import Indices, take


class Block(TimmBlock):
    """timm's pre-norm block (its parameters and their names)."""

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        at: Indices | None = None,
    ) -> Float[Tensor, "B K D"]:
        """The block's output for all tokens, or for those `at` these indices only.

        Keys and values are of all tokens; everything else in a block reads one token, so the result is the same.
        """
        if at is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, at=at)
        x = take(x, at) + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def run_blocks(
    blocks: Sequence[nn.Module], x: Float[Tensor, "B N D"], at: Indices | None, checkpointing: bool
) -> Float[Tensor, "B K D"]:
    """Runs one or more blocks in order; the last computes the tokens `at` these indices only (None: all).

    `checkpointing` recomputes the blocks in the backward pass.
    """

    def run(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    *first, last = blocks
    for block in first:
        x = run(block, x)
    if at is None:
        return run(last, x)
    return run(last, x, at=at) if isinstance(last, Block) else take(run(last, x), at)
