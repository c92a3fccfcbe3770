"""Words of whole images: how much an image resembles each of some typical ones in its words, colours and their places.

words and colours of the patches -> their means over each quarter of the image -> principal components, whitened
                     -> how much nearer than the others each typical image is

It is what `mpp.objective.words` does with windows, once more with images.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mpp.objective.words import k_means, nearness

IMAGE_WORDS = 512
MOST_IMAGES = 4096
"""Of so many, or all that there are, the typical ones are made."""
_COMPONENTS = 32
_WHITE = 0.1  # of the mean variance of the components, added to each


class ImageWords(nn.Module):
    """The typical images, and what others are compared with them by. Buffers, so a checkpoint has them."""

    middle: Tensor
    whitening: Tensor
    words: Tensor
    usual: Tensor
    spread: Tensor

    def __init__(self, grid: tuple[int, int], values: int) -> None:
        """Of images with so many rows and columns of patches, and so many values of a patch (`VisualWords.outputs`)."""
        super().__init__()
        self.grid = grid
        self.register_buffer("middle", torch.zeros(4 * values))
        self.register_buffer("whitening", torch.zeros(4 * values, _COMPONENTS))
        self.register_buffer("words", torch.zeros(IMAGE_WORDS, _COMPONENTS))
        self.register_buffer("usual", torch.zeros(IMAGE_WORDS))
        self.register_buffer("spread", torch.ones(IMAGE_WORDS))

    @torch.no_grad()
    def learn(self, words: Iterable[Float[Tensor, "_ patches values"]], different: int) -> None:
        """Sets the typical images by what `VisualWords` makes of images; on the CPU, always in the same way.

        Args:
            words: of the images, in parts.
            different: how many different images these are crops of. Each eighth makes a typical one; where these are
                fewer than 512, they are repeated.
        """
        images = torch.cat([self._quarters(some).cpu() for some in words])
        middle = images.mean(dim=0)
        images = images - middle
        values, vectors = torch.linalg.eigh(images.T @ images / len(images))
        values, vectors = values[-_COMPONENTS:].clamp(min=0), vectors[:, -_COMPONENTS:]
        whitening = vectors * (values + _WHITE * values.mean() + 1e-12).rsqrt()
        images = images @ whitening
        number = min(IMAGE_WORDS, max(different * IMAGE_WORDS // MOST_IMAGES, 1))
        typical = k_means(images, number, torch.Generator().manual_seed(0))[torch.arange(IMAGE_WORDS) % number]
        near = nearness(images, typical)
        learnt = middle, whitening, typical, near.mean(dim=0), near.std(dim=0, unbiased=False) + 1e-6
        for buffer, value in zip(self.buffers(), learnt, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def of(self, words: Float[Tensor, "batch patches values"]) -> Float[Tensor, "batch image_words"]:
        """What is predicted of every image: mean 0 and deviation 1 over the images that were learnt from."""
        with torch.autocast(words.device.type, enabled=False):
            near = nearness((self._quarters(words) - self.middle) @ self.whitening, self.words)
            return (near - self.usual) / self.spread

    def _quarters(self, words: Tensor) -> Float[Tensor, "batch values"]:
        """Means over each quarter, rows first; of an odd number of rows or columns, both halves have the middle one."""
        return F.adaptive_avg_pool2d(words.transpose(1, 2).unflatten(2, self.grid), 2).flatten(1)
