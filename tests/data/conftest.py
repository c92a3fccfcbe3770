"""Small images and a cache of the tests' own."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

QUADRANTS = ((255, 0, 0), (0, 200, 0), (0, 0, 255), (255, 255, 255))
"""Colours of the corners of `quadrants`: top left, top right, bottom left, bottom right."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Indices and unpacked shards go to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MPP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def quadrants() -> np.ndarray:
    """uint8 (32, 48, 3) in four colours."""
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    for colour, (top, left) in zip(QUADRANTS, ((0, 0), (0, 24), (16, 0), (16, 24)), strict=True):
        image[top : top + 16, left : left + 24] = colour
    return image


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(array or Pillow image, "PNG", ...)`: encoded bytes."""

    def run(image: np.ndarray | Image.Image, container: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        picture.save(buffer, container, **options)
        return buffer.getvalue()

    return run


@pytest.fixture
def picture_folder(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[..., Path]:
    """`picture_folder("a/1.png", "b/2.jpg")`: a folder with these pictures, each of one grey."""

    def make(*names: str) -> Path:
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(np.full((8, 8, 3), number % 256, dtype=np.uint8)))
        return tmp_path

    return make
