"""RandAugment draws from the sample's seed alone, and never fails on an image."""

import random

import numpy as np
import pytest
import torch

from mpp.data.randaugment import RandAugment
from mpp.data.seeds import uniforms
from mpp.data.settings import DataConfig
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import TrainTransform
from mpp.errors import UserError
from tests.data.picture_files import noise
from tests.data.streams import assert_same, run

RECIPE, MEAN = "rand-m9-mstd0.5-inc1", (0.5, 0.5, 0.5)
PIXELS = noise((9, 13, 3)).repeat(4, 0).repeat(4, 1)
WHOLE = DataConfig(crop_scale=(1, 1), hflip=0)


def augment(recipe: str, seed: int, config: DataConfig = DataConfig()) -> torch.Tensor:  # noqa: B008
    transform = RandAugment(config, recipe, (24, 32), 3, MEAN)
    return transform(PIXELS, draws(seed, transform.draws))


def draws(seed: int, number: int) -> list[float]:
    return uniforms(np.array([seed], dtype=np.uint64), number)[0].tolist()


def test_the_seed_alone_decides() -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = augment(RECIPE, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert (first.shape, first.dtype) == ((3, 24, 32), torch.uint8)
    assert torch.equal(first, augment(RECIPE, 0))
    assert len({augment(RECIPE, seed).numpy().tobytes() for seed in range(20)}) == 20
    plain = TrainTransform(DataConfig(), (24, 32), 3)
    assert torch.equal(augment("rand-m9-p0", 3), plain(PIXELS, draws(3, plain.draws)))  # no operation: the crop


@pytest.mark.parametrize("recipe", ["rand-m10-n15-p1-mstd101-inc1", "rand-m10-n15-p1", "rand-m0-n15-p1-inc1"])
def test_every_operation_at_every_level(recipe: str) -> None:
    """timm asks Pillow for 0 bits at its strongest level, which Pillow 12 refuses."""
    for seed in range(40):
        assert augment(recipe, seed, WHOLE).shape == (3, 24, 32)


@pytest.mark.parametrize("recipe", ["augmix-m3", "rand-x9", "rand-mfast", "rand-tnowhere", "m9", "rand-m"])
def test_a_recipe_that_is_none(recipe: str) -> None:
    with pytest.raises(UserError, match=rf"data\.randaugment '{recipe}' is no recipe of timm's, such as"):
        augment(recipe, 0)


def test_it_needs_colours() -> None:
    with pytest.raises(UserError, match=r"data\.randaugment needs 3 channels, the images have 1: leave it empty"):
        RandAugment(DataConfig(), RECIPE, (8, 8), 1, (0.5,))


def test_what_is_moved_in_has_the_mean_s_colour() -> None:
    for mean, fill in (((0.5,), (128, 128, 128)), ((0.1, 0.5, 0.9), (26, 128, 230))):
        transform = RandAugment(WHOLE, "rand-m9-n1-p1", (32, 32), 3, mean)
        assert {operation.kwargs["fillcolor"] for operation in transform._augment.ops} == {fill}


def test_the_stream_is_the_same_for_any_number_of_workers() -> None:
    source = ListSource([PIXELS, PIXELS[::-1].copy(), PIXELS[:, ::-1].copy()], [0, 1, 0])
    transform = RandAugment(DataConfig(), RECIPE, (24, 32), 3, MEAN)
    assert_same(run(source, 6, transform), run(source, 6, transform, workers=2))
