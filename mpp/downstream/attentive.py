"""The attentive probe: learnt queries read the patch tokens of a frozen encoder, a linear classifier what they find.

    a_j    = softmax over the patches of q_j . x / sqrt(d)     j = 1 ... M queries, each with its own weights
    y      = [V_1 (X a_1), ..., V_M (X a_M)]                   each V_j gives d / M numbers of the d of a token
    logits = W batchnorm(y) + b

What masked patch prediction learns lies in single patches; their mean, which the linear probe reads, hides part of it.
Tokens are standardised by dimension, as the linear probe's features are. Probes with different learning rates and
weight decays are trained side by side on the same batches, from the same first weights, and do not touch each other;
the one that does best on held-out training images is trained again on all of them.

Source: efficient probing, Psomas et al., arXiv 2506.10178, and its code (poolings/ep.py, probe_heads.py): queries of
their own in place of keys, first weights, normalisation. There every token is projected by V and then averaged; a mean
of products is the product of the mean, so here V is applied to M averages instead of N tokens. AdamW, 20 epochs and a
cosine to 0 are those of V-JEPA's attentive probe (arXiv 2404.08471; configs/evals/vitl16_in1k.yaml).

Letters: B images in a batch, N patches, d features, P probes, M queries, K outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mpp.downstream.multi_label import mean_average_precision
from mpp.downstream.probe import ProbeResult, check_classes, count_right, cut_tenth, score_blocks
from mpp.downstream.ridge import Truth
from mpp.downstream.tokens import Tokens, cut
from mpp.system.progress import Progress
from mpp.training.schedule import learning_rate

_BATCH = 256
_LEAST_EPOCHS, _LEAST_STEPS = 20, 1000
_WARMUP = 0.05  # of the steps

Labelled = tuple[Tokens, Truth]


@dataclass(frozen=True)
class Training:
    """How attentive probes are trained."""

    lrs: Sequence[float]
    """Learning rates to choose from."""
    decays: Sequence[float]
    """Weight decays to choose from, each with each rate."""
    queries: int
    """At most; the largest divisor of the width up to it is taken."""
    epochs: int = 0
    """0: as `epochs_for`."""
    seed: int = 0
    """Of the first weights and of the order of images."""


def batch_for(images: int) -> int:
    """The largest power of two up to half of the images, from 8 to 256; of fewer than 8 images, all of them."""
    return min(max(8, min(_BATCH, 2 ** int(np.log2(max(images // 2, 1))))), images)


def epochs_for(images: int) -> int:
    """20 epochs, or as many as make 1,000 steps."""
    return max(_LEAST_EPOCHS, -(-_LEAST_STEPS // (images // batch_for(images))))


class Probes(nn.Module):
    """P attentive probes side by side, all with the same first weights.

    Args:
        mean, std: of the dimensions of a token (d,).
        outputs: K.
    """

    mean: Tensor
    scale: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, number: int, mean: np.ndarray, std: np.ndarray, queries: int, outputs: int, seed: int) -> None:
        super().__init__()
        width, generator = len(mean), torch.Generator().manual_seed(seed)
        queries = max(m for m in range(1, min(queries, width) + 1) if width % m == 0)

        def uniform(*shape: int) -> Tensor:
            """As torch draws those of a linear layer with `width` inputs."""
            return (2 * torch.rand(*shape, generator=generator) - 1) / width**0.5

        first = 0.02 * torch.randn(queries, width, generator=generator), uniform(queries, width, width // queries)
        last = uniform(width, outputs), uniform(outputs)
        self.queries, self.values, self.weights, self.biases = (
            nn.ParameterList(part.clone() for _ in range(number)) for part in (*first, *last)
        )
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("scale", torch.from_numpy(1 / std).float())
        self.register_buffer("running_mean", torch.zeros(number * width))
        self.register_buffer("running_var", torch.ones(number * width))

    def forward(self, tokens: Float[Tensor, "B N d"]) -> Float32[Tensor, "P B K"]:
        """Logits of each probe."""
        x = (tokens.float() - self.mean) * self.scale
        queries, values = torch.stack([*self.queries]), torch.stack([*self.values])
        (number, m, width), images = queries.shape, len(x)
        attention = (x @ (queries.flatten(0, 1).T / width**0.5)).softmax(dim=1)
        pooled = attention.transpose(1, 2) @ x  # (B, P M, d)
        found = torch.bmm(pooled.transpose(0, 1), values.flatten(0, 1))  # (P M, B, d / M)
        found = found.view(number, m, images, -1).permute(2, 0, 1, 3).reshape(images, number * width)
        found = F.batch_norm(found, self.running_mean, self.running_var, training=self.training, eps=1e-6)
        found = found.view(images, number, width).transpose(0, 1)
        return torch.baddbmm(torch.stack([*self.biases])[:, None], found, torch.stack([*self.weights]))

    def groups(self, settings: Sequence[tuple[float, float]]) -> list[dict[str, object]]:
        """Groups of an optimiser: each probe's weights with its rate and decay, its bias without the latter."""
        groups: list[dict[str, object]] = []
        for (lr, decay), *parts, bias in zip(
            settings, self.queries, self.values, self.weights, self.biases, strict=True
        ):
            groups += [{"params": parts, "lr": lr, "weight_decay": decay}]
            groups += [{"params": [bias], "lr": lr, "weight_decay": 0.0}]
        return groups


