"""From decoded pixels to the model's input size: random for training, fixed for evaluation. All in uint8."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.decoding.decode import Picture, open_picture
from mpp.data.settings import DataConfig, Framing, Reading
from mpp.data.small import crop_and_resize, fits
from mpp.errors import UserError
from mpp.system.process import global_draws

from torchvision.transforms import v2  # isort: skip
from torchvision.transforms.v2 import functional as F  # isort: skip

TRANSFORM_VERSION = 3
"""Raise it when `decode`, `region`, `EvalTransform` or `normalise` give other pixels for the same file: by it features
and decoded pixels are kept."""
_TRIES = 10
_LONGEST = 16.0
"""Evaluation cuts images more elongated than this (relative to the target) before it resizes them."""


class TrainTransform:
    """Random resized crop, flips, colour jitter and greyscale, as the given draws decide.

    Args:
        config: what to do and how often.
        image_hw: height and width of the result.
        channels: of the images.

    Raises:
        UserError: saturation, hue or greyscale for images that do not have 3 channels.
    """

    def __init__(self, config: DataConfig, image_hw: tuple[int, int], channels: int) -> None:
        brightness, contrast, saturation, hue = config.jitter
        for key, value in (("jitter's saturation", saturation), ("jitter's hue", hue), ("grayscale", config.grayscale)):
            if value and channels != 3:
                raise UserError(f"data.{key} needs 3 channels, the images have {channels}: set it to 0, got {value}")
        self.config, self.image_hw, self.channels = config, image_hw, channels
        self.draws = 3 + 2 + 2 * _TRIES + 1
        jitter = v2.ColorJitter(brightness, contrast, saturation, hue)
        self._jitter = jitter if any(config.jitter) else None

    def __call__(self, image: Picture | np.ndarray, draws: Sequence[float]) -> Tensor:
        """A picture of any size to uint8 (C, h, w), by `self.draws` uniform numbers in [0, 1).

        Raises:
            BadImage: pixels that cannot be decoded.
        """
        image = as_picture(image)
        return self.finished(resize(image.region(*self.box(image, draws), self.image_hw), self.image_hw), draws)

    def finished(self, out: Tensor, draws: Sequence[float]) -> Tensor:
        """Flips and colours of a crop that has its final size: uint8 (C, h, w) on any device."""
        config = self.config
        hflip, vflip, grey, *_, jitter = draws
        flipped = [axis for axis, draw, share in ((2, hflip, config.hflip), (1, vflip, config.vflip)) if draw < share]
        if flipped:
            out = out.flip(flipped)
        if self._jitter is not None:
            with global_draws(int(jitter * 2**53)):
                out = self._jittered(out, self._jitter)
        if grey < config.grayscale:
            out = F.rgb_to_grayscale(out, num_output_channels=3)
        return out

    def block(self, images: np.ndarray, draws: np.ndarray) -> Tensor | None:
        """Many images of one size at once; None where one after the other is to be preferred.

        Where both can be, they give the same crops, and pixels that differ by rounding.

        Args:
            images: uint8 (B, H, W, C).
            draws: float64 (B, self.draws).

        Returns:
            uint8 (B, C, h, w).
        """
        config, (height, width) = self.config, images.shape[1:3]
        if self._jitter is not None or config.grayscale or not fits((height, width), self.image_hw):
            return None
        boxes = np.array([self.crop(height, width, row) for row in draws.tolist()])
        hflip, vflip = draws[:, 0] < config.hflip, draws[:, 1] < config.vflip
        return crop_and_resize(images, boxes, hflip, vflip, self.image_hw)

    def box(self, image: Picture, draws: Sequence[float]) -> tuple[int, int, int, int]:
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

    def crop(self, height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
        """The crop: top, left, height, width. As torchvision's RandomResizedCrop, but see `crop_ratio`."""
        target = self.image_hw[1] / self.image_hw[0]
        place_y, place_x, *pairs = draws[3 : 5 + 2 * _TRIES]
        low, high = (math.log(ratio) for ratio in self.config.crop_ratio)
        smallest, largest = self.config.crop_scale
        if smallest == largest == 1:
            return _central(height, width, target, target)
        for u, v in zip(pairs[::2], pairs[1::2], strict=True):
            area = height * width * (smallest + u * (largest - smallest))
            ratio = target * math.exp(low + v * (high - low))
            crop_h, crop_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_h <= height and 0 < crop_w <= width:
                return int(place_y * (height - crop_h + 1)), int(place_x * (width - crop_w + 1)), crop_h, crop_w
        return _central(height, width, target * math.exp(low), target * math.exp(high))

    @staticmethod
    def _jittered(image: Tensor, jitter: v2.ColorJitter) -> Tensor:
        """v2.ColorJitter, which would refuse the contrast of images that have neither 1 nor 3 channels."""
        if image.shape[0] in (1, 3):
            return jitter(image)
        draws = jitter.make_params([])
        for step in draws["fn_idx"].tolist():
            if step == 0 and draws["brightness_factor"] is not None:
                image = (image * draws["brightness_factor"]).clamp(0, 255).to(torch.uint8)
            elif step == 1 and draws["contrast_factor"] is not None:
                mean = image.float().mean()
                image = (mean + draws["contrast_factor"] * (image - mean)).clamp(0, 255).to(torch.uint8)
        return image


