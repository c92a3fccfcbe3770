"""RandAugment draws from the sample's seed alone, and never fails on an image."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mpp.data.randaugment import RandAugment, _posterize
from mpp.data.seeds import uniforms
from mpp.data.settings import DataConfig
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import TrainTransform
from mpp.errors import UserError
from tests.data.streams import assert_same, run

RECIPE = "rand-m9-mstd0.5-inc1"
MEAN = (0.5, 0.5, 0.5)
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def augment(recipe: str, seed: int, config: DataConfig | None = None) -> torch.Tensor:
    transform = RandAugment(config or DataConfig(), recipe, (24, 32), 3, MEAN)
    return transform(PIXELS, draws(seed, transform.draws))


def draws(seed: int, number: int) -> list[float]:
    return uniforms(np.array([seed], dtype=np.uint64), number)[0].tolist()


def test_shape_type_and_seed() -> None:
    first = augment(RECIPE, 0)
    assert (first.shape, first.dtype) == ((3, 24, 32), torch.uint8)
    assert torch.equal(first, augment(RECIPE, 0))
    assert len({augment(RECIPE, seed).numpy().tobytes() for seed in range(20)}) == 20


def test_no_operation_leaves_the_crop() -> None:
    transform = TrainTransform(DataConfig(), (24, 32), 3)
    crop = transform(PIXELS, draws(3, transform.draws))
    assert torch.equal(augment("rand-m9-p0", 3), crop)


def test_it_moves_nobody_else_s_generator() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    augment(RECIPE, 5)
    assert (random.random(), np.random.rand()) == expected


def test_every_operation_at_every_level() -> None:
    """timm asks Pillow for 0 bits at its strongest level, which Pillow 12 refuses."""
    whole = DataConfig(crop_scale=(1, 1))
    for recipe in ("rand-m10-n15-p1-mstd101-inc1", "rand-m10-n15-p1", "rand-m0-n15-p1-inc1"):
        for seed in range(40):
            assert augment(recipe, seed, whole).shape == (3, 24, 32)


@pytest.mark.parametrize(("bits", "kept"), [(0, 1), (1, 1), (4, 4), (7, 7), (8, 8), (9, 8)])
def test_posterize(bits: int, kept: int) -> None:
    image = Image.fromarray(PIXELS)
    assert np.array_equal(_posterize(image, bits), ImageOps.posterize(image, kept))


@pytest.mark.parametrize("recipe", ["augmix-m3", "rand-x9", "rand-mfast", "rand-tnowhere", "m9", "rand-m"])
def test_a_recipe_that_is_none(recipe: str) -> None:
    with pytest.raises(UserError, match=rf"data\.randaugment '{recipe}' is no recipe of timm's, such as"):
        augment(recipe, 0)


def test_it_needs_colours() -> None:
    with pytest.raises(UserError, match=r"data\.randaugment needs 3 channels, the images have 1: leave it empty"):
        RandAugment(DataConfig(), RECIPE, (8, 8), 1, (0.5,))


@pytest.mark.parametrize("mean", [(0.5,), (0.1, 0.5, 0.9)])
def test_what_is_moved_in_has_the_mean_s_colour(mean: tuple[float, ...]) -> None:
    transform = RandAugment(DataConfig(crop_scale=(1, 1), hflip=0), "rand-m9-n1-p1", (32, 32), 3, mean)
    fill = tuple(round(255 * value) for value in (mean * 3 if len(mean) == 1 else mean))
    assert all(operation.kwargs["fillcolor"] == fill for operation in transform._augment.ops)


def test_the_stream_is_the_same_for_any_number_of_workers() -> None:
    source = ListSource([PIXELS, PIXELS[::-1].copy(), PIXELS[:, ::-1].copy()], [0, 1, 0])
    transform = RandAugment(DataConfig(), RECIPE, (24, 32), 3, MEAN)
    assert_same(run(source, 6, transform), run(source, 6, transform, workers=2))
