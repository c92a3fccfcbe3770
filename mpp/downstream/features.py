"""Features of frozen encoders: any weights, any layers, pooled in every way that they allow.

    images -> one forward pass -> the layers asked for -> mean of the patch tokens | class token of each

Features are cached on disk by a hash of all that they depend on: weights, architecture, layer, data, input size,
normalisation, how images become pixels, arithmetic.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import mpp.system.timm_import  # noqa: F401

# isort: split
import numpy as np
import PIL
import timm
import torch
from jaxtyping import Float, Float32, Int64
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpp import dist
from mpp.data.loader import sequential
from mpp.data.reader import Bad, Batch
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.transform import TRANSFORM_VERSION, EvalTransform, Transform, normalise
from mpp.downstream.feature_cache import Features, cached_features, weights_hash
from mpp.downstream.fewshot import Extract
from mpp.downstream.labelled import Labelled
from mpp.errors import RunError, UserError
from mpp.model.attention import Attention
from mpp.model.encoder import check_patches, pool, quarters
from mpp.model.kernel_choice import EVALUATION_BATCH, settle_kernel, task_of
from mpp.system.process import global_draws
from mpp.system.progress import Progress
from mpp.training.parallel import DTYPES, autocast
from mpp.weights.base import Weights, build

Side = tuple[Any, np.ndarray]  # features and labels


def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device | str,
    tell: Callable[[int], None] = lambda images: None,
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Runs batches, which may be empty, through `encode`, without gradients; gives features and each row's `index`.

    `encode` takes uint8 (B, C, h, w) on the device and gives (B, d) of any float type. Without any image, as on a rank
    that has none to read, the shapes are (0, 0) and (0,). `tell` gets the number of each batch.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for features, index, _ in stream_features(lambda images: encode(images).float(), batches, device):
        if len(index):
            found.append((features, index))
        tell(len(index))
    if not found:
        return np.empty((0, 0), dtype=np.float32), np.empty(0, dtype=np.int64)
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])


def stream_features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device | str
) -> Iterator[tuple[np.ndarray, Int64[np.ndarray, " b"], list[Bad]]]:
    """Gives the features of each batch as `encode` makes them, the index of each row, and the images that are bad.

    The features of a batch are handed on while the device is at the next one, so that it never idles.
    """
    device = torch.device(device)
    before: tuple[Tensor, np.ndarray, list[Bad]] | None = None
    copied: Any = torch.cuda.Event() if device.type == "cuda" else None
    for batch in batches:
        rows = torch.empty(0)
        if len(batch["images"]):
            with torch.inference_mode():
                rows = encode(batch["images"].to(device, non_blocking=True))
        if before is not None:
            yield _waited_for(copied, before)
        if rows.numel():
            # The copy back lands in pinned memory. On the CPU, too, it is a copy: a view of one token would keep all.
            rows = rows.to("cpu", non_blocking=True, copy=True)
        if copied:
            copied.record()
        before = rows, batch["index"].numpy().copy(), batch["bad"]
    if before is not None:
        yield _waited_for(copied, before)


def _waited_for(copied: Any, of: tuple[Tensor, np.ndarray, list[Bad]]) -> tuple[np.ndarray, np.ndarray, list[Bad]]:
    if copied:
        copied.synchronize()
    return of[0].numpy(), *of[1:]


def extract_by_all(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    indices: Int64[np.ndarray, " n"],
    transform: Transform,
    reading: DecodeOptions,
    device: torch.device,
    *,
    workers: int,
    refuse: bool = True,
) -> tuple[Float32[np.ndarray, "m d"], Int64[np.ndarray, " m"]]:
    """Extracts features of these images by all ranks together; every rank gets them and their indices, ascending.

    Images that cannot be decoded are left out; raises RunError where that leaves none, unless `refuse` is false.
    """
    rank, size = dist.rank_and_size()
    options: Any = {"batch_size": EVALUATION_BATCH, "workers": workers, "pin_memory": device.type == "cuda"}
    batches = sequential(source, transform, reading, indices[rank::size], **options)
    with Progress("reading images", len(indices)) as progress:
        own = extract_features(encode, batches, device, lambda images: progress.add(size * images))
    parts = [part for part in dist.gather(own) if len(part[1])]
    if refuse and not parts:
        raise RunError(f"none of the {len(indices)} images of {source.name} that are needed could be decoded")
    return in_order(parts or [own])


def in_order(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Joins the features of several ranks, with the images that they are of, by ascending images."""
    features, decoded = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(decoded)
    return features[order], decoded[order]


