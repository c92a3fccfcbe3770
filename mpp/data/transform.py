"""From decoded pixels to the model's input size: random for training, fixed for evaluation. All in uint8."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.batch_resize import crop_and_resize, is_small
from mpp.data.decoding import Picture, open_picture
from mpp.data.settings import DataConfig, DecodeOptions, Framing
from mpp.data.sources.from_python import as_image
from mpp.errors import UserError
from mpp.system.process import global_draws

from torchvision.transforms import v2  # isort: skip

TRANSFORM_VERSION = 3
"""Raise it when decoding, `EvalTransform` or `normalise` give other pixels for the same file: cached features and
decoded pixels depend on it."""
_TRIES = 10
_LONGEST = 16.0  # evaluation cuts images more elongated than this (relative to the target) before it resizes them
Box = tuple[int, int, int, int]  # top, left, height, width


class Transform:
    """Brings images to the size `image_hw`, each by as many random numbers as `draws` says."""

    def __init__(self, image_hw: tuple[int, int], draws: int) -> None:
        self.image_hw, self.draws = image_hw, draws

    def __call__(self, image: Picture | np.ndarray, draws: Sequence[float] = ()) -> Tensor:
        """A picture, or array (H, W) or (H, W, C), to uint8 (C, h, w); draws uniform in [0, 1). Raises BadImage."""
        raise NotImplementedError

    def takes_blocks(self, height: int, width: int) -> bool:
        """Whether training transforms images of this size together, by `block`."""
        return False

    def block(self, images: np.ndarray, draws: np.ndarray, sizes: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Many images at once: uint8 (B, H, W, C) by float64 (B, self.draws) to uint8 (B, C, h, w).

        With `sizes` each image has a height and width of its own, and zeros below and to the right of it. An image
        becomes the same bits in any block; one by one, its crop is the same and its pixels differ by rounding.
        """
        raise NotImplementedError


