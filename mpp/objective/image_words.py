"""Words of whole images: how much an image resembles each of some typical ones in its words, colours and their places.

words and colours of the patches, a window every 2 pixels -> their means over each quarter of the image
    -> principal components, whitened, of every training image once, before the training
    -> how much nearer than the others each typical image is

It is what `mpp.objective.words` does with windows, once more with images. All crops of an image are asked for the same
words, those of the whole.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mpp.objective.words import LEAST_SPREAD, VisualWords, k_means, nearness, principal_axes

IMAGE_WORDS = 512
COMPONENTS = 128
_EVERY = 2  # pixels from one window to the next
_AT_ONCE = 16  # images
_WHITE = 1.0  # of the mean variance of the components, added to each


class ImageComponents(nn.Module):
    """What an image is described by, learnt from the training images. Buffers, so a checkpoint has them: the typical
    images below mean nothing to other components.

    Args:
        grid: rows and columns of patches.
        flips: whether the training turns images upside down, and left to right; halves that it exchanges count as one.
    """

    middle: Tensor
    whitening: Tensor

    def __init__(
        self, grid: tuple[int, int], patch: tuple[int, int], channels: int, flips: tuple[bool, bool] = (False, False)
    ) -> None:
        super().__init__()
        self.grid, self.flips = grid, flips
        self.words = VisualWords(patch, channels, _EVERY)
        values = 4 * self.words.outputs
        self.register_buffer("middle", torch.zeros(values))
        self.register_buffer("whitening", torch.zeros(values, COMPONENTS))

    @torch.no_grad()
    def learn(self, quarters: Float[Tensor, "images values"]) -> None:
        """Sets the principal components by the `quarters` of images; on the CPU, always in the same way."""
        middle, variances, axes = principal_axes(quarters)
        variances, axes = variances[-COMPONENTS:], axes[:, -COMPONENTS:]
        self.middle.copy_(middle)
        self.whitening.copy_(axes * (variances + _WHITE * variances.mean() + 1e-6).rsqrt())

    @torch.no_grad()
    def quarters(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch values"]:
        """Means of words and colours over each quarter; of an odd number of rows or columns, both halves have the
        middle one."""
        parts = [self.words.of(part) for part in images.split(_AT_ONCE)]  # of all at once, windows fill the memory
        found = F.adaptive_avg_pool2d(torch.cat(parts).transpose(1, 2).unflatten(2, self.grid), 2)
        for axis, flip in zip((2, 3), self.flips, strict=True):
            found = (found + found.flip(axis)) / 2 if flip else found
        return found.flatten(1)

    @torch.no_grad()
    def of(self, quarters: Float[Tensor, "batch values"]) -> Float[Tensor, "batch components"]:
        """The components of images of which these are the `quarters`."""
        return (quarters - self.middle) @ self.whitening


class ImageWords(nn.Module):
    """The typical images. Buffers, so a checkpoint has them."""

    words: Tensor
    usual: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", torch.zeros(IMAGE_WORDS, COMPONENTS))
        self.register_buffer("usual", torch.zeros(IMAGE_WORDS))
        self.register_buffer("spread", torch.ones(IMAGE_WORDS))

    @torch.no_grad()
    def learn(self, components: Float[Tensor, "images components"]) -> None:
        """Sets the typical images by the components of images; on the CPU, always in the same way.

        There is one for eight images, at most 512; where they are fewer, they are repeated.
        """
        number = min(IMAGE_WORDS, max(len(components) // 8, 1))
        typical = k_means(components, number, torch.Generator().manual_seed(0))[torch.arange(IMAGE_WORDS) % number]
        near = nearness(components, typical)
        learnt = typical, near.mean(dim=0), near.std(dim=0, unbiased=False).clamp(min=LEAST_SPREAD)
        for buffer, value in zip(self.buffers(), learnt, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def of(self, components: Float[Tensor, "batch components"]) -> Float[Tensor, "batch image_words"]:
        """What is predicted of every image: mean 0 and deviation 1 over the images that were learnt from."""
        with torch.autocast(components.device.type, enabled=False):
            return (nearness(components.float(), self.words) - self.usual) / self.spread


@dataclass(frozen=True)
class KnownComponents:
    """The components of the images of a source, as far as they are known; on the device that trains."""

    indices: Int64[Tensor, " known"]
    """Which images of the source they are of, ascending."""
    rows: Float16[Tensor, "known components"]

    def to(self, device: torch.device) -> "KnownComponents":
        """The same on a device."""
        return KnownComponents(self.indices.to(device), self.rows.to(device))

    def of(self, index: Int64[Tensor, " batch"]) -> Float16[Tensor, "batch components"]:
        """A row for each of these images, NaN where it is not known."""
        index = index.to(self.rows.device, non_blocking=True).contiguous()
        found = torch.searchsorted(self.indices, index).clamp_(max=len(self.indices) - 1)
        return self.rows[found].masked_fill((self.indices[found] != index)[:, None], torch.nan)
