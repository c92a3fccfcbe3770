"""Features of a frozen encoder: batches of images in, one float32 row per image out."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from mpp import dist
from mpp.data.loader import sequential
from mpp.data.reader import Batch, Transform
from mpp.data.settings import Reading
from mpp.data.sources.base import Source
from mpp.errors import RunError, UserError
from mpp.model.choice import EVALUATION_BATCH


def pool(
    tokens: Float[Tensor, "b tokens d"], num_prefix_tokens: int, how: Literal["mean", "token"]
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


def check_patches(model: nn.Module, image_hw: tuple[int, int], setting: str) -> None:
    """Refuses an input size of which a ViT would not see the last rows or columns.

    Raises:
        UserError: naming `setting` and the sizes beside it.
    """
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed):  # the stem of a hybrid pads
        return
    sides: Any = embed.patch_size
    for size, patch in zip(image_hw, sides, strict=True):
        if size % patch:
            low = size // patch * patch
            near = f"{low} or {low + patch}" if low else f"{patch}"
            raise UserError(f"{setting} {size} is not a multiple of the patch size {patch}; take {near}")


def extract_features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device | str
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Runs the batches through `encode`, without gradients, and collects the features of all images.

    Args:
        encode: uint8 (B, C, h, w) on the device -> float of any type (B, d).
        batches: `images` uint8 (B, C, h, w) and `index` int64 (B,); images that did not decode are not in it, so that
            a batch may be empty.
        device: where `encode` runs.

    Returns:
        Features and the `index` of each row, in the order of the batches; (0, 0) and (0,) where there is no image at
        all, as on a rank that has none to read.

    Raises:
        ValueError: features that are not one row per image.
    """
    device = torch.device(device)
    rows: list[Tensor] = []
    index: list[Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            images = batch["images"]
            if not len(images):
                continue
            encoded = encode(images.to(device, non_blocking=True))
            if encoded.ndim != 2 or len(encoded) != len(images):
                raise ValueError(f"encode must return ({len(images)}, d) features, got {tuple(encoded.shape)}")
            # The copy back lands in pinned memory and is not waited for, so that the device never idles. Also on the
            # CPU it is a copy: one token of each image, as a view, would keep all of them.
            rows.append(encoded.float().to("cpu", non_blocking=True, copy=True))
            index.append(batch["index"].clone())
        if not rows:
            return np.empty((0, 0), dtype=np.float32), np.empty(0, dtype=np.int64)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return torch.cat(rows).numpy(), torch.cat(index).numpy()


def extract_by_all(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    indices: Int64[np.ndarray, " n"],
    transform: Transform,
    reading: Reading,
    device: torch.device,
    *,
    workers: int,
    batch_size: int = EVALUATION_BATCH,
) -> tuple[Float32[np.ndarray, "m d"], Int64[np.ndarray, " m"]]:
    """Features of these images, read by all ranks together, and their indices, ascending, on every rank.

    Images that cannot be decoded are left out.

    Raises:
        RunError: where that leaves none.
    """
    rank, size = dist.rank_and_size()
    mine = indices[rank::size]
    cuda = device.type == "cuda"
    batches = sequential(source, transform, reading, mine, batch_size=batch_size, workers=workers, pin_memory=cuda)
    found = [part for part in dist.gather(extract_features(encode, batches, device)) if len(part[1])]
    if not found:
        raise RunError(f"none of the {len(indices)} images of {source.name} that are needed could be decoded")
    features, kept = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(kept)
    return features[order], kept[order]