class TrainTransform(Transform):
    """Random resized crop, flips, colour jitter and greyscale, as the given draws decide.

    Raises UserError for saturation, hue or greyscale of images that do not have 3 channels.
    """

    def __init__(self, config: DataConfig, image_hw: tuple[int, int], channels: int) -> None:
        super().__init__(image_hw, 3 + 2 + 2 * _TRIES + 1)
        brightness, contrast, saturation, hue = config.jitter
        for key, value in (("jitter's saturation", saturation), ("jitter's hue", hue), ("grayscale", config.grayscale)):
            if value and channels != 3:
                raise UserError(f"data.{key} needs 3 channels, the images have {channels}: set it to 0, got {value}")
        self.config, self.channels = config, channels
        self._jitter = v2.ColorJitter(brightness, contrast, saturation, hue) if any(config.jitter) else None

    def __call__(self, image: Picture | np.ndarray, draws: Sequence[float] = ()) -> Tensor:
        image = _as_picture(image)
        return self.finished(resize(image.region(*self.box(image, draws), self.image_hw), self.image_hw), draws)

    def takes_blocks(self, height: int, width: int) -> bool:
        """Small images without changes of colour; the size alone decides, so that a file has the same bits anywhere."""
        return self._jitter is None and not self.config.grayscale and is_small((height, width), self.image_hw)

    def block(self, images: np.ndarray, draws: np.ndarray, sizes: Sequence[tuple[int, ...]] = ()) -> Tensor:
        config, each = self.config, sizes or [images.shape[1:3]] * len(images)
        boxes = np.array([self.crop(size[0], size[1], row) for size, row in zip(each, draws.tolist(), strict=True)])
        hflip, vflip = draws[:, 0] < config.hflip, draws[:, 1] < config.vflip
        return crop_and_resize(images, boxes, hflip, vflip, self.image_hw)

    def finished(self, out: Tensor, draws: Sequence[float]) -> Tensor:
        """Flips and colours of a crop that has its final size: uint8 (C, h, w) on any device."""
        hflip, vflip, grey, *_, jitter = draws
        axes = [axis for axis, flip in ((2, hflip < self.config.hflip), (1, vflip < self.config.vflip)) if flip]
        if axes:
            out = out.flip(axes)
        if self._jitter is not None:
            with global_draws(int(jitter * 2**53)):
                out = _jittered(out, self._jitter)
        return v2.functional.rgb_to_grayscale(out, num_output_channels=3) if grey < self.config.grayscale else out

    def box(self, image: Picture, draws: Sequence[float]) -> Box:
        """As `crop`; where the image can be scaled down while it is decoded, with edges at multiples of the step."""
        box = self.crop(image.height, image.width, draws)
        step = image.step(box[2], box[3], self.image_hw)
        if step == 1:
            return box
        height, width = (side // step * step for side in box[2:])
        # To the nearest: rounding down would move all crops up and left by a third of a pixel.
        top, left = (
            min(round(start / step) * step, whole // step * step - side)
            for start, whole, side in zip(box[:2], (image.height, image.width), (height, width), strict=True)
        )
        return top, left, height, width

    def crop(self, height: int, width: int, draws: Sequence[float]) -> Box:
        """Draws the crop, as torchvision's RandomResizedCrop, but with ratios relative to the target's."""
        target = self.image_hw[1] / self.image_hw[0]
        at_y, at_x, *pairs = draws[3 : 5 + 2 * _TRIES]
        low, high = (math.log(ratio) for ratio in self.config.crop_ratio)
        smallest, largest = self.config.crop_scale
        if smallest == largest == 1:
            return _central(height, width, target, target)
        for u, v in zip(pairs[::2], pairs[1::2], strict=True):
            area = height * width * (smallest + u * (largest - smallest))
            ratio = target * math.exp(low + v * (high - low))
            crop_h, crop_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_h <= height and 0 < crop_w <= width:
                return int(at_y * (height - crop_h + 1)), int(at_x * (width - crop_w + 1)), crop_h, crop_w
        return _central(height, width, target * math.exp(low), target * math.exp(high))


def _jittered(image: Tensor, jitter: v2.ColorJitter) -> Tensor:
    """v2.ColorJitter, which would refuse the contrast of images that have neither 1 nor 3 channels."""
    if image.shape[0] in (1, 3):
        return jitter(image)
    drawn = jitter.make_params([])
    for step in drawn["fn_idx"].tolist():
        if step == 0 and drawn["brightness_factor"] is not None:
            image = (image * drawn["brightness_factor"]).clamp(0, 255).to(torch.uint8)
        elif step == 1 and drawn["contrast_factor"] is not None:
            mean = image.float().mean()
            image = (mean + drawn["contrast_factor"] * (image - mean)).clamp(0, 255).to(torch.uint8)
    return image


class EvalTransform(Transform):
    """Resizes, by default until the target just fits, and takes the centre, as timm does it. Nothing is random."""

    def __init__(self, image_hw: tuple[int, int], framing: Framing = Framing()) -> None:  # noqa: B008 (frozen)
        super().__init__(image_hw, 0)
        self.framing = framing
        self._scaled_hw = math.floor(image_hw[0] / framing.crop_pct), math.floor(image_hw[1] / framing.crop_pct)

    def __call__(self, image: Picture | np.ndarray, draws: Sequence[float] = ()) -> Tensor:
        image = _as_picture(image)
        box = 0, 0, image.height, image.width
        if self.framing.crop_mode == "center":
            # A line of 1 x 10,000 pixels would grow to gigabytes, nearly all of them cropped away.
            target = self.image_hw[1] / self.image_hw[0]
            box = _central(image.height, image.width, target / _LONGEST, target * _LONGEST)
        return self._centre(resize(image.region(*box), self._resized(*box[2:]), self.framing.interpolation))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to; rounded as timm and torchvision do."""
        scaled_h, scaled_w = self._scaled_hw
        if self.framing.crop_mode == "squash":
            return self._scaled_hw
        if self.framing.crop_mode == "center" and scaled_h == scaled_w:
            longer = int(scaled_h * max(height, width) / min(height, width))
            return (scaled_h, longer) if height <= width else (longer, scaled_h)
        ratios = height / scaled_h, width / scaled_w
        ratio = max(ratios) if self.framing.crop_mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _centre(self, image: Tensor) -> Tensor:
        """The middle of uint8 (C, H, W), filled up where it is smaller than the target."""
        (height, width), (target_h, target_w) = image.shape[1:], self.image_hw
        if height < target_h or width < target_w:
            top, left = max(0, target_h - height) // 2, max(0, target_w - width) // 2
            fill = torch.tensor(self.framing.fill, dtype=torch.uint8).view(-1, 1, 1)
            filled = fill.repeat(len(image) // len(fill), max(height, target_h), max(width, target_w))
            filled[:, top : top + height, left : left + width] = image
            image = filled
        top, left = (round((side - target) / 2) for side, target in zip(image.shape[1:], self.image_hw, strict=True))
        return image[:, top : top + target_h, left : left + target_w].contiguous()


class ImageTransform:
    """What a model is evaluated on: an image, as `as_image` takes it, to float32 (C, H, W), normalised.

    Raises BadImage for an image that cannot be used, OSError for a file that cannot be read.
    """

    def __init__(
        self,
        image_hw: tuple[int, int],
        framing: Framing,
        reading: DecodeOptions,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.frame, self.reading, self.mean, self.std = EvalTransform(image_hw, framing), reading, mean, std

    def __call__(self, image: Any) -> Tensor:
        pixels = self.frame(open_picture(as_image(image), self.reading))
        return normalise(pixels[None], self.mean, self.std)[0]


def _as_picture(image: Picture | np.ndarray) -> Picture:
    if not isinstance(image, np.ndarray):
        return image
    return open_picture(image, DecodeOptions(image.shape[2] if image.ndim == 3 else 1))


def _central(height: int, width: int, narrowest: float, widest: float) -> Box:
    """The largest central box whose width / height lies between the two."""
    crop_h, crop_w = height, width
    if width / height > widest:
        crop_w = min(width, max(1, round(height * widest)))
    elif width / height < narrowest:
        crop_h = min(height, max(1, round(width / narrowest)))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def resize(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """With antialiasing, as Pillow's: uint8 (H, W, C) array, also a view, to uint8 (C, h, w) tensor.

    The tensor that torch gets is channels-last, for which it has a faster kernel (x 1.8 on AVX2).
    """
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)  # a copy: it may be a view of the cache
    if tuple(image.shape[:2]) == tuple(size):
        return pixels
    if interpolation not in ("bicubic", "bilinear"):  # rare, and not in torch
        how = Image.Resampling[interpolation.upper()]
        planes = [
            Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), how) for plane in pixels.numpy()
        ]
        return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    return torch.nn.functional.interpolate(pixels[None], size=size, mode=interpolation, antialias=True)[0]


class Normalise(nn.Module):
    """(x / 255 - mean) / std, as part of a model, with which it is compiled; nothing of it is saved.

    Mean and std are 1 or `channels` numbers on a 0 to 1 scale; ValueError for any other number of them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
        super().__init__()
        for key, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"data.{key} has {len(values)} numbers; images of {channels} channels take 1 or {channels}"
                )
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 of that shape."""
        return (images.float() / 255 - self.mean) / self.std


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """See `Normalise`: uint8 (B, C, H, W) on any device to float32 there."""
    return _normaliser(mean, std, images.shape[1], images.device)(images)


@lru_cache(maxsize=16)  # else every batch would wait for a copy to the device
def _normaliser(mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: torch.device) -> Normalise:
    return Normalise(mean, std, channels).to(device)
