"""How often each colour is to be predicted, is predicted, and is taken for another."""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from mpp.objective.masking import Corruption
from mpp.objective.objective import E, MaskedPatchPrediction
from mpp.objective.picture import to_rgb
from mpp.objective.target import MOST_CLASSES, ColourTarget, Target

_PIXEL_BITS = 3  # in which the mean colours of targets of pixels are counted


class ColourCounts:
    """True and predicted colours of all corrupted patches, counted batch by batch.

    Colours are the model's own classes where those are colours: mean_colour and colour_4x4 with all channels in one
    class. Else they are classes of the first three channels (of one, where there are fewer) of what the model predicts,
    drawn as pixels: of a target of pixels the mean colour of the patch in 3 bits, of predictions by channel each cell
    in the target's bits, or as many as make 4096 classes. Then `accuracy` is of these and not the model's own figure.

    Args:
        target: of the models whose predictions are counted.

    Attributes:
        bits: of a channel.
        channels: that make a class.
        classes: their number, 2^(bits * channels).
    """

    def __init__(self, target: Target) -> None:
        self.channels = 3 if target.channels >= 3 else 1
        self.bits, cells = _PIXEL_BITS, 1
        if isinstance(target, ColourTarget):
            self.channels = target.channels if target.joint else self.channels
            self.bits, cells = target.bits, target.cells
        self.bits = min(self.bits, (MOST_CLASSES.bit_length() - 1) // self.channels)
        self._colours = ColourTarget(target.patch, self.channels, self.bits, cells)
        self.classes = self._colours.classes
        self._pairs = np.empty(0, np.int64)  # true * classes + predicted, ascending, of those that occurred
        self._counts = np.empty(0, np.int64)

    @torch.inference_mode()
    def add(
        self,
        model: MaskedPatchPrediction[E],
        images: UInt8[Tensor, "batch channels height width"],
        pixels: Float[Tensor, "batch channels height width"],
        corruption: Corruption,
    ) -> None:
        """Counts a batch of predictions; `pixels` are the images, normalised."""
        guess = model.target.colours(model.predict(pixels, corruption))
        predicted = self._colours.of(guess.flatten(0, 1)[:, : self.channels])[:, 0]
        every = self._colours.of(images[:, : self.channels])
        true = every.gather(1, corruption.picked[..., None].expand(-1, -1, every.shape[-1]))
        pairs = (true.flatten() * self.classes + predicted.flatten()).cpu().numpy()
        new, counts = np.unique(pairs, return_counts=True)
        self._pairs, place = np.unique(np.concatenate([self._pairs, new]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([self._counts, counts]))
        self._counts = counts.astype(np.int64)

    @property
    def pairs(self) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
        """True class, predicted class, and how often they met, of those that did, ascending."""
        return self._pairs // self.classes, self._pairs % self.classes, self._counts

    @property
    def true(self) -> Int64[np.ndarray, " classes"]:
        """How often each colour was to be predicted."""
        return self._sums(self._pairs // self.classes, self._counts)

    @property
    def predicted(self) -> Int64[np.ndarray, " classes"]:
        """How often each colour was predicted."""
        return self._sums(self._pairs % self.classes, self._counts)

    @property
    def right(self) -> Int64[np.ndarray, " classes"]:
        """How often each colour was predicted where it was true."""
        true, predicted, counts = self.pairs
        return self._sums(true, counts * (true == predicted))

    @property
    def accuracy(self) -> Float64[np.ndarray, " classes"]:
        """Share of its patches at which each colour was predicted; NaN for those that were never true."""
        true = self.true
        return np.divide(self.right, true, out=np.full(self.classes, np.nan), where=true > 0)

    def predicted_for(self, true: int) -> tuple[Int64[np.ndarray, " found"], Int64[np.ndarray, " found"]]:
        """What is predicted where this colour is true, most frequent first: classes and how often."""
        begin, end = np.searchsorted(self._pairs, (true * self.classes, (true + 1) * self.classes))
        order = np.argsort(-self._counts[begin:end], kind="stable")
        return self._pairs[begin:end][order] % self.classes, self._counts[begin:end][order]

    @property
    def colours(self) -> UInt8[np.ndarray, "classes 3"]:
        """Each class as a colour, the centres of its bins; of one or two channels as grey, of more the first three."""
        target = ColourTarget((1, 1), self.channels, self.bits)
        return to_rgb(target.render(torch.arange(self.classes)[None, :, None])[0])[:, 0, 0]

    def _sums(self, classes: Int64[np.ndarray, " pairs"], counts: Int64[np.ndarray, " pairs"]) -> np.ndarray:
        return np.bincount(classes, counts, self.classes).astype(np.int64)


def order(counts: ColourCounts) -> Int64[np.ndarray, " found"]:
    """The classes that were true or predicted, by how often they were true, most frequent first.

    Classes that were true equally often come by how often they were predicted, then by number.
    """
    true, predicted = counts.true, counts.predicted
    ranked = np.lexsort((np.arange(counts.classes), -predicted, -true))
    return ranked[(true + predicted)[ranked] > 0]
