"""Models opened to be inspected, the images for that, and arrays as pictures.

model = inspect(open_weights(spec), device)     any timm VisionTransformer, hybrids included
twin  = inspect(weights.untrained(), device)    the same architecture, randomly initialised, to stand beside it
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import mpp.system.timm_import  # noqa: F401

# isort: split
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mpp.data.loader import sequential
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream.features import EVALUATION_BATCH
from mpp.errors import RunError, UserError
from mpp.model.encoder import Encoder
from mpp.report.page import Picture, Sheet
from mpp.report.wording import UNTRAINED
from mpp.system.process import global_draws
from mpp.weights.base import Weights, build

BATCH = 32
"""Images that go through a model together."""

ImageBatch = UInt8[Tensor, "batch channels height width"]
RGB = UInt8[np.ndarray, "height width 3"]
Tiles = UInt8[np.ndarray, "n height width 3"]


@dataclass(frozen=True, eq=False)
class Inspected:
    """An encoder in evaluation mode, in float32."""

    encoder: Encoder
    """Around timm's model; its `image_hw` is the size of the images to give."""
    weights: Weights
    """What it was built of."""
    pool: Literal["mean", "token"]
    """How it represents an image: by its class token or by the mean of the patch tokens."""
    device: torch.device

    def pixels(self, images: ImageBatch) -> Float[Tensor, "batch channels height width"]:
        """Moves images to the encoder's device and normalises them."""
        return normalise(images.to(self.device), self.weights.mean, self.weights.std)

    @torch.inference_mode()
    def tokens(self, images: ImageBatch) -> Float[Tensor, "batch patches dim"]:
        """Patch tokens after the last norm, rows first; a norm that comes after the pooling is applied to each."""
        tokens = self.encoder(self.pixels(images))[:, self.encoder.num_prefix_tokens :]
        return self.encoder.vit.fc_norm(tokens)

    @torch.inference_mode()
    def features(self, images: ImageBatch) -> Float[Tensor, "batch dim"]:
        """One row an image, pooled by `pool` and normalised where the model does so."""
        tokens = self.encoder(self.pixels(images))
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return self.encoder.vit.fc_norm(tokens[:, 0].clone() if self.pool == "token" else patches.mean(dim=1))


def inspect(
    weights: Weights, device: torch.device | str, image_hw: tuple[int, int] | None = None, seed: int = 0
) -> Inspected:
    """Builds the encoder of these weights without its head; weights without state are initialised by the seed.

    `image_hw` is another input size, for which position embeddings are resampled. Where the patches do not tile the
    size (27 of 14 pixels on 384), the encoder is made for the size that they do tile, with as many patches. torch's
    global generator is left as it is.

    Raises:
        UserError: a model that is not a VisionTransformer; what `build` refuses.
    """

    def built(size: tuple[int, int]) -> VisionTransformer:
        with global_draws(seed):
            vit = build(weights, classes=(), image_hw=size, device=torch.device(device))
        if not isinstance(vit, VisionTransformer):
            raise UserError(
                f"{weights.origin or weights.name} is timm's {type(vit).__name__}, and only its VisionTransformer can "
                "be looked at inside; take one, such as vit_base_patch16_224"
            )
        return vit

    vit = built(image_hw or weights.image_hw)
    embed: Any = vit.patch_embed
    if not hasattr(embed, "backbone"):  # the stem of a hybrid pads
        tiled = embed.grid_size[0] * embed.patch_size[0], embed.grid_size[1] * embed.patch_size[1]
        vit = vit if tiled == tuple(embed.img_size) else built(tiled)
    pool: Literal["mean", "token"] = "token" if vit.global_pool == "token" else "mean"
    return Inspected(Encoder(vit).eval(), weights, pool, torch.device(device))


class Images(NamedTuple):
    """Images of a source, in the size that a model takes; their labels, -1 where there is none."""

    pixels: ImageBatch
    labels: Int64[np.ndarray, " m"]
    classes: tuple[str, ...] | None
    """Names by label; None: unlabelled."""
    source: str
    """One line about the source."""


def draw_images(
    source: Source, number: int, transform: EvalTransform, reading: DecodeOptions, seed: int, workers: int
) -> Images:
    """Draws `number` images of the source, or all where there are fewer; bad ones are left out.

    Raises:
        RunError: none can be decoded.
    """
    indices = np.random.default_rng(seed).choice(len(source), min(number, len(source)), replace=False)
    batches = sequential(source, transform, reading, indices, batch_size=EVALUATION_BATCH, workers=workers)
    parts = [(batch["images"], batch["label"]) for batch in batches if len(batch["images"])]
    if not parts:
        raise RunError(f"none of {len(indices)} images of {source.name} could be decoded")
    labels = torch.cat([label for _, label in parts]).numpy()
    return Images(torch.cat([images for images, _ in parts]), labels, source.classes, source.describe())


