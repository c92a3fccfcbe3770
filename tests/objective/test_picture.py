"""Pictures of reconstructions, pixel by pixel."""

import itertools

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mpp.data.transform import Normalise
from mpp.model.encoder import Encoder, build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.masking import MASK, RANDOM, Corruption, draw_corruption, pick_patches
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.picture import Reconstruction, picture_of_targets, reconstruct, to_rgb
from mpp.objective.target import build_target

ROWS, COLUMNS, HEIGHT, WIDTH = 3, 4, 8, 4  # a grid of 3x4 patches of 8x4 pixels


def picture_of(name: str, channels: int, group: int = 1) -> tuple[Reconstruction, Corruption, Tensor, Tensor]:
    """A reconstruction, its corruption, and per picked patch the predicted and true pixels."""
    config = ModelConfig(
        "vit_tiny_patch16_224", (24, 16), (8, 4), in_chans=channels, depth=1, embed_dim=48, num_heads=3
    )
    torch.manual_seed(0)
    target = build_target(name, (HEIGHT, WIDTH), channels, 3)
    model: MaskedPatchPrediction[Encoder] = MaskedPatchPrediction(
        build_encoder(config), target, Normalise((0.5,), (0.5,), channels)
    )
    torch.nn.init.normal_(model.head.weight, std=0.05)
    images = torch.randint(0, 256, (4, channels, 24, 16), dtype=torch.uint8)
    pixels = images.float() / 127.5 - 1
    generator = Generator().manual_seed(0)
    picked = pick_patches(4, (ROWS, COLUMNS), 0.5, generator)
    drawn = draw_corruption(picked, ROWS * COLUMNS, generator, (0.4, 0.4, 0.2), group)
    with torch.no_grad():
        guess = target.colours(model.predict(pixels, drawn))
    truth = target.render(target.of(images))
    truth = torch.stack([row[at] for row, at in zip(truth, picked, strict=True)])
    return reconstruct(model, images, pixels, drawn), drawn, guess, truth


def patch(image: Tensor, number: int) -> Tensor:
    top, left = number // COLUMNS * HEIGHT, number % COLUMNS * WIDTH
    return image[:, top : top + HEIGHT, left : left + WIDTH]


@pytest.mark.parametrize("name", ["mean_colour", "colour_4x4", "pixels"])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("group", [1, 2])
def test_every_patch_of_a_reconstruction_shows_what_became_of_it(name: str, channels: int, group: int) -> None:
    picture, drawn, guess, truth = picture_of(name, channels, group)
    for b, p in itertools.product(range(4), range(ROWS * COLUMNS)):
        own = patch(picture.original[b], p)
        seen, predicted, true = own, own, own
        if p in drawn.picked[b]:
            j = drawn.picked[b].tolist().index(p)
            predicted, true = guess[b, j], truth[b, j]
            if drawn.kinds[b, j] == MASK:
                seen = torch.full_like(own, 128)
            elif drawn.kinds[b, j] == RANDOM:
                image, source = divmod(int(drawn.other[b, j]), ROWS * COLUMNS)
                seen = patch(picture.original[b // group * group + image], source)
        assert torch.equal(patch(picture.corrupted[b], p), seen)
        assert torch.equal(patch(picture.predicted[b], p), predicted)
        assert torch.equal(patch(picture.true[b], p), true)


@pytest.mark.parametrize("name", ["mean_colour", "colour_4x4", "pixels"])
@pytest.mark.parametrize("channels", [3, 8])
def test_every_patch_says_what_became_of_it_how_right_it_is_and_how_sure(name: str, channels: int) -> None:
    picture, drawn, guess, truth = picture_of(name, channels)
    assert picture.kinds.dtype == torch.int8
    assert picture.kinds.shape == picture.right.shape == picture.confidence.shape == (4, ROWS, COLUMNS)
    assert picture.score_name == ("mse" if name == "pixels" else "accuracy")
    for b, p in itertools.product(range(4), range(ROWS * COLUMNS)):
        kind, right, sure = (
            float(x[b, p // COLUMNS, p % COLUMNS]) for x in (picture.kinds, picture.right, picture.confidence)
        )
        if p not in drawn.picked[b]:
            assert kind == 0
            assert np.isnan([right, sure]).all()
            continue
        j = drawn.picked[b].tolist().index(p)
        assert kind == 1 + drawn.kinds[b, j]
        equal = guess[b, j] == truth[b, j]  # bin centres
        if name == "pixels":
            assert right > 0
            assert np.isnan(sure)
        else:
            # Three channels make one class, eight make eight.
            predictions = equal.all(dim=0) if channels == 3 else equal
            assert right == pytest.approx(float(predictions.float().mean()))
            assert 1 / 512 < sure < 1


@pytest.mark.parametrize("name", ["mean_colour", "colour_4x4", "pixels"])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_picture_of_targets_shows_every_patch_as_its_target(name: str, channels: int) -> None:
    picture, _, _, _ = picture_of(name, channels)
    shown = picture_of_targets(build_target(name, (HEIGHT, WIDTH), channels, 3), picture.original)
    corrupted = picture.kinds.repeat_interleave(HEIGHT, 1).repeat_interleave(WIDTH, 2)[:, None] > 0
    assert torch.equal(torch.where(corrupted, shown, 0), torch.where(corrupted, picture.true, 0))
    assert torch.equal(picture_of_targets(build_target(name, (HEIGHT, WIDTH), channels, 3), shown), shown)


def test_the_error_of_pixels_is_squared_and_on_the_scale_of_the_target() -> None:
    picture, drawn, guess, truth = picture_of("pixels", 3)
    inside = ((guess > 0) & (guess < 255)).flatten(2).all(dim=2)  # not clamped when it was drawn
    error = ((guess.float() - truth.float()) / 127.5).square().flatten(2).mean(dim=2)
    shown = picture.right.flatten(1).gather(1, drawn.picked)
    assert inside.any()
    torch.testing.assert_close(shown[inside], error[inside], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_colours_on_screen_are_the_first_three_channels_or_one_as_grey(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    expected = np.stack([image[c if channels >= 3 else 0].numpy() for c in range(3)], axis=-1)
    np.testing.assert_array_equal(to_rgb(image), expected)
    np.testing.assert_array_equal(to_rgb(torch.stack([image, image])), [expected] * 2)
