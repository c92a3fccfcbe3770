"""Masked patch prediction: embed, corrupt, encode, predict at the corrupted patches (paper, section 4.6 and B.1.2).

tokens = encoder.embed(pixels)                    before position embeddings
tokens = corrupt(tokens, corruption, mask_token)  80 % [mask], 10 % another patch, 10 % unchanged
tokens = encoder.encode(tokens, at=picked)        those of the K corrupted patches, and no others
[or, with a decoder: decoder(encoder.encode(tokens, at=picked, return_all=True), picked)]
output = head(tokens)
loss   = mean over all K, the unchanged ones included [+ detail * that of a second head, + words * those of three more]
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mpp.errors import command
from mpp.objective.image_words import IMAGE_WORDS, ImageComponents, ImageWords
from mpp.objective.masking import KINDS, Corruption, corrupt, others
from mpp.objective.target import ColourTarget, Target, cell_sums, details
from mpp.objective.words import VisualWords

Figures = dict[str, Tensor]
"""Name -> (2,) float64: a sum and the count that it runs over; any union's mean is its sums over its counts."""


class MaskedPatchPrediction(nn.Module):
    """The encoder with what the objective adds: a [mask] embedding and a linear head.

    Args:
        encoder: a module with `embed` and `encode` (see `mpp.model.encoder.Encoder`), `grid`, `patch` and `embed_dim`.
        target: what is predicted.
        normalise: makes the encoder's input, float32, of raw pixels of 0 to 255, uint8.
        mask_block: block before which the [mask] embeddings enter; above 0 only if all picked patches are masked.
        detail: weight of the loss of a second head, which predicts the patches' `details`; 0: no such head.
        words: weight of the losses of three more heads: of the `VisualWords` of the corrupted patches; of those of the
            rest, from the encoder's own tokens; of the whole image's `ImageWords`, from the mean of these. 0: no such
            heads.
        decoder: makes the tokens that the heads read of all of the encoder's and the indices of the corrupted patches;
            None: the heads read the encoder's own.
        flips: whether the training turns images upside down, and left to right, for the words of whole images.
    """

    frequent: Tensor
    """(values,) the most frequent class, for pixels the mean patch: the first trivial baseline, set by the survey."""
    distance: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        target: Target,
        normalise: nn.Module,
        mask_block: int = 0,
        detail: float = 0.0,
        decoder: nn.Module | None = None,
        words: float = 0.0,
        flips: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.target = target
        self.normalise = normalise
        self.mask_block = mask_block
        self.detail = detail
        self.decoder = decoder
        self.mask_token = nn.Parameter(torch.empty(self.encoder.embed_dim))
        self.head = nn.Linear(self.encoder.embed_dim, target.outputs)
        outputs = target.channels * self.encoder.patch[0] * self.encoder.patch[1]
        self.detail_head = nn.Linear(self.encoder.embed_dim, outputs) if detail else None
        self.words_weight = words
        self.words = VisualWords(self.encoder.patch, target.channels) if words else None
        values = 0 if self.words is None else self.words.outputs
        self.words_head: Any = nn.Linear(self.encoder.embed_dim, values) if words else None
        self.seen_head: Any = nn.Linear(self.encoder.embed_dim, values) if words else None
        self.image_components: ImageComponents | None = None
        if words:
            self.image_components = ImageComponents(self.encoder.grid, self.encoder.patch, target.channels, flips)
        self.image_words = ImageWords() if words else None
        self.image_head: Any = nn.Linear(self.encoder.embed_dim, IMAGE_WORDS) if words else None
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        heads = self.head, self.detail_head, self.words_head, self.seen_head, self.image_head
        for head in filter(None, heads):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        values = target.of(torch.zeros(1, target.channels, *target.patch, dtype=torch.uint8))[0, 0]
        self.register_buffer("frequent", torch.zeros_like(values))
        self.register_buffer("distance", patch_distances(self.encoder.grid, self.encoder.patch), persistent=False)

    def predict(
        self, pixels: Float[Tensor, "batch channels height width"], corruption: Corruption
    ) -> Float[Tensor, "batch k outputs"]:
        """The head's output at the corrupted patches of normalised images."""
        return self.head(self._encode(pixels, corruption)[0])

    def _encode(
        self, pixels: Tensor, corruption: Corruption
    ) -> tuple[Float[Tensor, "batch k dim"], Float[Tensor, "batch patches dim"] | None]:
        """The tokens of the corrupted patches, after the encoder and the decoder, if there is one; and those of all
        patches after the encoder, if that computes them, as it does for a decoder and for words."""
        tokens, picked = corrupt(self.encoder.embed(pixels), corruption, self.mask_token), corruption.picked
        if self.decoder is None and self.words is None:
            return self.encoder.encode(tokens, at=picked, mask_block=self.mask_block), None
        every = self.encoder.encode(tokens, at=picked, mask_block=self.mask_block, return_all=True)
        patches = every[:, self.encoder.num_prefix_tokens :]
        return (gather_patches(patches, picked) if self.decoder is None else self.decoder(every, picked)), patches

    def forward(
        self,
        images: UInt8[Tensor, "batch channels height width"],
        corruption: Corruption,
        components: Float[Tensor, "batch components"] | None = None,
    ) -> tuple[Float[Tensor, ""], Figures]:
        """Loss and figures of raw pixels 0 to 255, after augmentation.

        `components` are those of the whole images (see `ImageComponents`), for the loss of their words; NaN leaves an
        image out of it.
        """
        tokens, patches = self._encode(self.normalise(images), corruption)
        output = self.head(tokens)
        values = gather_patches(self.target.of(images), corruption.picked)
        loss = self.target.loss(output, values)
        with torch.no_grad():
            figures = self._figures(images, corruption, output.detach(), values, loss.detach())
        total = loss.mean()
        if self.detail_head is not None:
            true = gather_patches(details(images, self.encoder.patch), corruption.picked)
            total = total + self.detail * _squared("loss_detail", self.detail_head(tokens), true, figures)
        if self.words is not None and self.image_words is not None and patches is not None:
            words, picked = self.words.of(images), corruption.picked
            seen = others(picked, patches.shape[1])
            tokens_seen = gather_patches(patches, seen)
            losses: list[Tensor] = [
                _squared("loss_words", self.words_head(tokens), gather_patches(words, picked), figures),
                _squared("loss_words_seen", self.seen_head(tokens_seen), gather_patches(words, seen), figures),
            ]
            if components is not None:
                output, known = self.image_head(tokens_seen.mean(dim=1)), components.isfinite().all(dim=1).float()
                of_image = self.image_words.of(components.nan_to_num())
                losses.append(_squared("loss_words_image", output, of_image, figures, known))
            for each in losses:
                total = total + self.words_weight * each
        return total, figures

    def _figures(self, images: Tensor, corruption: Corruption, output: Tensor, values: Tensor, loss: Tensor) -> Figures:
        target, name = self.target, self.target.score_name
        score = target.agreement(target.guess(output), values)
        ones = torch.ones_like(score)
        figures = {"loss": _sum(loss, ones), name: _sum(score, ones)}
        for number, kind in enumerate(KINDS):
            weight = (corruption.kinds == number).to(score.dtype)
            figures[f"loss_{kind}"] = _sum(loss, weight)
            figures[f"{name}_{kind}"] = _sum(score, weight)
        figures[f"{name}_baseline_frequent"] = _sum(target.agreement(self.frequent[None, None], values), ones)
        sums, (height, width) = cell_sums(images, self.encoder.patch), self.encoder.patch
        colours = (sums.float() / (height * width)).flatten(2).transpose(1, 2)
        colours = neighbour_colours(colours, corruption.picked, self.distance)
        neighbours = target.agreement(target.of_constant(colours), values)
        figures[f"{name}_baseline_neighbours"] = _sum(neighbours, ones)
        return figures


