"""A light decoder behind the encoder, of pretraining alone: what is saved for later use is the encoder without it."""

import copy

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
from jaxtyping import Float, Int
from timm.layers.drop import DropPath
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from mpp.model.block import run_blocks
from mpp.model.encoder import Encoder


class Decoder(nn.Module):
    """Blocks of the encoder's kind, and a LayerNorm of their own (after MAE, He et al., 2021, section 3).

    As wide as the encoder, and without position embeddings of its own: those of the encoder come with the tokens.

    With [mask] embeddings that enter here and no earlier, the encoder is spared everything that is about patches which
    nobody sees. Weights are drawn as timm draws those of a ViT, from torch's global generator, on the CPU.

    Args:
        encoder: a new one, whose last blocks are what these are like, but for stochastic depth, which they have not.
        depth: how many, from 1 to the encoder's own number.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, encoder: Encoder, depth: int) -> None:
        super().__init__()
        if not 1 <= depth <= len(encoder.vit.blocks):
            raise ValueError(f"a decoder takes 1 to {len(encoder.vit.blocks)} blocks, got {depth}")
        device = encoder.vit.norm.weight.device
        place = device if device.type == "meta" else "cpu"
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in encoder.vit.blocks[-depth:]).to(place)
        self.norm = copy.deepcopy(encoder.vit.norm).to(place)
        for module in self.blocks.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.blocks.apply(init_weights_vit_timm)
        self.to(device)
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.checkpointing = encoder.vit.grad_checkpointing

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], at: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "batch k dim"]:
        """The tokens of the patches `at` these places, from all of the encoder's (`Encoder.encode` with `every`)."""
        return self.norm(run_blocks(list(self.blocks), tokens, at + self.num_prefix_tokens, self.checkpointing))
