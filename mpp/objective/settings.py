"""Settings of the objective. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """Masked patch prediction; the defaults are the paper's (appendix B.1.2)."""

    target: Literal["mean_colour", "colour_4x4", "pixels"] = "mean_colour"
    """What is predicted: the patch's mean colour, its 4x4 downsized colours, or all its pixels (L2)."""
    bits: int = 3
    """Bits per colour channel of the two colour targets."""
    detail: float = 0.0
    """Weight of a second prediction, by a head of its own: the patch's pixels less their mean, over their standard
    deviation (MAE's normalised pixels), mean squared error, loss_detail. 0: none, as in the paper."""
    words: float = 0.0
    """Weight of a third prediction, by heads of their own: at the corrupted patches and at the others how much the
    patch's small windows resemble each of 256 visual words, typical windows that k-means finds at the start (Coates et
    al., AISTATS 2011), and its mean colour, and of the whole image, of which this is a crop, how much it resembles each
    of 512 typical ones in these, for which all images are read once at the start; mean squared errors, loss_words,
    loss_words_seen and loss_words_image. 0: none, as in the paper."""
    ratio: float = 0.5
    """Share of the patches that is corrupted; K = round(ratio * N) in every image."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Probabilities that a corrupted patch becomes [mask], becomes another patch, or stays unchanged."""
    picking: Literal["uniform", "block"] = "uniform"
    """Which patches: uniformly at random, or in rectangular blocks."""
    mask_enters: int = 0
    """Block before which the [mask] embeddings enter the encoder; the blocks before it see the other patches alone, for
    less. Needs split 1 0 0. 0: with the image, as in the paper. The encoder's number of blocks: never, which needs
    decoder_depth."""
    decoder_depth: int = 0
    """Blocks of a light decoder behind the encoder and as wide, which predicts and is dropped after the pretraining (as
    in MAE, with mask_enters at the encoder's number of blocks). 0: none, as in the paper."""
    random_from: Literal["image", "batch"] = "image"
    """Where the other patch of a random replacement is from; batch: the images of a micro-batch (train.micro_batch)."""

    def __post_init__(self) -> None:
        for key in ("detail", "words", "mask_enters", "decoder_depth"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"objective.{key} must be at least 0, got {getattr(self, key)}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"objective.ratio must be in (0, 1], got {self.ratio}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"objective.bits must be 1 to 8, got {self.bits}")
        if not all(p >= 0 for p in self.split) or not abs(sum(self.split) - 1) <= 1e-6:
            raise ValueError(f"objective.split must be three probabilities that sum to 1, got {list(self.split)}")
        if self.mask_enters and self.split[0] < 1:
            raise ValueError(
                "objective.mask_enters needs objective.split 1 0 0: patches that enter later cannot be swapped or left "
                f"as they are, got {list(self.split)}"
            )
