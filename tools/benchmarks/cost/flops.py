"""Floating-point operations of a training step, counted as torch.utils.flop_counter does: matrix products alone.

A product of (a, b) and (b, c) is 2 a b c operations; its backward pass is two such products. Legend: N patches,
T tokens, K corrupted patches, D token width, M width of the MLP.
"""

from dataclasses import dataclass

from benchmarks.cost.shape import Shape

FUSED, EXPLICIT = "fused", "explicit"
"""Attention kernels: sdpa and xformers compute the weights again in the backward pass, the explicit form keeps them."""


@dataclass(frozen=True)
class Passes:
    """Operations of one part for one image."""

    forward: int
    backward: int
    recomputed: int = 0
    """With activation checkpointing: what of the forward pass runs again."""

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


def flops(shape: Shape, kernel: str = FUSED, checkpointing: bool = False) -> dict[str, Passes]:
    """Operations of one image in training, by part.

    The early blocks know the T - K tokens that are not hidden from them. The last block computes keys and values of all
    T tokens and the rest for the K that are read, or for all T where visual words are read from them. Checkpointing
    runs every block again up to its last product, whose result nothing needs.
    """
    n, t, k = shape.patches, shape.tokens, shape.picked
    d, m = shape.dim, shape.hidden
    embedding = 2 * n * shape.patch_values * d
    known = [t - k] * shape.early + [t] * (shape.blocks - 1 - shape.early)  # to each block but the last
    asking = shape.asking
    projections = sum(8 * s * d * d for s in known) + 4 * t * d * d + 4 * asking * d * d
    products = sum(4 * s * s * d for s in known) + 4 * asking * t * d  # queries by keys, weights by values
    mlp = sum(4 * s * d * m for s in known) + 4 * asking * d * m
    head = 2 * k * d * (shape.outputs + shape.details) + 2 * n * d * shape.words + 2 * d * shape.image_words
    windows, values = shape.word_windows
    words = 2 * n * windows * values * (values + shape.words - shape.channels)  # whitening, distances
    words += 2 * shape.image_components * shape.image_words
    again = products // 2 if kernel == FUSED else 0  # the weights, once more
    return {
        "patch embedding": Passes(embedding, embedding),  # pixels need no gradient
        "attention": Passes(
            projections + products,
            2 * (projections + products) + again,
            (projections + products) * checkpointing,
        ),
        "MLP": Passes(mlp, 2 * mlp, mlp // 2 * checkpointing),
        "head": Passes(head, 2 * head),
        "baselines": Passes(2 * k * n * shape.channels + words, 0),  # means of neighbours, for the figures; words
    }


def total(parts: dict[str, Passes]) -> int:
    """All operations of one image in training."""
    return sum(part.total for part in parts.values())
