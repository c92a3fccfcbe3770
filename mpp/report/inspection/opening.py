"""Any weights of a ViT, opened so that it can be looked at.

inspected = inspect(open_weights(spec), device)     any timm VisionTransformer, hybrids included
twin      = inspect(untrained(weights), device)     the same architecture, randomly initialised, to stand beside it
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mpp.data.transform import normalise
from mpp.errors import UserError
from mpp.model.encoder import Encoder
from mpp.system.process import global_draws
from mpp.weights.base import Weights, build


@dataclass(frozen=True, eq=False)
class Inspected:
    """An encoder in evaluation mode, in float32, with what its input and its output mean.

    Attributes:
        encoder: around timm's model; its `image_hw` is the size of the images to give.
        weights: what it was built of.
        pool: what its representation of an image is: the class token where it is pooled by it, else the mean of the
            patch tokens.
        device: where it is.
    """

    encoder: Encoder
    weights: Weights
    pool: Literal["mean", "token"]
    device: torch.device

    def pixels(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images of 0 to 255 on any device as the encoder takes them: on its device, normalised."""
        return normalise(images.to(self.device), self.weights.mean, self.weights.std)

    @torch.inference_mode()
    def tokens(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches dim"]:
        """Patch tokens after the last norm, rows first.

        Of models that have their last norm after the pooling, it is applied to each token.
        """
        tokens = self.encoder(self.pixels(images))[:, self.encoder.num_prefix_tokens :]
        return self.encoder.vit.fc_norm(tokens)

    @torch.inference_mode()
    def features(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """One row an image, pooled by `pool` and normalised where the model does so."""
        tokens = self.encoder(self.pixels(images))
        pooled = (
            tokens[:, 0].clone() if self.pool == "token" else tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)
        )
        return self.encoder.vit.fc_norm(pooled)


def inspect(
    weights: Weights, device: torch.device | str, image_hw: tuple[int, int] | None = None, seed: int = 0
) -> Inspected:
    """The encoder of these weights, its head dropped, to be looked at.

    Args:
        weights: of a ViT; where they have no state, the encoder is freshly initialised.
        device: where to.
        image_hw: another input size; position embeddings are resampled. Where the patches do not tile the size (27 of
            14 pixels on 384), the encoder is made for the size that they do tile, with the same number of patches.
        seed: of fresh weights. torch's global generator is left as it is.

    Raises:
        UserError: a model that is not a VisionTransformer; what `build` refuses.
    """
    device = torch.device(device)
    vit = _build(weights, device, image_hw or weights.image_hw, seed)
    embed: Any = vit.patch_embed
    if not hasattr(embed, "backbone"):  # the stem of a hybrid pads
        tiled = embed.grid_size[0] * embed.patch_size[0], embed.grid_size[1] * embed.patch_size[1]
        if tiled != tuple(embed.img_size):
            vit = _build(weights, device, tiled, seed)
    return Inspected(Encoder(vit).eval(), weights, "token" if vit.global_pool == "token" else "mean", device)


def untrained(weights: Weights) -> Weights:
    """The same architecture without its weights and its head: what `inspect` initialises afresh."""
    return replace(weights, state=None, classes=None, representation=None, origin=f"random:{weights.origin}")


def _build(weights: Weights, device: torch.device, image_hw: tuple[int, int], seed: int) -> VisionTransformer:
    with global_draws(seed):
        vit = build(weights, classes=(), image_hw=image_hw, device=device)
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"{weights.origin or weights.name} is timm's {type(vit).__name__}, and only its VisionTransformer can be "
            "looked at inside; take one, such as vit_base_patch16_224"
        )
    return vit
