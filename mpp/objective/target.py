"""What is predicted for a corrupted patch: its mean colour, its 4x4 downsized colours, or all its pixels.

Colours are quantised to `bits` per channel from raw pixels (0 to 255, after augmentation and before normalisation):
floor(mean / 32) for 3 bits. The three channels make one class, 64 r + 8 g + b of 512. Up to 4096 classes are one
prediction; where more channels or bits would exceed that, every channel is a prediction of its own (2^bits classes).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from mpp.errors import UserError

MOST_CLASSES = 4096
CELLS = 4  # cells a side of the downsized patch of target 2

Images = UInt8[Tensor, "batch channels height width"]


def cell_sums(images: Images, cell: tuple[int, int]) -> Int[Tensor, "batch channels rows columns"]:
    """Exact sums of the pixels of each (height, width) cell."""
    batch, channels, height, width = images.shape
    cells = images.view(batch, channels, height // cell[0], cell[0], width // cell[1], cell[1])
    return cells.sum(dim=(3, 5), dtype=torch.int64)


def quantise(mean: Float[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """Bin 0 to 2^bits - 1 of mean colours on the 0 to 255 scale: floor(mean / 2^(8 - bits))."""
    return (mean / 2 ** (8 - bits)).floor().long().clamp(0, 2**bits - 1)


@dataclass(frozen=True)
class ColourTarget:
    """Targets 1 and 2: quantised mean colours of a patch, whole or in `cells` x `cells`.

    A patch has `predictions` predictions of `classes` classes each; the head gives their product.
    """

    patch: tuple[int, int]
    channels: int
    bits: int = 3
    cells: int = 1
    score_name: ClassVar[str] = "accuracy"

    @property
    def joint(self) -> bool:
        """Whether all channels of a cell make one class."""
        return 2 ** (self.bits * self.channels) <= MOST_CLASSES

    @property
    def classes(self) -> int:
        return 2 ** (self.bits * (self.channels if self.joint else 1))

    @property
    def predictions(self) -> int:
        return self.cells**2 * (1 if self.joint else self.channels)

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return self.predictions * self.classes

    def of(self, images: Images) -> Int[Tensor, "batch patches predictions"]:
        """The classes of every patch, by integer arithmetic, so exact on any device."""
        cell = (self.patch[0] // self.cells, self.patch[1] // self.cells)
        # floor(sum / area / 2^(8 - bits)) in one exact division
        bins = cell_sums(images, cell) // (cell[0] * cell[1] * 2 ** (8 - self.bits))
        return self._classes(bins)

    def of_constant(self, colours: Float[Tensor, "batch k channels"]) -> Int[Tensor, "batch k predictions"]:
        """The classes that a patch of one colour (0 to 255) would have."""
        bins = quantise(colours, self.bits)
        joint = self._join(bins) if self.joint else bins
        return joint.repeat(1, 1, self.cells**2)

    def _classes(self, bins: Int[Tensor, "batch channels rows columns"]) -> Int[Tensor, "batch patches predictions"]:
        batch, channels, rows, columns = bins.shape
        c = self.cells
        bins = bins.view(batch, channels, rows // c, c, columns // c, c).permute(0, 2, 4, 3, 5, 1)
        bins = bins.reshape(batch, (rows // c) * (columns // c), c * c, channels)
        return (self._join(bins) if self.joint else bins).flatten(2)

    def _join(self, bins: Int[Tensor, "... channels"]) -> Int[Tensor, "... 1"]:
        weights = 2 ** (self.bits * torch.arange(self.channels - 1, -1, -1, device=bins.device))
        return (bins * weights).sum(dim=-1, keepdim=True)

    def loss(
        self, output: Float[Tensor, "batch k outputs"], target: Int[Tensor, "batch k predictions"]
    ) -> Float[Tensor, "batch k"]:
        """Cross-entropy per patch in nats, the mean over its predictions."""
        logits = output.float().unflatten(-1, (self.predictions, self.classes))
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        return loss.view(target.shape).mean(dim=-1)

    def score(
        self, output: Float[Tensor, "batch k outputs"], target: Int[Tensor, "batch k predictions"]
    ) -> Float[Tensor, "batch k"]:
        """Accuracy per patch, the share of its predictions that are right."""
        return self.agreement(self._guess(output), target)

    def agreement(
        self, guess: Int[Tensor, "#batch #k predictions"], target: Int[Tensor, "batch k predictions"]
    ) -> Float[Tensor, "batch k"]:
        """Share of equal classes per patch."""
        return (guess == target).float().mean(dim=-1)

    def confidence(self, output: Float[Tensor, "batch k outputs"]) -> Float[Tensor, "batch k"]:
        """Probability given to the most likely class, the mean over a patch's predictions."""
        logits = output.float().unflatten(-1, (self.predictions, self.classes))
        return logits.softmax(dim=-1).amax(dim=-1).mean(dim=-1)

    def colours(self, output: Float[Tensor, "batch k outputs"]) -> UInt8[Tensor, "batch k channels height width"]:
        """The predicted patches as pixels: the centre of the most likely bin in each cell."""
        return self.render(self._guess(output))

    def _guess(self, output: Float[Tensor, "batch k outputs"]) -> Int[Tensor, "batch k predictions"]:
        """The most likely classes."""
        # The first of the largest, as argmax has it, which takes three times as long in bf16 on a CPU.
        return output.unflatten(-1, (self.predictions, self.classes)).max(dim=-1).indices

    def render(self, target: Int[Tensor, "batch k predictions"]) -> UInt8[Tensor, "batch k channels height width"]:
        """Classes as pixels: the centre of the bin in each cell."""
        batch, k, _ = target.shape
        if self.joint:
            shifts = self.bits * torch.arange(self.channels - 1, -1, -1, device=target.device)
            bins = (target[..., None] >> shifts) % 2**self.bits
        else:
            bins = target.unflatten(-1, (self.cells**2, self.channels))
        centres = (bins.float() + 0.5) * 2 ** (8 - self.bits)
        cells = centres.view(batch, k, self.cells, self.cells, self.channels).permute(0, 1, 4, 2, 3)
        height, width = self.patch[0] // self.cells, self.patch[1] // self.cells
        return cells.repeat_interleave(height, 3).repeat_interleave(width, 4).to(torch.uint8)