class FrozenEncoder:
    """An encoder in evaluation mode, its head dropped; fresh weights are drawn from `seed`.

    Args:
        layers: whose outputs are read, from 0 or from the end (-1), or the word all; of ViTs blocks, of others stages.
            The last layer is read after the encoder's last norm, the others as they are.
        image_hw: another input size than the weights' own.
        precision: bf16, fp16 or fp32.
        cache: whether features are cached on disk.
        quarters: whether this pooling is among those of a ViT, which makes features several times as wide.

    Attributes:
        depth: how many layers the encoder has.
        layers: those that are read, each once, ascending and counted from the end: -1 is the last.
        pools: the features of one layer: mean; of ViTs with a class token token and mean+token; quarters if asked for.

    Raises:
        UserError: a layer or a size that the encoder has not.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        layers: Sequence[int | Literal["all"]] = (-1,),
        image_hw: tuple[int, int] | None = None,
        device: torch.device,
        precision: str = "fp32",
        workers: int = 0,
        cache: bool = False,
        seed: int = 0,
        quarters: bool = False,
    ) -> None:
        self.weights = weights
        self.image_hw = image_hw or weights.image_hw
        self.device, self.precision, self.workers = device, precision, workers
        dtype = DTYPES[precision]
        with global_draws(seed):
            self.model: Any = build(weights, classes=(), image_hw=self.image_hw, device=device, dtype=dtype).eval()
        if image_hw is not None:
            check_patches(self.model, image_hw, "encoder.img_size")
        self.is_vit = isinstance(self.model, VisionTransformer | Eva)
        stages = self.model.blocks if self.is_vit else ()
        if not self.is_vit and hasattr(self.model, "forward_intermediates"):
            stages = getattr(self.model, "feature_info", ())
        self.depth = max(len(stages or ()), 1)
        self.layers = self._from_the_end(layers)
        self._has_token = self.is_vit and self.model.num_prefix_tokens > 0 and self.model.cls_token is not None
        self._quarters = quarters and self.is_vit
        self.pools: tuple[str, ...] = ("mean", "token", "mean+token") if self._has_token else ("mean",)
        self.pools += ("quarters",) if self._quarters else ()
        self._attention = ""
        self._memory: list[tuple[Source, np.ndarray, dict[int, Features]]] = []
        self._cache, self._hash = cache, ""

    def _from_the_end(self, layers: Sequence[int | Literal["all"]]) -> tuple[int, ...]:
        numbers = range(self.depth) if "all" in layers else [layer for layer in layers if layer != "all"]
        for layer in numbers:
            if not -self.depth <= layer < self.depth:
                which = f"{self.weights.origin} has layers 0 to {self.depth - 1}, or -{self.depth} to -1"
                raise UserError(f"layer {layer}: {which}")
        return tuple(sorted({layer if layer < 0 else layer - self.depth for layer in numbers}))

    def encode(self, images: Tensor) -> Float[Tensor, "b d"]:
        """Encodes uint8 (B, C, h, w) on the device: layers, and in each mean, token and quarters, side by side."""
        return torch.cat(self._rows(images), dim=1)

    def _rows(self, images: Tensor) -> list[Float[Tensor, "b d"]]:
        """Features of each layer: the mean of the patch tokens, and after it the class token and quarters of ViTs."""
        pixels = normalise(images, self.weights.mean, self.weights.std)
        with torch.inference_mode(), autocast(self.precision, self.device):
            rows = self._pooled_tokens(pixels) if self.is_vit else self._pooled_maps(pixels)
            return [row.float() for row in rows]

    def _pooled_tokens(self, pixels: Tensor) -> list[Tensor]:
        tokens = self._tokens(pixels)
        norms = [nn.Identity() if layer != -1 else self.model.fc_norm for layer in self.layers]  # the latter of some
        pools: tuple[Literal["mean", "token"], ...] = ("mean", "token") if self._has_token else ("mean",)
        prefix, grid = self.model.num_prefix_tokens, self.model.patch_embed.grid_size

        def parts(of: Tensor) -> list[Tensor]:
            return [*(pool(of, prefix, how) for how in pools), *(quarters(of, prefix, grid) if self._quarters else ())]

        return [
            torch.cat([norm(part).float() for part in parts(of.float())], dim=1)
            for of, norm in zip(tokens, norms, strict=True)
        ]

    def _tokens(self, pixels: Tensor) -> list[Tensor]:
        """All tokens of each layer of a ViT, (B, tokens, D)."""
        apart = self.model.num_prefix_tokens > 0  # Eva fails to return those that it has not
        below, last = self._outputs(pixels, return_prefix_tokens=apart, output_fmt="NLC")
        # Of patch tokens alone, or of both kinds apart.
        tokens = [torch.cat([of[1], of[0]], dim=1) if isinstance(of, tuple) else of for of in below]
        return tokens if last is None else [*tokens, last]

    def _pooled_maps(self, pixels: Tensor) -> list[Tensor]:
        below, last = self._outputs(pixels)
        pooled = [of.float().mean(dim=(2, 3)) for of in below]
        return pooled if last is None else [*pooled, self.model.forward_head(last, pre_logits=True)]

    def _outputs(self, pixels: Tensor, **options: Any) -> tuple[list[Any], Tensor | None]:
        """Gives timm's outputs of the layers below the last, and of the last where it is read, from one pass."""
        below = [self.depth + layer for layer in self.layers if layer != -1]
        if not below:
            return [], self.model.forward_features(pixels)
        if self.layers[-1] == -1:
            last, outputs = self.model.forward_intermediates(pixels, indices=below, stop_early=False, **options)
            return outputs, last
        options |= {"intermediates_only": True, "stop_early": True}
        return self.model.forward_intermediates(pixels, indices=below, **options), None

    def extract(self, how: str, layer: int = -1) -> Extract:
        """Gives the function that reads features of one of `pools` and one of `layers`."""

        def extract(source: Source, indices: Int64[np.ndarray, " n"]) -> Features:
            features, decoded = self._by_layer(source, indices)[layer]
            return self._pooled(features, how), decoded

        return extract

    def _pooled(self, rows: Any, how: str) -> Any:
        """Of features of one layer, arrays or tensors, the part that this pooling asks for."""
        width = rows.shape[1] // (1 + self._has_token + 4 * self._quarters)
        first, last = {"mean": (0, 1), "token": (1, 2), "mean+token": (0, 2), "quarters": (-4, None)}[how]
        return rows[:, first * width : None if last is None else last * width]

    def read(self, images: Tensor, how: str) -> Float[Tensor, "b *shape"]:
        """Features of the first of `layers` of uint8 (B, C, h, w) on the device: (B, D) by one of `pools`; of ViTs by
        none patch tokens, (B, patches, D)."""
        if how != "none":
            return self._pooled(self._rows(images)[0], how)
        pixels = normalise(images, self.weights.mean, self.weights.std)
        with torch.inference_mode(), autocast(self.precision, self.device):
            return self._tokens(pixels)[0][:, self.model.num_prefix_tokens :].float()

    def batches(self, source: Source, indices: np.ndarray, size: int = EVALUATION_BATCH) -> Generator[Batch]:
        """Images of a source in order, as the encoder takes them."""
        transform, reading = EvalTransform(self.image_hw, self.weights.framing), self.weights.reading
        options: Any = {"batch_size": size, "pin_memory": self.device.type == "cuda"}
        return sequential(source, transform, reading, indices, workers=self.workers, **options)

    def settle(self) -> None:
        """Takes the fastest attention kernel; for when wrong input has been refused."""
        task = task_of(self.model, EVALUATION_BATCH, False, self.device, DTYPES[self.precision])
        self._attention = settle_kernel("auto", self._attention, task, self.model)

    def identity(self) -> dict[str, Any]:
        """What tells these features of an image from others, as JSON values: weights, architecture, input."""
        weights = self.weights
        self._hash = self._hash or weights_hash(self.model.state_dict())
        pixels = list(self.image_hw), weights.in_chans, list(weights.mean), list(weights.std)
        identity = {
            "weights": self._hash,
            "architecture": [weights.name, dict(weights.args), weights.pool, asdict(weights.numerics)],
            "input": [*pixels, asdict(weights.reading), asdict(weights.framing)],
        }
        return json.loads(json.dumps(identity))

    def _by_layer(self, source: Source, indices: Int64[np.ndarray, " n"]) -> dict[int, Features]:
        """Features by layer, from memory, the cache or the images."""
        for of, which, known in self._memory:
            if of is source and np.array_equal(which, indices):
                return known
        self.settle()  # by the kernel's name features are cached, too
        passed = functools.cache(lambda: self._pass(source, indices))  # made at most once, by the first layer to miss
        features: dict[int, Features] = {} if self._cache else passed()
        if self._cache:
            key = self.key(source, indices)
            for layer in self.layers:
                features[layer] = cached_features({**key, "layer": layer}, lambda layer=layer: passed()[layer])
        self._memory.append((source, indices, features))
        return features

    def _pass(self, source: Source, indices: np.ndarray) -> dict[int, Features]:
        """Features by layer, all from one pass over the images."""
        transform, reading = EvalTransform(self.image_hw, self.weights.framing), self.weights.reading
        features, decoded = extract_by_all(
            self.encode, source, indices, transform, reading, self.device, workers=self.workers
        )
        # The stages of a network differ in width, and a rank may have had no image of its own to learn them from.
        blank = torch.zeros(1, self.weights.in_chans, *self.image_hw, dtype=torch.uint8, device=self.device)
        ends = np.cumsum([row.shape[1] for row in self._rows(blank)]) if len(self.layers) > 1 else []
        parts = np.split(features, ends[:-1], axis=1)
        return {layer: (part, decoded) for layer, part in zip(self.layers, parts, strict=True)}

    def key(self, source: Source, indices: np.ndarray) -> dict[str, Any]:
        """All that features depend on but the layer."""
        kernels = sorted({module.backend for module in self.model.modules() if isinstance(module, Attention)})
        return {
            **self.identity(),
            "data": source.fingerprint(),
            "indices": hashlib.sha256(np.ascontiguousarray(indices, dtype=np.int64).tobytes()).hexdigest(),
            "pixels": [TRANSFORM_VERSION, PIL.__version__],
            "arithmetic": [self.precision, self.device.type, kernels, torch.__version__, timm.__version__],
            **({"pools": self.pools} if isinstance(self.model, Eva) or self._quarters else {}),  # older: one of Eva's
        }


def read_splits(
    extract: Callable[[Source, np.ndarray], tuple[Any, np.ndarray]], labelled: Labelled
) -> tuple[Side, Side, Side | None, Int64[np.ndarray, " n"] | None]:
    """Extracts features (n, d), or tokens, and labels (n,) of training and test images, of validation images if there
    are, and gives the groups of the training images, where they have any."""

    def read(source: Source, labels: np.ndarray) -> tuple[Side, np.ndarray]:
        features, decoded = extract(source, np.flatnonzero(labels >= 0))
        return (features, labelled.truth(labels[decoded])), decoded

    train, decoded = read(labelled.train, labelled.train_labels)
    test, _ = read(labelled.test, labelled.test_labels)
    groups = None if labelled.train_groups is None else labelled.train_groups[decoded]
    if labelled.val is None or labelled.val_labels is None:
        return train, test, None, groups
    return train, test, read(labelled.val, labelled.val_labels)[0], groups
