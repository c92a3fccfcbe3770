"""Arrays as pixels, checked pixel by pixel."""

import numpy as np
import pytest
from matplotlib import colormaps

from mpp.report.views.drawing import enlarged, framed, heat, lit, tiled, to_range, visible


def test_heat_is_viridis_between_its_ends_and_grey_where_nothing_is_known() -> None:
    colours = heat(np.array([-3.0, -1.0, 0.0, 1.0, 9.0, np.nan]), -1, 1)
    ends = [np.round(255 * np.array(colormaps["viridis"](x)[:3])) for x in (0.0, 0.5, 1.0)]
    np.testing.assert_array_equal(colours, [ends[0], ends[0], ends[1], ends[2], ends[2], [128, 128, 128]])


def test_range() -> None:
    np.testing.assert_array_equal(to_range(np.array([-2.0, 0.0, 2.0])), [0, 128, 255])
    np.testing.assert_array_equal(to_range(np.full((2, 2), 7.0)), np.full((2, 2), 128))


def test_tiles_lie_in_rows_with_transparent_gaps() -> None:
    tiles = np.stack([np.full((2, 3, 3), 10 * (i + 1), np.uint8) for i in range(3)])
    sheet = tiled(tiles, 2, gap=1)
    assert sheet.shape == (5, 7, 4)
    expected = np.zeros((5, 7), np.uint8)
    expected[:2, :3], expected[:2, 4:], expected[3:, :3] = 10, 20, 30
    np.testing.assert_array_equal(sheet[..., 0], expected)
    np.testing.assert_array_equal(sheet[..., 3], np.where(expected > 0, 255, 0))


def test_light_follows_the_share_of_each_patch() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    np.testing.assert_array_equal(lit(image, np.full((2, 2), 0.25)), image)
    shown = lit(image, np.array([[1.0, 0.0], [0.0, 0.0]]), dark=0.1)
    assert (shown[0, 0] == 200).all()
    assert (shown[7, 7] == 20).all()
    assert shown[0, 7, 0] == shown[7, 0, 0] == 20


def test_a_frame_lies_around_its_patch() -> None:
    image = np.full((12, 16, 3), 100, np.uint8)
    shown = framed(image, 1, 2, (4, 4))
    inside = np.zeros((12, 16), bool)
    inside[4:8, 8:12] = True
    assert (shown[inside] == 100).all()
    assert (shown[3, 8:12] == 0).all()  # black next to the patch, white around that
    assert (shown[2, 6:14] == 255).all()
    assert (shown[:2] == 100).all()
    assert (image == 100).all()
    corner = framed(image, 0, 0, (4, 4))
    assert (corner[:4, :4] == 100).all()
    assert (corner[4, :4] == 0).all()


@pytest.mark.parametrize(("size", "times"), [((8, 8), 14), ((112, 60), 1), ((56, 57), 2), ((300, 200), 1)])
def test_small_images_are_enlarged_by_a_whole_number(size: tuple[int, int], times: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    shown = visible(image)
    np.testing.assert_array_equal(shown, enlarged(image, times))
    np.testing.assert_array_equal(shown[::times, ::times], image)