@dataclass(frozen=True, eq=False)
class InspectionContext:
    """A model and all that its sections are made from."""

    name: str
    """Of the model on the page, such as "pretrained"."""
    model: Inspected
    twin: Inspected | None
    """The same architecture untrained, or what a run went on from; None where there is neither."""
    images: Images
    """To measure with."""
    labelled: Images
    """For measures that need labels; the same images where those have labels."""
    shown: int
    """Number of images that are drawn."""
    patch: tuple[int, int]
    """Row and column of the patch whose attention is drawn."""
    twin_name: str = UNTRAINED

    @property
    def models(self) -> list[tuple[str, Inspected]]:
        """The model, and its twin if it has one, by name."""
        return [(self.name, self.model), *([(self.twin_name, self.twin)] if self.twin else [])]

    @property
    def drawn(self) -> UInt8[Tensor, "shown channels height width"]:
        """The images that are drawn."""
        return self.images.pixels[: self.shown]

    @cached_property
    def features(self) -> list[tuple[str, Float[np.ndarray, "m dim"]]]:
        """Pooled features of the labelled images, by model."""
        parts = self.labelled.pixels.split(BATCH)
        pooled = ((name, [model.features(part).cpu() for part in parts]) for name, model in self.models)
        return [(name, torch.cat(each).numpy()) for name, each in pooled]


def sheets_by_model(
    prefix: str,
    images: Sequence[np.ndarray],
    models: Sequence[tuple[str, Sequence[np.ndarray]]],
    alt: str,
    pixelated: bool = False,
) -> tuple[Sheet, ...]:
    """Sheets with each image in a row with a picture of it by each model.

    `alt` follows "Image 3" and has {} for the name of the model; `prefix` begins the pictures' names.
    """
    rows = []
    for i, image in enumerate(images):
        cells = [Picture(f"{prefix}_{i}", f"Image {i + 1}.", image)]
        for j, (name, drawn) in enumerate(models):
            words = f"Image {i + 1}{alt.format(name)}."
            cells.append(Picture(f"{prefix}_{i}_{j}", words, drawn[i], pixelated=pixelated))
        rows.append(tuple(cells))
    return two_sheets(("image", *(name for name, _ in models)), rows, 136)


def two_sheets(columns: tuple[str, ...], rows: Sequence[tuple[Picture, ...]], tile: int) -> tuple[Sheet, ...]:
    """The rows as two sheets that stand beside each other where there is room; as one where they are few."""
    half = -(-len(rows) // 2) if len(rows) > 3 else len(rows)
    return tuple(Sheet(columns, tuple(part), tile=tile) for part in (rows[:half], rows[half:]) if part)


def heat(values: Float[np.ndarray, "..."], low: float) -> UInt8[np.ndarray, "... 3"]:
    """Values from `low` to 1 as the colours of viridis, dark to bright."""
    from matplotlib import colormaps

    colours = colormaps["viridis"]((np.asarray(values, dtype=np.float64) - low) / (1 - low))
    return (255 * colours[..., :3]).round().astype(np.uint8)


def tiled(tiles: Tiles, columns: int, gap: int = 1) -> UInt8[np.ndarray, "rows columns 4"]:
    """Tiles in rows of `columns`, with transparent gaps between them."""
    n, height, width, _ = tiles.shape
    sheet = np.zeros((math.ceil(n / columns), height + gap, columns, width + gap, 4), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        sheet[number // columns, :height, number % columns, :width] = np.dstack([tile, np.full((height, width), 255)])
    return sheet.reshape(sheet.shape[0] * (height + gap), -1, 4)[:-gap, :-gap]


def enlarged(picture: RGB, smallest: int = 112) -> UInt8[np.ndarray, "larger_height larger_width 3"]:
    """A small picture enlarged by a whole number, so that what is drawn over it is visible."""
    times = -(-smallest // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def lit(image: RGB, share: Float[np.ndarray, "rows columns"], dark: float = 0.15) -> RGB:
    """The image as bright as each patch's share is of the largest, never darker than `dark` (figure 6)."""
    scaled = torch.from_numpy(np.ascontiguousarray(share, dtype=np.float32))[None, None]
    scaled = scaled / scaled.amax().clamp(min=1e-12)
    smooth = F.interpolate(scaled, size=image.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    return (image * (dark + (1 - dark) * smooth)[..., None]).round().astype(np.uint8)


def framed(image: RGB, row: int, column: int, patch: tuple[int, int]) -> RGB:
    """The image with a frame around one patch, black within white, visible on any colour."""
    out, thick = image.copy(), max(1, round(min(image.shape[:2]) / 112))
    top, left = row * patch[0], column * patch[1]
    for colour, wide in ((255, 2 * thick), (0, thick)):
        out[max(top - wide, 0) : top + patch[0] + wide, max(left - wide, 0) : left + patch[1] + wide] = colour
    inside = slice(top, top + patch[0]), slice(left, left + patch[1])
    out[inside] = image[inside]
    return out
