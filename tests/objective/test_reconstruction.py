"""Reconstructions pixel by pixel, the sheets of them, and that a saved sheet gives its tiles back."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Generator, Tensor

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.masking import MASK, RANDOM, draw_corruption, pick_patches
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.reconstruction import (
    CONFIDENCE,
    NOT_CORRUPTED,
    OUTLINES,
    TEXT_KEY,
    VERSIONS,
    WRONG_TO_RIGHT,
    Reconstruction,
    draw_sheet,
    draw_tiles,
    picture_of_targets,
    read_sheet,
    reconstruct,
    to_rgb,
)
from mpp.objective.target import build_target

ROWS, COLUMNS, HEIGHT, WIDTH = 3, 4, 8, 4  # a grid of 3x4 patches of 8x4 pixels
FIGURES = {"accuracy": ("right or wrong", "confidence"), "mse": ("squared error",)}


def patch(image: Tensor, number: int) -> Tensor:
    top, left = number // COLUMNS * HEIGHT, number % COLUMNS * WIDTH
    return image[:, top : top + HEIGHT, left : left + WIDTH]


@pytest.mark.parametrize("name", ["mean_colour", "colour_4x4", "pixels"])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("group", [1, 2])
def test_every_patch_shows_its_corruption_and_its_prediction_and_has_its_figures(
    name: str, channels: int, group: int
) -> None:
    torch.manual_seed(0)
    config = ModelConfig("vit_tiny_patch16_224", (24, 16), (8, 4), channels, depth=1, embed_dim=48, num_heads=3)
    target = build_target(name, (HEIGHT, WIDTH), channels, 3)
    model = MaskedPatchPrediction(build_encoder(config), target, Normalise((0.5,), (0.5,), channels))
    torch.nn.init.normal_(model.head.weight, std=0.05)
    images = torch.randint(0, 256, (4, channels, 24, 16), dtype=torch.uint8)
    pixels, generator = images.float() / 127.5 - 1, Generator().manual_seed(0)
    picked = pick_patches(4, (ROWS, COLUMNS), 0.5, generator)
    drawn = draw_corruption(picked, ROWS * COLUMNS, generator, (0.4, 0.4, 0.2), group)
    rows, targets = reconstruct(model, images, pixels, drawn), picture_of_targets(target, images)
    with torch.no_grad():
        output = model.predict(pixels, drawn)
    truth = torch.stack([row[at] for row, at in zip(target.of(images), picked, strict=True)])
    guess = target.guess(output)
    shown, right, sure = target.render(guess), target.agreement(guess, truth), target.confidence(output)
    for b, p in itertools.product(range(4), range(ROWS * COLUMNS)):
        own = patch(images[b], p)
        versions, figures = [own] * 3, [0.0, torch.nan, torch.nan]
        if p in picked[b]:
            j = picked[b].tolist().index(p)
            kind, source = drawn.kinds[b, j], int(drawn.other[b, j])
            versions = [own, shown[b, j], target.render(truth)[b, j]]
            if kind == MASK:
                versions[0] = torch.full_like(own, 128)
            elif kind == RANDOM:
                versions[0] = patch(images[b // group * group + source // (ROWS * COLUMNS)], source % (ROWS * COLUMNS))
            figures = [1 + int(kind), right[b, j].item(), sure[b, j].item()]
            assert torch.equal(patch(targets[b], p), versions[2])
        for found, expected in zip((rows.corrupted, rows.predicted, rows.true), versions, strict=True):
            assert torch.equal(patch(found[b], p), expected)
        found = [float(x[b, p // COLUMNS, p % COLUMNS]) for x in (rows.kinds, rows.right, rows.confidence)]
        assert found == pytest.approx(figures, nan_ok=True)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_colours_on_screen_are_the_first_three_channels_or_one_as_grey(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    expected = np.stack([image[c if channels >= 3 else 0].numpy() for c in range(3)], axis=-1)
    np.testing.assert_array_equal(to_rgb(image), expected)
    np.testing.assert_array_equal(to_rgb(torch.stack([image, image])), [expected] * 2)


def made(batch: int, channels: int, image: tuple[int, int], grid: tuple[int, int], score: str) -> Reconstruction:
    """Noise, with every fourth patch visible and the others masked, random and unchanged."""
    generator = Generator().manual_seed(0)
    versions = torch.randint(0, 256, (4, batch, channels, *image), generator=generator, dtype=torch.uint8)
    kinds = (torch.arange(batch * grid[0] * grid[1]) % 4).view(batch, *grid).to(torch.int8)
    figures = torch.rand(2, batch, *grid, generator=generator).masked_fill(kinds == 0, torch.nan)
    if score == "mse":
        figures[1] = torch.nan
    return Reconstruction(*versions, kinds, *figures, score)


@pytest.mark.parametrize(
    ("image", "channels", "score"), [((12, 18), 3, "accuracy"), ((32, 8), 1, "mse"), ((150, 200), 8, "accuracy")]
)
def test_a_saved_sheet_gives_back_every_version_of_every_image(
    tmp_path: Path, image: tuple[int, int], channels: int, score: str
) -> None:
    rows = made(3, channels, image, (2, 2), score)
    (sheet, layout), text = draw_sheet(rows), PngInfo()
    text.add_text(TEXT_KEY, layout)
    Image.fromarray(sheet).save(tmp_path / "a.png", pnginfo=text)
    read = read_sheet(tmp_path / "a.png")
    assert read is not None
    titles, tiles = read
    assert titles == VERSIONS + FIGURES[score]
    scale = {(12, 18): 8, (32, 8): 5, (150, 200): 1}[image]  # to 144 pixels at least
    assert tiles.shape == (3, len(titles), image[0] * scale, image[1] * scale, 3)
    np.testing.assert_array_equal(tiles, draw_tiles(rows).pixels)
    for number, version in {0: rows.original, 2: rows.predicted, 3: rows.true}.items():
        np.testing.assert_array_equal(tiles[:, number], to_rgb(version).repeat(scale, 1).repeat(scale, 2))
    Image.fromarray(sheet).save(tmp_path / "old.png")
    assert read_sheet(tmp_path / "old.png") is None
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        read_sheet(tmp_path / "a.png")


def test_random_and_unchanged_patches_are_framed_and_nothing_else_is_changed() -> None:
    rows = made(2, 3, (24, 48), (3, 4), "accuracy")  # patches of 8x12, enlarged 3 times
    tiles = draw_tiles(rows).pixels
    plain = to_rgb(rows.corrupted).repeat(3, 1).repeat(3, 2)
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        area = b, slice(24 * r, 24 * r + 24), slice(36 * c, 36 * c + 36)
        shown, expected = tiles[:, 1][area], plain[area].copy()
        kind = int(rows.kinds[b, r, c]) - 1
        if kind in OUTLINES:
            inner = expected[3:-3, 3:-3].copy()
            expected[:] = OUTLINES[kind]
            expected[3:-3, 3:-3] = inner
        np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize(
    ("title", "colours"),
    [
        ("right or wrong", dict(zip((0.0, 0.5, 1.0), WRONG_TO_RIGHT, strict=True))),
        ("confidence", {0.0: CONFIDENCE[0], 0.5: np.mean(CONFIDENCE, axis=0), np.nan: NOT_CORRUPTED}),
        ("squared error", dict(zip((3.0, 0.125, 0.0), WRONG_TO_RIGHT, strict=True)) | {np.nan: NOT_CORRUPTED}),
    ],
)
def test_a_figure_has_its_colour_all_over_its_patch(title: str, colours: dict[float, tuple[int, int, int]]) -> None:
    rows = made(1, 3, (150, 200), (3, 4), "mse" if title == "squared error" else "accuracy")
    for value, colour in colours.items():
        (rows.confidence if title == "confidence" else rows.right)[0, 1, 2] = value
        titles, tiles = draw_tiles(rows)
        area = tiles[0, titles.index(title), 50:100, 100:150].reshape(-1, 3)
        np.testing.assert_allclose(area, np.broadcast_to(colour, area.shape), atol=0.5)


def test_titles_and_legend_stay_outside_the_tiles_and_on_the_sheet() -> None:
    """A narrow image: all words are drawn, so that some dark pixels are in every line of text and none at its ends."""
    sheet, _ = draw_sheet(made(1, 1, (32, 4), (2, 2), "accuracy"))
    head, legend = sheet[:22], sheet[22 + 160 + 6 :]
    assert len(legend) == 6 * 24
    for text in (head, *np.split(legend, 6)):
        dark = text.max(axis=-1) < 60
        assert dark.any()
        assert not dark[:, [0, -1]].any()