def train_probes(
    tokens: Tokens,
    rows: Int64[np.ndarray, " n"],
    truth: Truth,
    outputs: int,
    how: Training,
    settings: Sequence[tuple[float, float]],
) -> Probes:
    """Trains a probe for each (rate, decay) on these rows of the tokens, by AdamW.

    `truth` are all tokens' classes, 0 to outputs - 1, or sets of them. An epoch leaves out what does not fill a batch.
    """
    probes = Probes(len(settings), tokens.mean, tokens.std, how.queries, outputs, how.seed).to(tokens.device)
    optimizer = torch.optim.AdamW(probes.groups(settings), fused=tokens.device.type in ("cuda", "cpu"))
    size, epochs = batch_for(len(rows)), how.epochs or epochs_for(len(rows))
    of_epoch = len(rows) // size
    rate = learning_rate("cosine", 1.0, epochs * of_epoch, round(_WARMUP * epochs * of_epoch))
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step))
    with Progress("training probes", epochs * of_epoch, "steps") as progress:
        for epoch in range(epochs):
            batches = cut(np.random.default_rng([how.seed, epoch]).permutation(rows), size)[:of_epoch]
            for positions, some in zip(batches, tokens.batches(batches), strict=True):
                loss = _loss(probes(some), torch.from_numpy(truth[positions]).to(some.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                factor.step()
                progress.add()
    return probes.eval()


def _loss(logits: Float32[Tensor, "P B K"], truth: Tensor) -> Tensor:
    """Sum over the probes, which so get the gradients that each would get alone, of the mean over the images."""
    repeated = truth.repeat(len(logits), *(1,) * (truth.ndim - 1))
    if truth.ndim == 2:
        loss = F.binary_cross_entropy_with_logits(logits.flatten(0, 1), repeated.float(), reduction="sum")
    else:
        loss = F.cross_entropy(logits.flatten(0, 1), repeated, reduction="sum")
    return loss / len(truth)


def sweep_attentive(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    how: Training,
    val: Labelled | None = None,
    groups: Int64[np.ndarray, " n"] | None = None,
) -> ProbeResult:
    """Trains an attentive probe with the rate and decay that do best on `val`, without it on a tenth of whole `groups`.

    Of equals the lowest rate, with it the strongest decay is taken. Classes without training images are never
    predicted, test labels from num_classes on always wrong, as by `sweep_linear`. Raises ValueError as that.
    """
    tokens, truth = train
    check_classes(truth)
    several, every = truth.ndim == 2, np.arange(len(tokens))
    present = np.flatnonzero(truth.any(axis=0)) if several else np.unique(truth)
    targets = truth[:, present] if several else np.searchsorted(present, truth)
    grid = list(product(sorted(how.lrs), sorted(how.decays, reverse=True)))
    table: list[tuple[tuple[float, float], float]] = []
    probes, learned = None, every
    if len(grid) > 1:
        if val:
            held_out = val[0], np.arange(len(val[0])), val[1]
        else:
            (learned, _), (rows, labels) = cut_tenth((every, truth), groups)
            held_out = tokens, rows, labels
        probes = train_probes(tokens, learned, targets, len(present), how, grid)
        table = list(zip(grid, _accuracies(probes, *held_out, present, num_classes), strict=True))
    chosen = max(table, key=itemgetter(1))[0] if table else grid[0]
    if probes is None or learned is not every:
        probes, grid = train_probes(tokens, every, targets, len(present), how, [chosen]), [chosen]
    at = grid.index(chosen)
    blocks = (logits[at] for logits in _logits(probes, test[0], np.arange(len(test[0])), present, num_classes))
    if several:
        scores = np.concatenate(list(blocks))
        precision = mean_average_precision(scores, test[1])
        return ProbeResult("lr weight_decay", chosen, tuple(table), precision, None, scores.argmax(axis=1), True)
    return score_blocks("lr weight_decay", chosen, table, blocks, test[1], num_classes)


@torch.inference_mode()
def _logits(
    probes: Probes, tokens: Tokens, rows: np.ndarray, present: Int64[np.ndarray, " s"], num_classes: int
) -> Iterator[Float64[np.ndarray, "P b K"]]:
    """Gives the logits of these rows, batch by batch; -inf for a class that is not `present`, and for what is NaN."""
    for some in tokens.batches(cut(rows)):
        found = probes(some).double().cpu().numpy()
        logits = np.full((*found.shape[:2], num_classes), -np.inf)
        logits[..., present] = np.where(np.isnan(found), -np.inf, found)
        yield logits


def _accuracies(
    probes: Probes, tokens: Tokens, rows: np.ndarray, truth: Truth, present: Int64[np.ndarray, " s"], num_classes: int
) -> list[float]:
    """Accuracy of each probe on these rows, or its mean average precision, all from one pass over the tokens."""
    blocks = _logits(probes, tokens, rows, present, num_classes)
    if truth.ndim == 2:
        return [mean_average_precision(logits, truth) for logits in np.concatenate(list(blocks), axis=1)]
    right, start = np.zeros(len(probes.biases)), 0
    for block in blocks:
        labels = truth[start : start + block.shape[1]]
        right += [count_right(logits, labels, 1) for logits in block]
        start += len(labels)
    return (right / len(truth)).tolist()
