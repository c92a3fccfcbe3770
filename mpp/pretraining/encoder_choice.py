"""The encoder that model.name and model.img_size auto stand for: by number and size of the images, and the device."""

import math
from dataclasses import replace

import numpy as np

from mpp.data.decoding.bad_image import BadImage
from mpp.data.decoding.formats import open_picture
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.errors import Unreachable
from mpp.model.encoder import named_patch
from mpp.model.settings import ModelConfig
from mpp.training.auto import BEGAN, Choice

_WIDTHS = {"tiny": 192, "small": 384, "base": 768}  # all of 12 blocks
_FROM = {"small": 10_000, "base": 100_000}
_LARGEST, _LARGEST_ON_CPU = 224, 128
_SAMPLE = 32


def choose_encoder(
    model: ModelConfig, images: int, side: int, cpu: bool, before: ModelConfig | None = None
) -> tuple[ModelConfig, tuple[Choice, ...]]:
    """Replaces auto by a name and an input size, with patches that fit where both are auto and none are set.

    `side` is the images' usual shorter side in pixels; `before` the model of the run that goes on, if one does.
    """
    if before is not None:
        changes = {key: getattr(before, key) for key in ("name", "img_size") if getattr(model, key) == "auto"}
        if "img_size" in changes and not model.patch_size:
            changes["patch_size"] = before.patch_size
        names = (f"model.{key}" for key in changes)
        return replace(model, **changes), tuple(
            Choice(name, str(value), BEGAN) for name, value in zip(names, changes.values(), strict=True)
        )
    choices: list[Choice] = []
    if model.img_size == "auto":
        largest = _LARGEST_ON_CPU if cpu else _LARGEST
        pixels = min(side, largest)
        left = model.name == "auto" and not model.patch_size
        patch = model.patch_size
        if not patch:
            patch = (min(2 ** int(math.log2(max(pixels / 7, 1))), 16),) if left else named_patch(model)
        height, width = (max(pixels // each, 1) * each for each in (patch[0], patch[-1]))
        input_size = (height,) if height == width else (height, width)
        because = f"the images are {side} pixels, {largest} are the most {'on a CPU' if cpu else 'for a start'}"
        choices.append(Choice("model.img_size", " ".join(map(str, input_size)), because))
        if left:
            choices.append(Choice("model.patch_size", str(patch[0]), "7 patches a side or more, of 16 pixels at most"))
            model = replace(model, patch_size=patch)
        model = replace(model, img_size=input_size)
    if model.name == "auto":
        size = "tiny" if cpu else next((name for name in ("base", "small") if images >= _FROM[name]), "tiny")
        model = replace(model, name=f"vit_{size}_patch16_224")
        costs = {name: _cost(model, width) for name, width in _WIDTHS.items()}
        others = " and ".join(
            f"vit_{name} {cost / costs[size]:.2g} times" for name, cost in costs.items() if name != size
        )
        because = f"{images:,} images{' on a CPU' if cpu else ''}; of its time {others} for an image"
        choices.append(Choice("model.name", model.name, because))
    return model, tuple(choices)


def _cost(model: ModelConfig, width: int) -> int:
    """Multiplications of a block for one image."""
    height, width_pixels = model.image_hw
    patch = model.patch_size or (16,)
    tokens = (height // patch[0]) * (width_pixels // patch[-1]) + 1
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def usual_side(source: Source, reading: DecodeOptions) -> int:
    """The median of the shorter sides of some images, in pixels; 224 where none of them can be read.

    Raises Unreachable where the source gives no answer.
    """
    some = np.random.default_rng(0).choice(len(source), min(_SAMPLE, len(source)), replace=False)
    sides: list[int] = []
    for index in some.tolist():
        try:
            picture = open_picture(source.image(index), reading)
        except Unreachable:
            raise
        except (BadImage, OSError):
            continue
        sides.append(min(picture.height, picture.width))
    return int(np.median(sides)) if sides else _LARGEST