@dataclass(frozen=True)
class PixelTarget:
    """Target 3: the full patch, P * P * C regressions on pixels scaled to [-1, 1], mean squared error."""

    patch: tuple[int, int]
    channels: int
    score_name: ClassVar[str] = "mse"

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return self.channels * self.patch[0] * self.patch[1]

    def of(self, images: Images) -> Float[Tensor, "batch patches outputs"]:
        """The pixels of every patch in [-1, 1], channels first."""
        batch, channels, height, width = images.shape
        ph, pw = self.patch
        patches = images.view(batch, channels, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, -1, self.outputs).float() / 127.5 - 1

    def of_constant(self, colours: Float[Tensor, "batch k channels"]) -> Float[Tensor, "batch k outputs"]:
        """The pixels that a patch of one colour (0 to 255) would have."""
        return (colours / 127.5 - 1).repeat_interleave(self.patch[0] * self.patch[1], dim=-1)

    def loss(
        self, output: Float[Tensor, "batch k outputs"], target: Float[Tensor, "batch k outputs"]
    ) -> Float[Tensor, "batch k"]:
        """Mean squared error per patch."""
        return (output.float() - target).square().mean(dim=-1)

    score = loss

    def agreement(
        self, guess: Float[Tensor, "#batch #k outputs"], target: Float[Tensor, "batch k outputs"]
    ) -> Float[Tensor, "batch k"]:
        """Mean squared error of a given guess per patch."""
        return (guess - target).square().mean(dim=-1)

    def confidence(self, output: Float[Tensor, "batch k outputs"]) -> Float[Tensor, "batch k"]:
        """NaN: a regression says nothing of how sure it is."""
        return output.new_full(output.shape[:-1], torch.nan)

    def colours(self, output: Float[Tensor, "batch k outputs"]) -> UInt8[Tensor, "batch k channels height width"]:
        """The predicted patches as pixels."""
        return self.render(output)

    def render(self, target: Float[Tensor, "batch k outputs"]) -> UInt8[Tensor, "batch k channels height width"]:
        """Pixels from [-1, 1] to 0..255."""
        pixels = ((target.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.unflatten(-1, (self.channels, *self.patch))


Target = ColourTarget | PixelTarget

_FLAT = 0.01  # standard deviation on [-1, 1], about one grey level, below which a patch counts as flat


def details(images: Images, patch: tuple[int, int]) -> Float[Tensor, "batch patches outputs"]:
    """The pixels of every patch less their mean, over their standard deviation, channels first.

    All P * P * C values of a patch share mean and deviation (MAE, arXiv 2111.06377, section 4.1, "normalized pixels").
    What is left out is about what the mean colour tells; predicting 0 everywhere has a mean squared error of about 1.
    """
    pixels = PixelTarget(patch, images.shape[1]).of(images)
    variance = pixels.var(dim=-1, keepdim=True)
    return (pixels - pixels.mean(dim=-1, keepdim=True)) / (variance + _FLAT**2).sqrt()


def build_target(name: str, patch: tuple[int, int], channels: int, bits: int) -> Target:
    """The target named mean_colour, colour_4x4 or pixels.

    Raises:
        UserError: patches that do not divide into 4x4 cells.
    """
    if name == "pixels":
        return PixelTarget(patch, channels)
    if name == "mean_colour":
        return ColourTarget(patch, channels, bits)
    if patch[0] % CELLS or patch[1] % CELLS:
        raise UserError(
            f"objective.target colour_4x4 needs patch sides divisible by 4, got {patch[0]}x{patch[1]}; take mean_colour"
        )
    return ColourTarget(patch, channels, bits, CELLS)
