from collections.abc import Callable
from pathlib import Path

import pytest

from tests.curation.packing.packed import noise


@pytest.fixture
def images(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """40 small pictures of several formats and sizes in three classes."""
    formats = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP"), ("gif", "GIF"), ("tif", "TIFF")]
    for number in range(40):
        extension, container = formats[number % len(formats)]
        path = tmp_path / "images" / f"class {number % 3}" / f"{number:02d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(8 + number, 30 - number // 2, seed=number), container))
    return tmp_path / "images"
