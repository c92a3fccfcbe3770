"""A frozen encoder as a source of features: any weights, any layers, pooled in every way that it allows.

images -> one forward pass -> the layers asked for -> mean of the patch tokens | class token of each

Features are cached on disk by a hash of all that they depend on: weights, architecture, layer, data, input size,
normalisation, how images become pixels, arithmetic.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import numpy as np
import PIL
import timm
import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mpp.data.sources.base import Source
from mpp.data.sources.fingerprint import fingerprint
from mpp.data.transform import TRANSFORM_VERSION, EvalTransform, normalise
from mpp.downstream.cache import FeatureCache, Features, weights_hash
from mpp.downstream.features import EVALUATION_BATCH, check_patches, extract_by_all, pool
from mpp.downstream.fewshot import Extract
from mpp.errors import UserError
from mpp.model.attention import Attention
from mpp.model.choice import settle_kernel, task_of
from mpp.system.process import global_draws
from mpp.training.parallel import DTYPES, autocast
from mpp.weights.base import Weights, build


class Frozen:
    """An encoder in evaluation mode, its head dropped.

    Args:
        weights: which; fresh ones are drawn from `seed`.
        layers: whose outputs are read, from 0 or from the end (-1), or the word all; of ViTs blocks, of others stages.
            The last layer is read after the encoder's last norm, the others as they are.
        image_hw: another input size than the weights' own.
        device: where it runs.
        precision: bf16, fp16 or fp32.
        workers: loader processes.
        cache: where features are kept; None: nowhere.
        seed: of fresh weights.

    Attributes:
        depth: how many layers the encoder has.
        layers: those that are read, each once, ascending and counted from the end: -1 is the last.
        pools: what features of one layer there are: mean, and of ViTs with a class token token and mean+token.

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
        cache: FeatureCache | None = None,
        seed: int = 0,
    ) -> None:
        self.weights = weights
        self.image_hw = image_hw or weights.image_hw
        self.device, self.precision, self.workers, self.cache = device, precision, workers, cache
        dtype = DTYPES[precision]
        with global_draws(seed):
            self.model: Any = build(weights, classes=(), image_hw=self.image_hw, device=device, dtype=dtype).eval()
        if image_hw is not None:
            check_patches(self.model, image_hw, "encoder.img_size")
        self.is_vit = isinstance(self.model, VisionTransformer)
        self.depth = self._count_layers()
        self.layers = self._from_the_end(layers)
        self._has_token = self.is_vit and self.model.num_prefix_tokens > 0 and self.model.cls_token is not None
        self.pools: tuple[str, ...] = ("mean", "token", "mean+token") if self._has_token else ("mean",)
        self._attention = ""
        self._memory: list[tuple[Source, np.ndarray, dict[int, Features]]] = []
        self._hash = weights_hash(self.model.state_dict()) if cache is not None else ""

    def _settle_attention(self) -> None:
        """Chooses the attention kernel, once features are asked for: wrong input is refused before."""
        task = task_of(self.model, EVALUATION_BATCH, False, self.device, DTYPES[self.precision])
        self._attention = settle_kernel("auto", self._attention, task, self.model)

    def _count_layers(self) -> int:
        if self.is_vit:
            return len(self.model.blocks)
        if not hasattr(self.model, "forward_intermediates"):
            return 1
        return max(len(getattr(self.model, "feature_info", ()) or ()), 1)

    def _from_the_end(self, layers: Sequence[int | Literal["all"]]) -> tuple[int, ...]:
        numbers = range(self.depth) if "all" in layers else [layer for layer in layers if layer != "all"]
        for layer in numbers:
            if not -self.depth <= layer < self.depth:
                which = f"{self.weights.origin} has layers 0 to {self.depth - 1}, or -{self.depth} to -1"
                raise UserError(f"layer {layer}: {which}")
        return tuple(sorted({layer if layer < 0 else layer - self.depth for layer in numbers}))

    def encode(self, images: Tensor) -> Float[Tensor, "b d"]:
        """uint8 (B, C, h, w) on the device to one row an image: layers, and in each mean and token, side by side."""
        return torch.cat(self._rows(images), dim=1)

    def _rows(self, images: Tensor) -> list[Float[Tensor, "b d"]]:
        """Features of each layer: of ViTs with a class token the mean of the patch tokens and after it that token."""
        pixels = normalise(images, self.weights.mean, self.weights.std)
        with torch.inference_mode(), autocast(self.precision, self.device):
            found = self._pooled_tokens(pixels) if self.is_vit else self._pooled_maps(pixels)
            return [row.float() for row in found]

    def _pooled_tokens(self, pixels: Tensor) -> list[Tensor]:
        prefix = self.model.num_prefix_tokens
        below, last = self._outputs(pixels, return_prefix_tokens=True, output_fmt="NLC")
        # Of patch tokens alone, or of both kinds apart.
        tokens = [torch.cat([of[1], of[0]], dim=1) if isinstance(of, tuple) else of for of in below]
        norms = [torch.nn.Identity()] * len(tokens)
        if last is not None:
            tokens, norms = [*tokens, last], [*norms, self.model.fc_norm]  # of some the last norm, after pooling
        pools: tuple[Literal["mean", "token"], ...] = ("mean", "token") if self._has_token else ("mean",)
        return [
            torch.cat([norm(pool(of.float(), prefix, how)).float() for how in pools], dim=1)
            for of, norm in zip(tokens, norms, strict=True)
        ]

    def _pooled_maps(self, pixels: Tensor) -> list[Tensor]:
        below, last = self._outputs(pixels)
        pooled = [of.float().mean(dim=(2, 3)) for of in below]
        return pooled if last is None else [*pooled, self.model.forward_head(last, pre_logits=True)]

    def _outputs(self, pixels: Tensor, **told: Any) -> tuple[list[Any], Tensor | None]:
        """What timm gives for the layers below the last, and for the last where it is read, from one pass."""
        below = [self.depth + layer for layer in self.layers if layer != -1]
        if not below:
            return [], self.model.forward_features(pixels)
        if self.layers[-1] == -1:
            last, found = self.model.forward_intermediates(pixels, indices=below, stop_early=False, **told)
            return found, last
        told |= {"intermediates_only": True, "stop_early": True}
        return self.model.forward_intermediates(pixels, indices=below, **told), None

    def extract(self, how: str, layer: int = -1) -> Extract:
        """The function that few-shot evaluation and probes read features with.

        Args:
            how: one of `pools`.
            layer: one of `layers`, as they stand there.

        Raises:
            ValueError: another one.
        """
        if how not in self.pools or layer not in self.layers:
            raise ValueError(f"features are {self.pools} of layers {self.layers}, got {how} of {layer}")

        def extract(source: Source, indices: Int64[np.ndarray, " n"]) -> Features:
            features, kept = self._all(source, indices)[layer]
            if how == "mean+token" or not self._has_token:
                return features, kept
            half = features.shape[1] // 2
            return (features[:, :half] if how == "mean" else features[:, half:]), kept

        return extract

    def _all(self, source: Source, indices: Int64[np.ndarray, " n"]) -> dict[int, Features]:
        """Features by layer."""
        for of, which, found in self._memory:
            if of is source and np.array_equal(which, indices):
                return found
        self._settle_attention()  # by its name features are cached, too
        passed = functools.cache(lambda: self._pass(source, indices))  # made at most once, by the first layer to miss
        if self.cache is None:
            found = passed()
        else:
            cache, key = self.cache, self._key(source, indices)
            found = {
                layer: cache.get({**key, "layer": layer}, lambda layer=layer: passed()[layer]) for layer in self.layers
            }
        self._memory.append((source, indices, found))
        return found

    def _pass(self, source: Source, indices: np.ndarray) -> dict[int, Features]:
        """Features by layer, all from one pass over the images."""
        transform, reading = EvalTransform(self.image_hw, self.weights.framing), self.weights.reading
        features, kept = extract_by_all(
            self.encode, source, indices, transform, reading, self.device, workers=self.workers
        )
        # The stages of a network differ in width, and a rank may have had no image of its own to learn them from.
        blank = torch.zeros(1, self.weights.in_chans, *self.image_hw, dtype=torch.uint8, device=self.device)
        ends = np.cumsum([row.shape[1] for row in self._rows(blank)]) if len(self.layers) > 1 else []
        parts = np.split(features, ends[:-1], axis=1)
        return {layer: (part, kept) for layer, part in zip(self.layers, parts, strict=True)}

    def _kernels(self) -> list[str]:
        """Of attention; which one `auto` takes may change with what is installed."""
        return sorted({module.backend for module in self.model.modules() if isinstance(module, Attention)})

    def _key(self, source: Source, indices: np.ndarray) -> dict[str, Any]:
        """All that features depend on but the layer."""
        weights = self.weights
        return {
            "weights": self._hash,
            "architecture": [weights.name, dict(weights.args), weights.pool, asdict(weights.numerics)],
            "input": [
                list(self.image_hw),
                weights.in_chans,
                list(weights.mean),
                list(weights.std),
                asdict(weights.reading),
                asdict(weights.framing),
            ],
            "data": fingerprint(source),
            "indices": hashlib.sha256(np.ascontiguousarray(indices, dtype=np.int64).tobytes()).hexdigest(),
            "pixels": [TRANSFORM_VERSION, PIL.__version__],
            "arithmetic": [self.precision, self.device.type, self._kernels(), torch.__version__, timm.__version__],
        }