_WHOLE = Framing()


class EvalTransform:
    """Resizes, by default until the target just fits, and takes the centre, as timm does it. Nothing is random.

    Args:
        image_hw: height and width of the result.
        framing: what is resized to what, and how.
    """

    def __init__(self, image_hw: tuple[int, int], framing: Framing = _WHOLE) -> None:
        self.image_hw, self.framing, self.draws = image_hw, framing, 0
        self._scaled_hw = math.floor(image_hw[0] / framing.crop_pct), math.floor(image_hw[1] / framing.crop_pct)

    def __call__(self, image: Picture | np.ndarray, draws: Sequence[float] = ()) -> Tensor:
        """A picture of any size to uint8 (C, h, w).

        Raises:
            BadImage: pixels that cannot be decoded.
        """
        image = as_picture(image)
        box = 0, 0, image.height, image.width
        if self.framing.crop_mode == "center":
            # A line of 1 x 10,000 pixels would grow to gigabytes, nearly all of them cropped away.
            target = self.image_hw[1] / self.image_hw[0]
            box = _central(image.height, image.width, target / _LONGEST, target * _LONGEST)
        out = resize(image.region(*box), self._resized(*box[2:]), self.framing.interpolation)
        return self._centre(out)

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


def as_picture(image: Picture | np.ndarray) -> Picture:
    """The picture itself, or an array (H, W) or (H, W, C) as one of its own channels."""
    if not isinstance(image, np.ndarray):
        return image
    return open_picture(image, Reading(image.shape[2] if image.ndim == 3 else 1))


def _central(height: int, width: int, narrowest: float, widest: float) -> tuple[int, int, int, int]:
    """The largest central box whose width / height lies between the two: top, left, height, width."""
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
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)  # a copy: it may be a view of what is kept
    if tuple(image.shape[:2]) == tuple(size):
        return pixels
    if interpolation not in ("bicubic", "bilinear"):  # rare, and not in torch
        how = Image.Resampling[interpolation.upper()]
        planes = [
            Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), how) for plane in pixels.numpy()
        ]
        return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    return torch.nn.functional.interpolate(pixels[None], size=size, mode=interpolation, antialias=True)[0]


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std.

    Args:
        images: uint8 (B, C, H, W) on any device.
        mean: 1 or C numbers on a 0 to 1 scale.
        std: likewise.

    Returns:
        float32 (B, C, H, W) on the same device.

    Raises:
        ValueError: another number of numbers.
    """
    return _on_device(mean, std, images.shape[1], images.device)(images)


class Normalise(nn.Module):
    """`normalise` as part of a model, with which it is compiled. Its numbers lie on the model's device, unsaved.

    Raises:
        ValueError: numbers for another number of `channels`.
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


@lru_cache(maxsize=16)  # else every batch would wait for a copy to the device
def _on_device(mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: torch.device) -> Normalise:
    return Normalise(mean, std, channels).to(device)
