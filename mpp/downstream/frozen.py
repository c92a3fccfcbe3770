"""A frozen encoder as a source of features: any weights, any layer, pooled in every way that it allows.

Features are cached on disk by a hash of all that they depend on: weights, architecture, layer, data, input size,
normalisation, how images become pixels, arithmetic.
"""

import hashlib
from dataclasses import asdict
from typing import Any

import mpp.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import numpy as np
import PIL
import timm
import torch
from jaxtyping import Float, Float32, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mpp.data.transform import TRANSFORM_VERSION, EvalTransform, normalise
from mpp.downstream.cache import FeatureCache, weights_hash
from mpp.downstream.features import check_patches, extract_by_all, pool
from mpp.downstream.fewshot import Extract
from mpp.errors import UserError
from mpp.model.attention import Attention
from mpp.sources.base import Source
from mpp.sources.fingerprint import fingerprint
from mpp.train.parallel import DTYPES, autocast
from mpp.weights.base import Weights, build


class Frozen:
    """An encoder in evaluation mode, its head dropped.

    Args:
        weights: which; fresh ones are drawn from `seed`.
        layer: whose output is read, from 0 or from the end (-1); of ViTs a block, of others a stage. The last layer
            is read after the encoder's last norm, the others as they are.
        image_hw: another input size than the weights' own.
        device: where it runs.
        precision: bf16, fp16 or fp32.
        workers: loader processes.
        cache: where features are kept; None: nowhere.
        seed: of fresh weights.

    Raises:
        UserError: a layer or a size that the encoder has not.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        layer: int = -1,
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
        torch.manual_seed(seed)
        dtype = DTYPES[precision]
        self.model: Any = build(weights, classes=(), image_hw=self.image_hw, device=device, dtype=dtype).eval()
        if image_hw is not None:
            check_patches(self.model, image_hw, "encoder.img_size")
        self.is_vit = isinstance(self.model, VisionTransformer)
        self.layers = len(self.model.blocks) if self.is_vit else len(getattr(self.model, "feature_info", ()) or ())
        if not hasattr(self.model, "forward_intermediates"):
            self.layers = 1
        self.layers = max(self.layers, 1)
        if not -self.layers <= layer < self.layers:
            raise UserError(
                f"encoder.layer {layer}: {weights.origin} has layers 0 to {self.layers - 1}, or -{self.layers} to -1"
            )
        self.layer = layer if layer < 0 else layer - self.layers
        has_token = self.is_vit and self.model.num_prefix_tokens > 0 and self.model.cls_token is not None
        self.pools: tuple[str, ...] = ("mean", "token") if has_token else ("mean",)
        self._memory: list[tuple[Source, np.ndarray, tuple[np.ndarray, np.ndarray]]] = []
        self._hash = weights_hash(self.model.state_dict()) if cache is not None else ""

    def encode(self, images: Tensor) -> Float[Tensor, "b d"]:
        """uint8 (B, C, h, w) on the device to one row an image: all poolings side by side."""
        pixels = normalise(images, self.weights.mean, self.weights.std)
        with torch.inference_mode(), autocast(self.precision, self.device):
            rows = self._tokens(pixels) if self.is_vit else [self._map(pixels)]
        return torch.cat([row.float() for row in rows], dim=1)

    def _tokens(self, pixels: Tensor) -> list[Tensor]:
        prefix = self.model.num_prefix_tokens
        norm = torch.nn.Identity()
        if self.layer == -1:
            tokens, norm = (
                self.model.forward_features(pixels),
                self.model.fc_norm,
            )  # of some the last norm, after pooling
        else:
            told = {"return_prefix_tokens": True, "intermediates_only": True, "output_fmt": "NLC", "stop_early": True}
            found = self.model.forward_intermediates(pixels, indices=[self.layers + self.layer], **told)[0]
            patches, extra = found if isinstance(found, tuple) else (found, found[:, :0])
            tokens = torch.cat([extra, patches], dim=1)
        return [norm(pool(tokens.float(), prefix, how)) for how in self.pools]  # pyright: ignore[reportArgumentType]

    def _map(self, pixels: Tensor) -> Tensor:
        if self.layer == -1:
            return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        indices = [self.layers + self.layer]
        found = self.model.forward_intermediates(pixels, indices=indices, intermediates_only=True)[0]
        return found.float().mean(dim=(2, 3))

    def extract(self, how: str) -> Extract:
        """The function that few-shot evaluation and probes read features pooled by `how` with."""
        part = self.pools.index(how)

        def extract(source: Source, indices: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
            features, kept = self._all(source, indices)
            width = features.shape[1] // len(self.pools)
            return features[:, part * width : (part + 1) * width], kept

        return extract

    def _all(
        self, source: Source, indices: Int64[np.ndarray, " n"]
    ) -> tuple[Float32[np.ndarray, "m d"], Int64[np.ndarray, " m"]]:
        for of, which, found in self._memory:
            if of is source and np.array_equal(which, indices):
                return found
        found = self._cached(source, indices)
        self._memory.append((source, indices, found))
        return found

    def _cached(self, source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        transform, reading = EvalTransform(self.image_hw), self.weights.reading

        def read() -> tuple[np.ndarray, np.ndarray]:
            return extract_by_all(self.encode, source, indices, transform, reading, self.device, workers=self.workers)

        return read() if self.cache is None else self.cache.get(self._key(source, indices), read)

    def _kernels(self) -> list[str]:
        """Of attention; which one `auto` takes may change with what is installed."""
        return sorted({module.backend for module in self.model.modules() if isinstance(module, Attention)})

    def _key(self, source: Source, indices: np.ndarray) -> dict[str, Any]:
        weights = self.weights
        return {
            "weights": self._hash,
            "architecture": [weights.name, dict(weights.args), weights.pool, asdict(weights.numerics)],
            "layer": self.layer,
            "input": [
                list(self.image_hw),
                weights.in_chans,
                list(weights.mean),
                list(weights.std),
                asdict(weights.reading),
            ],
            "data": fingerprint(source),
            "indices": hashlib.sha256(np.ascontiguousarray(indices, dtype=np.int64).tobytes()).hexdigest(),
            "pixels": [TRANSFORM_VERSION, PIL.__version__],
            "arithmetic": [self.precision, self.device.type, self._kernels(), torch.__version__, timm.__version__],
        }
