import json

import numpy as np
import pytest

from mpp.data.statistics import ChannelStatistics, can_divide, histogram

RNG = np.random.default_rng(0)
SIDES = ((5, 4), (70, 90), (400, 300))


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return (RNG.integers(0, 256, (height, width, channels)) // np.arange(1, channels + 1)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("sides", SIDES)
def test_histogram_is_numpys(channels: int, sides: tuple[int, int]) -> None:
    pixels = noise(*sides, channels)
    found = histogram(pixels)
    assert found.dtype == np.int64
    for channel in range(channels):
        np.testing.assert_array_equal(found[channel], np.bincount(pixels[:, :, channel].ravel(), minlength=256))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_image_counts_alike(channels: int) -> None:
    images = [noise(*sides, channels) for sides in SIDES]
    first, rest = ChannelStatistics(channels), ChannelStatistics(channels)
    for number, image in enumerate(images):
        (rest if number else first).add(histogram(image))
    held = ChannelStatistics.from_dict(json.loads(json.dumps(rest.to_dict())))
    np.testing.assert_array_equal(held.sums, rest.sums)
    first.merge(held)
    assert first.images == 3
    # As if each were resized to one size by repeating its pixels.
    scaled = [image.reshape(-1, channels) / 255 for image in images]
    mean = np.mean([pixels.mean(axis=0) for pixels in scaled], axis=0)
    std = np.sqrt(np.mean([((pixels - mean) ** 2).mean(axis=0) for pixels in scaled], axis=0))
    np.testing.assert_allclose(first.mean_std(), (mean, std), rtol=1e-10)


def test_flat_channels_have_nothing_to_divide_by() -> None:
    statistics, image = ChannelStatistics(2), noise(9, 9, 2)
    image[:, :, 1] = 77
    statistics.add(histogram(image))
    assert not can_divide(statistics.mean_std()[1])
    image[0, 0, 1] = 78
    statistics.add(histogram(image))
    assert can_divide(statistics.mean_std()[1])
