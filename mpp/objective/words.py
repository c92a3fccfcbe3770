"""Visual words: how much the small windows of a patch resemble each of some typical ones, learnt from the images.

images -> windows of about 6 x 6 pixels -> less their mean, over their deviation -> whitened
       -> how much nearer than the others each word is -> mean over the windows of a patch
images -> mean colour of a patch, which the windows have lost

Source: A. Coates, H. Lee, A. Y. Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning", AISTATS
2011, sections 3.1 to 3.3 (K-means, "triangle").
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 256
_COLOURS = 48  # as how many words a patch's mean colour counts, all channels together
_SIDE = 6  # pixels of a window, the best of their section 4.5
_MOST_WINDOWS = 100_000  # that words are learnt from, about
_ROUNDS = 15
_FLAT = 10 / 255**2  # added to a window's variance, and below to the eigenvalues: theirs, section 3.1.1
_WHITE = 0.1
LEAST_SPREAD = 0.01
"""By which less variation is divided: a channel that is empty in the images that teach may be there in others."""


class VisualWords(nn.Module):
    """The words, and what they are compared with. Buffers, so a checkpoint has them.

    Patches of 12 pixels or more a side are shrunk, to 6 or more, where a whole number of pixels makes one. They have a
    window for about `every` pixels of a side, which reaches over the edge. Beside the words stands the mean of each
    channel over the patch.
    """

    middle: Tensor
    whitening: Tensor
    words: Tensor
    usual: Tensor
    spread: Tensor

    def __init__(self, patch: tuple[int, int], channels: int, every: int = 4) -> None:
        super().__init__()
        self.shrink = tuple(_shrink(side) for side in patch)
        """Pixels that are averaged to one, down and across."""
        inside = [side // by for side, by in zip(patch, self.shrink, strict=True)]
        self.windows = tuple(_windows(side, every) for side in inside)
        """Windows of a patch, down and across."""
        self.stride = tuple(side // number for side, number in zip(inside, self.windows, strict=True))
        self.side = tuple(max(_SIDE, stride) for stride in self.stride)
        values = channels * self.side[0] * self.side[1]
        self.patch = patch
        self.outputs = WORDS + channels
        """Values of a patch."""
        self.register_buffer("middle", torch.zeros(values))
        self.register_buffer("whitening", torch.zeros(values, values))
        self.register_buffer("words", torch.zeros(WORDS, values))
        self.register_buffer("usual", torch.zeros(self.outputs))
        self.register_buffer("spread", torch.ones(self.outputs))

    @torch.no_grad()
    def learn(self, images: UInt8[Tensor, "batch channels height width"]) -> None:
        """Sets whitening and words by these images, of large ones by the first; on the CPU, always in the same way."""
        height, width = self._cells(images)
        images = images[: -(-_MOST_WINDOWS // (height * width))]  # or hundreds of large images would fill the memory
        windows = self._cut(images.cpu()).flatten(0, 1)
        middle, variances, axes = principal_axes(windows)
        whitening = axes * (variances + _WHITE).rsqrt() @ axes.T
        words = k_means((windows - middle) @ whitening, WORDS, torch.Generator().manual_seed(0))
        for name, found in (("middle", middle), ("whitening", whitening), ("words", words)):
            getattr(self, name).copy_(found)
        self.usual.zero_()
        self.spread.fill_(1)
        found = self.of(images.to(self.usual.device)).flatten(0, 1)
        self.usual.copy_(found.mean(dim=0))
        self.spread.copy_(found.std(dim=0, unbiased=False).clamp(min=LEAST_SPREAD))
        self.spread[WORDS:] *= ((self.outputs - WORDS) / _COLOURS) ** 0.5

    @torch.no_grad()
    def of(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches outputs"]:
        """What is predicted of every patch: its words, then its mean colour.

        Over the patches that the words were learnt from the mean is 0 and the deviation 1, of the colours larger, so
        that they count as 48 words together.
        """
        with torch.autocast(images.device.type, enabled=False):
            windows = (self._cut(images) - self.middle) @ self.whitening
            near = nearness(windows, self.words)
            grid = near.transpose(1, 2).unflatten(2, self._cells(images))
            pooled = F.avg_pool2d(grid, self.windows).flatten(2).transpose(1, 2)
            colour = F.avg_pool2d(images.float() / 255, self.patch).flatten(2).transpose(1, 2)
            return (torch.cat([pooled, colour], dim=-1) - self.usual) / self.spread

    def _cells(self, images: Tensor) -> tuple[int, int]:
        """Windows of an image, down and across."""
        height, width = images.shape[-2:]
        return height // self.shrink[0] // self.stride[0], width // self.shrink[1] // self.stride[1]

    def _cut(self, images: Tensor) -> Float[Tensor, "batch windows values"]:
        """Windows of an image, rows first, each less its mean and over its deviation; those at an edge repeat it."""
        pixels = F.avg_pool2d(images.float() / 255, self.shrink)
        over = self.side[0] - self.stride[0], self.side[1] - self.stride[1]
        edges = over[1] // 2, over[1] - over[1] // 2, over[0] // 2, over[0] - over[0] // 2  # left, right, up, down
        padded = F.pad(pixels, edges, mode="replicate")
        windows = F.unfold(padded, self.side, stride=self.stride).transpose(1, 2)
        windows = windows - windows.mean(dim=-1, keepdim=True)
        return windows / (windows.square().mean(dim=-1, keepdim=True) + _FLAT).sqrt()


def _shrink(side: int) -> int:
    """The most pixels that are averaged to one such that a patch keeps 6 a side, or all that it has."""
    return max((by for by in range(1, side + 1) if side % by == 0 and side // by >= _SIDE), default=1)


def _windows(side: int, every: int) -> int:
    """About one for so many pixels of a patch's side, which they share evenly."""
    return max(number for number in range(1, max(side // every, 1) + 1) if side % number == 0)


def nearness(points: Float[Tensor, "*n values"], words: Float[Tensor, "words values"]) -> Float[Tensor, "*n words"]:
    """How much nearer than the mean of all words each word is to a point, 0 where it is farther (their "triangle")."""
    squared = points.square().sum(dim=-1, keepdim=True) + words.square().sum(dim=1)
    distance = (squared - 2 * points @ words.T).clamp_(min=0).sqrt_()
    return (distance.mean(dim=-1, keepdim=True) - distance).clamp_(min=0)


def principal_axes(
    points: Float[Tensor, "n values"],
) -> tuple[Float[Tensor, " values"], Float[Tensor, " values"], Float[Tensor, "values values"]]:
    """Mean of the points, variances along their principal axes, the least first, and these axes, a column each."""
    middle = points.mean(dim=0)
    points = points - middle
    variances, axes = torch.linalg.eigh(points.T @ points / len(points))
    return middle, variances.clamp(min=0), axes


def k_means(
    points: Float[Tensor, "n values"], number: int, generator: torch.Generator
) -> Float[Tensor, "number values"]:
    """Lloyd's algorithm, from points drawn at random; a centre that has lost all of its points goes back to its own."""
    drawn = points[torch.randperm(len(points), generator=generator)[torch.arange(number) % len(points)]]
    centres = drawn
    for _ in range(_ROUNDS):
        nearest = [(centres.square().sum(dim=1) - 2 * part @ centres.T).argmin(dim=1) for part in points.split(2**14)]
        own = torch.cat(nearest)
        count = own.bincount(minlength=number)[:, None]
        total = torch.zeros_like(centres).index_add_(0, own, points)
        centres = torch.where(count > 0, total / count.clamp(min=1), drawn)
    return centres
