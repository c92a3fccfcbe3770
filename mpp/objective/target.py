"""What is predicted for a corrupted patch: its mean colour, its 4x4 downsized colours, or all its pixels.

Colours are quantised to `bits` per channel from raw pixels (0 to 255, after augmentation and before normalisation):
floor(mean / 32) for 3 bits. The three channels make one class, 64 r + 8 g + b of 512. Up to 4096 classes are one
prediction; where more channels or bits would exceed that, every channel is a prediction of its own (2^bits classes).

The `values` of a patch are the true ones; the head's `output` has another width where it is logits. A new target is one
class with the methods of these two, in the union `Target` and in `build_target`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from mpp.errors import UserError

MOST_CLASSES = 4096
CELLS = 4  # cells a side of the downsized patch of target 2

Images = UInt8[Tensor, "batch channels height width"]
Output = Float[Tensor, "batch k outputs"]
Values = Shaped[Tensor, "batch k values"]


@dataclass(frozen=True)
class ColourTarget:
    """Targets 1 and 2: quantised mean colours of a patch of (height, width) pixels, whole or in `cells` x `cells`.

    A patch has `predictions` predictions of `classes` classes each, int64; the head gives their product.
    """

    patch: tuple[int, int]
    channels: int
    bits: int = 3
    cells: int = 1
    score_name: ClassVar[str] = "accuracy"
    """Of `agreement`, among the figures of a run."""

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

    def of(self, images: Images) -> Values:
        """The classes of every patch, by integer arithmetic, so exact on any device."""
        cell = (self.patch[0] // self.cells, self.patch[1] // self.cells)
        # floor(sum / area / 2^(8 - bits)) in one exact division
        bins = cell_sums(images, cell) // (cell[0] * cell[1] * 2 ** (8 - self.bits))
        batch, channels, rows, columns = bins.shape
        c = self.cells
        bins = bins.view(batch, channels, rows // c, c, columns // c, c).permute(0, 2, 4, 3, 5, 1)
        return self._join(bins.reshape(batch, (rows // c) * (columns // c), c * c, channels)).flatten(2)

    def of_constant(self, colours: Float[Tensor, "batch k channels"]) -> Values:
        """The values of patches of one colour, 0 to 255."""
        bins = (colours / 2 ** (8 - self.bits)).floor().long().clamp(0, 2**self.bits - 1)
        return self._join(bins).repeat(1, 1, self.cells**2)

    def _join(self, bins: Int[Tensor, "*shape channels"]) -> Int[Tensor, "*shape parts"]:
        """The bins of all channels as one class, or as they are."""
        if not self.joint:
            return bins
        return (bins << self._shifts(bins.device)).sum(dim=-1, keepdim=True)

    def _shifts(self, device: torch.device) -> Int[Tensor, " channels"]:
        return self.bits * torch.arange(self.channels - 1, -1, -1, device=device)

    def most_frequent(self, values: Values) -> Int[Tensor, " values"]:
        """The best single guess for all these patches, the first trivial baseline."""
        slots = values.flatten(0, 1).unbind(1)
        return torch.stack([torch.bincount(slot, minlength=self.classes).argmax() for slot in slots])

    def _logits(self, output: Output) -> Float[Tensor, "batch k predictions classes"]:
        return output.unflatten(-1, (self.predictions, self.classes))

    def loss(self, output: Output, values: Values) -> Float[Tensor, "batch k"]:
        """Cross-entropy per patch in nats, the mean over its predictions."""
        loss = F.cross_entropy(self._logits(output.float()).flatten(0, 2), values.flatten(), reduction="none")
        return loss.view(values.shape).mean(dim=-1)

    def guess(self, output: Output) -> Values:
        """The predicted values."""
        # The first of the largest, like argmax, which takes three times as long in bf16 on a CPU.
        return self._logits(output).max(dim=-1).indices

    def agreement(self, guess: Shaped[Tensor, "#batch #k values"], values: Values) -> Float[Tensor, "batch k"]:
        """Score of a guess per patch: the share of its predictions that are right."""
        return (guess == values).float().mean(dim=-1)

    def confidence(self, output: Output) -> Float[Tensor, "batch k"]:
        """Probability of the predicted classes, the mean over a patch's predictions."""
        return self._logits(output.float()).softmax(dim=-1).amax(dim=-1).mean(dim=-1)

    def render(self, values: Values) -> UInt8[Tensor, "batch k channels height width"]:
        """Classes as pixels: the centre of the bin in each cell."""
        batch, k, _ = values.shape
        if self.joint:
            bins = (values[..., None] >> self._shifts(values.device)) % 2**self.bits
        else:
            bins = values.unflatten(-1, (self.cells**2, self.channels))
        centres = (bins.float() + 0.5) * 2 ** (8 - self.bits)
        cells = centres.view(batch, k, self.cells, self.cells, self.channels).permute(0, 1, 4, 2, 3)
        height, width = self.patch[0] // self.cells, self.patch[1] // self.cells
        return cells.repeat_interleave(height, 3).repeat_interleave(width, 4).to(torch.uint8)