def gather_patches(values: Tensor, picked: Int[Tensor, "batch k"]) -> Tensor:
    """(batch, patches, ...) at the picked patches: (batch, k, ...)."""
    index = picked.view(*picked.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _squared(
    name: str, output: Tensor, true: Tensor, figures: Figures, weight: Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean squared error over all rows, each by its weight; puts that of the weighed ones among the figures."""
    loss = (output.float() - true).square().mean(dim=-1)
    figures[name] = _sum(loss.detach(), torch.ones_like(loss) if weight is None else weight)
    # A mean over all rows, or the loss of a batch would go by how it is cut into micro-batches.
    return (loss if weight is None else loss * weight).mean()


def _sum(values: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([(values * weight).sum(dtype=torch.float64), weight.sum(dtype=torch.float64)])


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> Int[Tensor, "n n"]:
    """Squared distances in pixels between the centres of any two patches."""
    row = torch.arange(grid[0]).repeat_interleave(grid[1]) * patch[0]
    column = torch.arange(grid[1]).repeat(grid[0]) * patch[1]
    return (row[:, None] - row[None]) ** 2 + (column[:, None] - column[None]) ** 2


def neighbour_colours(
    colours: Float[Tensor, "batch n channels"], picked: Int[Tensor, "batch k"], distance: Int[Tensor, "n n"]
) -> Float[Tensor, "batch k channels"]:
    """The second trivial baseline: the mean colour of the nearest uncorrupted patches of each picked patch.

    All uncorrupted patches at the smallest distance count alike. Mid-grey if every patch is corrupted.
    """
    batch, n, _ = colours.shape
    visible = torch.ones(batch, n, dtype=torch.bool, device=colours.device).scatter(1, picked, False)
    far = torch.iinfo(distance.dtype).max
    d = distance[picked].masked_fill(~visible[:, None], far)  # (batch, k, n)
    nearest = d.amin(dim=-1, keepdim=True)
    weight = ((d == nearest) & (nearest < far)).to(colours.dtype)
    with torch.autocast(colours.device.type, enabled=False):
        total = weight @ colours
    count = weight.sum(dim=-1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), 127.5)


class Survey(NamedTuple):
    """Statistics of the targets of a sample of images, before any training."""

    images: int
    counts: Int[Tensor, " classes"] | None
    """How often each class occurs over all patches and predictions; None for pixels."""
    frequent: Tensor
    """See `MaskedPatchPrediction`."""

    @property
    def perplexity(self) -> float:
        """Effective number of classes, the exponential of the entropy."""
        assert self.counts is not None
        share = self.counts[self.counts > 0].double() / self.counts.sum()
        return float(torch.exp(-(share * share.log()).sum()))

    @property
    def largest_share(self) -> float:
        """Share of the most frequent class."""
        assert self.counts is not None
        return float(self.counts.max() / self.counts.sum())

    @property
    def warning(self) -> str:
        """A warning if almost all targets are the same, the usual sign of wrongly scaled input; else empty."""
        if self.counts is None or (self.largest_share <= 0.9 and self.perplexity >= 1.5):
            return ""
        return (
            "almost all targets are the same class, so there is next to nothing to learn. Usually the input is wrongly "
            "scaled (12 bits in 16: state data.value_range; masks, nearly black images): look at the pictures, and at "
            f"what {command('check_data')} says"
        )

    def describe(self) -> str:
        """One line for the terminal."""
        if self.counts is None:
            return f"targets: pixels, surveyed on {self.images:,} images"
        used = int((self.counts > 0).sum())
        return (
            f"targets: {used} of {len(self.counts)} classes occur in {self.images:,} images, effectively "
            f"{self.perplexity:.1f}; the most frequent is {self.largest_share:.1%} of the patches"
        )


def survey_targets(target: Target, images: UInt8[Tensor, "batch channels height width"]) -> Survey:
    """Histogram and most frequent value of the targets of `images`."""
    values = target.of(images)
    counts = values.flatten().bincount(minlength=target.classes) if isinstance(target, ColourTarget) else None
    return Survey(len(images), counts, target.most_frequent(values))
