"""timm's RandAugment for fine-tuning."""

import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import mpp.system.timm_import  # noqa: F401
from mpp.data.decoding import Picture
from mpp.data.settings import DataConfig
from mpp.data.transform import TrainTransform, Transform
from mpp.errors import UserError
from mpp.system.process import GENERATORS

from PIL import Image, ImageOps  # isort: skip
from timm.data.auto_augment import rand_augment_transform  # isort: skip

_RECIPE = re.compile(r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|t(weights|3aw?)))*")


class RandAugment(Transform):
    """`TrainTransform`, then timm's RandAugment of a recipe such as rand-m9-mstd0.5-inc1, as the given draws decide.

    Its parts: magnitude 9, its standard deviation 0.5, severity rises with it. `mean`, 0 to 1, fills what is moved in.
    Raises UserError for a recipe that timm cannot read, and images of other than 3 channels.
    """

    def __init__(
        self, config: DataConfig, recipe: str, image_hw: tuple[int, int], channels: int, mean: tuple[float, ...]
    ) -> None:
        if channels != 3:
            raise UserError(f"data.randaugment needs 3 channels, the images have {channels}: leave it empty")
        fill = tuple(round(255 * value) for value in (mean * 3 if len(mean) == 1 else mean))
        options = {"translate_const": int(min(image_hw) * 0.45), "img_mean": fill}
        try:
            if not _RECIPE.fullmatch(recipe):  # timm passes over sections that it does not know
                raise ValueError(recipe)
            self._augment = rand_augment_transform(recipe, options)
        except (AssertionError, ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"data.randaugment {recipe!r} is no recipe of timm's, such as rand-m9-mstd0.5-inc1"
            ) from error
        for operation in self._augment.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
        self._crop = TrainTransform(config, image_hw, channels)
        super().__init__(image_hw, self._crop.draws + 1)

    def __call__(self, image: Picture | np.ndarray, draws: Sequence[float] = ()) -> Tensor:
        cropped = self._crop(image, draws[:-1])
        seed = int(draws[-1] * 2**32)
        # timm draws from the global generators of both, which are put back as they were.
        with GENERATORS:
            before = random.getstate(), np.random.get_state()
            random.seed(seed)
            np.random.seed(seed)
            try:
                augmented = self._augment(Image.fromarray(cropped.permute(1, 2, 0).numpy()))
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])
        return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, but for 0 bits, which its strongest level asks for: Pillow 12 refuses, and the image would be black."""
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))
