"""Settings of the data, and what is refused in one line."""

import re
from typing import Any

import pytest

from mpp.data.settings import DataConfig, DecodeOptions
from mpp.downstream.settings import LabelledConfig
from mpp.errors import UserError


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"value_range": (0.0,)}, "data.value_range takes pairs low high, low < high, got [0.0]"),
        ({"value_range": (5.0, 5.0)}, "data.value_range takes pairs low high, low < high, got [5.0, 5.0]"),
        ({"value_range": (0.0, float("inf"))}, "data.value_range takes pairs low high, low < high, got [0.0, inf]"),
        ({"value_range": (0.0, 1.0, 3.0, 2.0)}, "data.value_range takes pairs"),
        ({"background": (256,)}, "data.background takes numbers from 0 to 255, got [256]"),
        ({"source": "folder:a", "keep": True}, "data.keep is for remote shards, such as s3://..., and folder:a is not"),
        ({"max_image_mb": 0}, "data.max_image_mb must be at least 1, got 0"),
        ({"max_bad": "many"}, "data.max_bad is a share such as 1%, got 'many'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(line)}"):
        DataConfig(**settings)


def test_remote_files_can_be_kept() -> None:
    assert DataConfig("shards:s3://bucket/a.tar", keep=True).keep
    assert LabelledConfig("folder:a", keep=True, test="shards:s3://bucket/a.tar").keep


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mean": (0.5, 0.5)}, "data.mean takes one number or 5, one per channel of the images"),
        ({"background": (0, 0, 0)}, "data.background takes one number or 5, one per channel of the images"),
        ({"value_range": (0.0, 1.0) * 3}, "data.value_range takes low high, or 5 such pairs, one per channel"),
    ],
)
def test_settings_of_other_channels(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        DataConfig(**settings).decode_options(5)
    assert str(caught.value).startswith(line)


def test_reading() -> None:
    data = DataConfig(value_range=(0.0, 1.0) * 5, background=(0,))
    assert data.decode_options(5) == DecodeOptions(5, (0.0, 1.0) * 5, (0,))
    assert DataConfig(max_image_mb=2).decode_options(3) == DecodeOptions(max_bytes=2_000_000)
    # A run that began before there was a limit, or with another one, has read the same pixels.
    assert DecodeOptions(5, max_bytes=1).pixel_settings == {"channels": 5, "value_range": (), "background": (255,)}
    assert DecodeOptions(max_bytes=2_000_000).flags() == ["--data.max-image-mb 2"]
    assert DataConfig().decode_options(3) == DecodeOptions()
