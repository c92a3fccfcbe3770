"""Features of a frozen encoder: batches of images in, one float32 row per image out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor


def pool(
    tokens: Float[Tensor, "b p+n d"], num_prefix_tokens: int, how: Literal["mean", "token"]
) -> Float[Tensor, "b d"]:
    """One vector per image from all its tokens, the `num_prefix_tokens` before the patches included.

    mean averages the patch tokens: masked patch prediction never trains the [class] token, which token takes.

    Raises:
        ValueError: how="token" where there is none, or an unknown `how`.
    """
    if how == "mean":
        return tokens[:, num_prefix_tokens:].mean(dim=1)
    if how == "token":
        if num_prefix_tokens < 1:
            raise ValueError("pool=token needs a class token, which this encoder has not: take pool=mean")
        return tokens[:, 0]
    raise ValueError(f"pool is mean or token, got {how!r}")


def extract_features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Tensor]], device: torch.device | str
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Runs the batches through `encode`, without gradients, and collects the features of all images.

    Args:
        encode: uint8 (B, C, h, w) on the device -> float of any type (B, d).
        batches: `images` uint8 (B, C, h, w) and `index` int64 (B,); images that did not decode are not in it.
        device: where `encode` runs.

    Returns:
        Features and the `index` of each row, in the order of the batches.

    Raises:
        ValueError: no batches, or features that are not one row per image.
    """
    device = torch.device(device)
    rows: list[Tensor] = []
    index: list[Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            images = batch["images"]
            encoded = encode(images.to(device, non_blocking=True))
            if encoded.ndim != 2 or len(encoded) != len(images):
                raise ValueError(f"encode must return ({len(images)}, d) features, got {tuple(encoded.shape)}")
            # The copy back lands in pinned memory and is not waited for, so that the device never idles.
            rows.append(encoded.float().to("cpu", non_blocking=True))
            index.append(batch["index"].clone())
        if not rows:
            raise ValueError("no batches to extract features from")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return torch.cat(rows).numpy(), torch.cat(index).numpy()
