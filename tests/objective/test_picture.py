"""Pictures of reconstructions, pixel by pixel."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from mpp.model.config import ModelConfig
from mpp.model.encoder import Encoder, build_encoder
from mpp.objective.masking import MASK, RANDOM, Corruption, draw_corruption, pick_patches
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.picture import Reconstruction, draw_sheet, reconstruct, to_rgb
from mpp.objective.target import build_target

ROWS, COLUMNS, HEIGHT, WIDTH = 3, 4, 8, 4  # a grid of 3x4 patches of 8x4 pixels


def picture_of(name: str, channels: int, group: int = 1) -> tuple[Reconstruction, Corruption, Tensor, Tensor]:
    """A reconstruction, its corruption, and per picked patch the predicted and true pixels."""
    config = ModelConfig(
        "vit_tiny_patch16_224", (24, 16), (8, 4), in_chans=channels, depth=1, embed_dim=48, num_heads=3
    )
    torch.manual_seed(0)
    target = build_target(name, (HEIGHT, WIDTH), channels, 3)
    model: MaskedPatchPrediction[Encoder] = MaskedPatchPrediction(build_encoder(config), target)
    torch.nn.init.normal_(model.head.weight)
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


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_colours_on_screen_are_the_first_three_channels_or_one_as_grey(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    expected = np.stack([image[c if channels >= 3 else 0].numpy() for c in range(3)], axis=-1)
    np.testing.assert_array_equal(to_rgb(image), expected)


@pytest.mark.parametrize(("batch", "columns"), [(4, 2), (3, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_every_version_of_every_image_once_and_in_reading_order(
    batch: int, columns: int, channels: int
) -> None:
    generator = Generator().manual_seed(0)
    versions = torch.randint(0, 256, (4, batch, channels, 12, 18), generator=generator, dtype=torch.uint8)
    sheet = draw_sheet(Reconstruction(*versions), columns)
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    places = []
    for index, number in itertools.product(range(batch), range(4)):
        scale = -(-144 // 18)  # tiles are enlarged to 144 pixels at least
        tile = Image.fromarray(to_rgb(versions[number, index])).resize(
            (18 * scale, 12 * scale), Image.Resampling.NEAREST
        )
        places.append(find(sheet, np.asarray(tile)))
    lines = [places[4 * i : 4 * i + 4] for i in range(batch)]
    assert all(line == sorted(line, key=lambda place: place[1]) for line in lines)
    firsts = [line[0] for line in lines]
    assert firsts == sorted(firsts)
    assert len({top for top, _ in firsts}) == -(-batch // min(columns, batch))


def find(sheet: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """Row and column of the only place where `tile` is in `sheet`."""
    height, width, _ = tile.shape
    starts = (sheet[: 1 - height, : 1 - width] == tile[0, 0]).all(axis=-1)
    places = [(r, c) for r, c in np.argwhere(starts).tolist() if (sheet[r : r + height, c : c + width] == tile).all()]
    assert len(places) == 1
    return places[0]


def test_large_images_are_not_enlarged() -> None:
    versions = torch.zeros(4, 1, 3, 150, 200, dtype=torch.uint8)
    sheet = draw_sheet(Reconstruction(*versions))
    black = (sheet == 0).all(axis=-1)
    assert black[40:].sum() >= 4 * 100 * 200
    assert sheet.shape[0] < 200
