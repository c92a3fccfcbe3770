"""Sheets of reconstructions: what is drawn where, and that a saved sheet can be taken apart again."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Generator

from mpp.objective.picture import Reconstruction, to_rgb
from mpp.objective.sheet import (
    CONFIDENCE,
    NOT_CORRUPTED,
    OUTLINES,
    TEXT_KEY,
    VERSIONS,
    WRONG_TO_RIGHT,
    Sheet,
    draw_sheet,
    draw_tiles,
    read_sheet,
)

FIGURES = {"accuracy": ("right or wrong", "confidence"), "mse": ("squared error",)}


def made(batch: int, channels: int, image: tuple[int, int], grid: tuple[int, int], score: str) -> Reconstruction:
    """Noise, with every fourth patch visible and the others masked, random and unchanged."""
    generator = Generator().manual_seed(0)
    versions = torch.randint(0, 256, (4, batch, channels, *image), generator=generator, dtype=torch.uint8)
    kinds = (torch.arange(batch * grid[0] * grid[1]) % 4).view(batch, *grid).to(torch.int8)
    figures = torch.rand(2, batch, *grid, generator=generator).masked_fill(kinds == 0, torch.nan)
    if score == "mse":
        figures[1] = torch.nan
    original, corrupted, predicted, true = versions
    return Reconstruction(original, corrupted, predicted, true, kinds, figures[0], figures[1], score)


def saved(sheet: Sheet, path: Path) -> Path:
    text = PngInfo()
    text.add_text(TEXT_KEY, sheet.layout)
    Image.fromarray(sheet.picture).save(path, pnginfo=text)
    return path


@pytest.mark.parametrize(
    ("image", "channels", "score"), [((12, 18), 3, "accuracy"), ((32, 8), 1, "mse"), ((150, 200), 8, "accuracy")]
)
def test_a_saved_sheet_gives_back_every_version_of_every_image(
    tmp_path: Path, image: tuple[int, int], channels: int, score: str
) -> None:
    rows = made(3, channels, image, (2, 2), score)
    read = read_sheet(saved(draw_sheet(rows), tmp_path / "a.png"))
    assert read is not None
    titles, tiles = read
    assert titles == VERSIONS + FIGURES[score]
    scale = {(12, 18): 8, (32, 8): 5, (150, 200): 1}[image]  # to 144 pixels at least
    assert tiles.shape == (3, len(titles), image[0] * scale, image[1] * scale, 3)
    np.testing.assert_array_equal(tiles, draw_tiles(rows).pixels)
    for number, version in {0: rows.original, 2: rows.predicted, 3: rows.true}.items():
        for shown, expected in zip(tiles[:, number], version, strict=True):
            enlarged = Image.fromarray(to_rgb(expected)).resize(
                (image[1] * scale, image[0] * scale), Image.Resampling.NEAREST
            )
            np.testing.assert_array_equal(shown, np.asarray(enlarged))


def test_random_and_unchanged_patches_are_framed_and_nothing_else_is_changed() -> None:
    rows = made(2, 3, (24, 48), (3, 4), "accuracy")  # patches of 8x12, enlarged 3 times
    tiles = draw_tiles(rows).pixels
    plain = np.stack([to_rgb(image).repeat(3, 0).repeat(3, 1) for image in rows.corrupted])
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        place = b, slice(24 * r, 24 * r + 24), slice(36 * c, 36 * c + 36)
        shown, expected = tiles[:, 1][place], plain[place].copy()
        kind = int(rows.kinds[b, r, c]) - 1
        if kind in OUTLINES:
            inner = expected[3:-3, 3:-3].copy()
            expected[:] = OUTLINES[kind]
            expected[3:-3, 3:-3] = inner
        np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize(
    ("score", "title", "value", "colour"),
    [
        ("accuracy", "right or wrong", 0.0, WRONG_TO_RIGHT[0]),
        ("accuracy", "right or wrong", 0.5, WRONG_TO_RIGHT[1]),
        ("accuracy", "right or wrong", 1.0, WRONG_TO_RIGHT[2]),
        ("accuracy", "confidence", 0.0, CONFIDENCE[0]),
        ("accuracy", "confidence", 0.5, np.mean(CONFIDENCE, axis=0)),
        ("accuracy", "confidence", 1.0, CONFIDENCE[1]),
        ("accuracy", "confidence", np.nan, NOT_CORRUPTED),
        ("mse", "squared error", 0.0, WRONG_TO_RIGHT[2]),
        ("mse", "squared error", 0.125, WRONG_TO_RIGHT[1]),
        ("mse", "squared error", 0.25, WRONG_TO_RIGHT[0]),
        ("mse", "squared error", 3.0, WRONG_TO_RIGHT[0]),
        ("mse", "squared error", np.nan, NOT_CORRUPTED),
    ],
)
def test_a_figure_has_its_colour_all_over_its_patch(
    score: str, title: str, value: float, colour: tuple[int, int, int]
) -> None:
    rows = made(1, 3, (150, 200), (3, 4), score)
    figures = rows.confidence if title == "confidence" else rows.right
    figures[0, 1, 2] = value
    titles, tiles = draw_tiles(rows)
    patch = tiles[0, titles.index(title), 50:100, 100:150].reshape(-1, 3)
    np.testing.assert_allclose(patch, np.broadcast_to(colour, patch.shape), atol=0.5)


def test_titles_and_legend_stay_outside_the_tiles_and_on_the_sheet() -> None:
    """A narrow image: all words are drawn, so that some dark pixels are in every line of text and none at its ends."""
    sheet = draw_sheet(made(1, 1, (32, 4), (2, 2), "accuracy"))
    head, legend = sheet.picture[:22], sheet.picture[22 + 160 + 6 :]
    assert len(legend) in (48, 72)  # some lines
    for text in (head, *np.split(legend, len(legend) // 24)):
        dark = text.max(axis=-1) < 60
        assert dark.any()
        assert not dark[:, -1].any()


def test_an_older_picture_has_no_tiles_and_a_torn_one_is_an_error(tmp_path: Path) -> None:
    sheet = draw_sheet(made(1, 3, (8, 8), (2, 2), "accuracy"))
    Image.fromarray(sheet.picture).save(tmp_path / "old.png")
    assert read_sheet(tmp_path / "old.png") is None
    whole = saved(sheet, tmp_path / "whole.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        read_sheet(tmp_path / "torn.png")