@dataclass(frozen=True)
class PixelTarget:
    """Target 3: the full patch, P * P * C regressions on pixels scaled to [-1, 1], channels first."""

    patch: tuple[int, int]
    channels: int
    score_name: ClassVar[str] = "mse"

    @property
    def outputs(self) -> int:
        return self.channels * self.patch[0] * self.patch[1]

    def of(self, images: Images) -> Values:
        return cut_patches(images, self.patch).flatten(2).float() / 127.5 - 1

    def of_constant(self, colours: Float[Tensor, "batch k channels"]) -> Values:
        return (colours / 127.5 - 1).repeat_interleave(self.patch[0] * self.patch[1], dim=-1)

    def most_frequent(self, values: Values) -> Float[Tensor, " values"]:
        return values.mean(dim=(0, 1))

    def loss(self, output: Output, values: Values) -> Float[Tensor, "batch k"]:
        """Mean squared error per patch."""
        return self.agreement(self.guess(output), values)

    def guess(self, output: Output) -> Values:
        return output.float()

    def agreement(self, guess: Shaped[Tensor, "#batch #k values"], values: Values) -> Float[Tensor, "batch k"]:
        """Mean squared error per patch."""
        return (guess - values).square().mean(dim=-1)

    def confidence(self, output: Output) -> Float[Tensor, "batch k"]:
        """NaN: a regression has no probabilities."""
        return output.new_full(output.shape[:-1], torch.nan)

    def render(self, values: Values) -> UInt8[Tensor, "batch k channels height width"]:
        pixels = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.unflatten(-1, (self.channels, *self.patch))


Target = ColourTarget | PixelTarget


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


def cell_sums(images: Images, cell: tuple[int, int]) -> Int[Tensor, "batch channels rows columns"]:
    """Exact sums of the pixels of each (height, width) cell."""
    batch, channels, height, width = images.shape
    cells = images.view(batch, channels, height // cell[0], cell[0], width // cell[1], cell[1])
    return cells.sum(dim=(3, 5), dtype=torch.int64)


def cut_patches(images: Images, patch: tuple[int, int]) -> UInt8[Tensor, "batch patches channels ph pw"]:
    """The patches of each image, rows first."""
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


_FLAT = 0.01  # standard deviation on [-1, 1], about one grey level, below which a patch counts as flat


def details(images: Images, patch: tuple[int, int]) -> Float[Tensor, "batch patches outputs"]:
    """The pixels of every patch less their mean, over their standard deviation, channels first.

    All P * P * C values of a patch share mean and deviation (MAE, arXiv 2111.06377, section 4.1, "normalized pixels").
    They leave out about what the mean colour says; predicting 0 everywhere has a mean squared error of about 1.
    """
    pixels = PixelTarget(patch, images.shape[1]).of(images)
    variance = pixels.var(dim=-1, keepdim=True)
    return (pixels - pixels.mean(dim=-1, keepdim=True)) / (variance + _FLAT**2).sqrt()
