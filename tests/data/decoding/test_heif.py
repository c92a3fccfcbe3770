"""HEIC and AVIF, against the pixels that were written."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from mpp.data.decoding import BadImage, decode, formats, open_picture
from mpp.data.settings import DecodeOptions
from mpp.data.sources.names import is_image
from tests.data.picture_files import picture, quadrants

KINDS = [
    pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
    "HEIF",
]


def written(kind: str, image: Image.Image, **settings: Any) -> bytes:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    out = io.BytesIO()
    image.save(out, kind, quality=95, **settings)
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_pixels_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {1: lambda x: x, 2: np.fliplr, 3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: np.rot90}
    expected = turned[orientation](quadrants())
    found = open_picture(written(kind, picture(), exif=exif), DecodeOptions())
    assert (found.height, found.width) == expected.shape[:2]
    assert np.abs(found.pixels().astype(int) - expected).mean() < 6


def test_a_heic_that_turns_itself_is_not_turned_again() -> None:
    """As phones write: a rotation of the container, and the same in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = written("HEIF", picture(), exif=exif.tobytes())
    assert b"irot" in data
    found = decode(data, DecodeOptions())
    assert np.abs(found.astype(int) - np.rot90(quadrants(), -1)).mean() < 6


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_parts_show_the_background(kind: str) -> None:
    image = Image.fromarray(np.dstack([quadrants(), np.full(quadrants().shape[:2], 0, np.uint8)]))
    assert np.unique(decode(written(kind, image), DecodeOptions(background=(7,)))).tolist() == [7]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_files_are_bad_images(kind: str) -> None:
    data = written(kind, picture())
    for end in (12, 40, len(data) // 2, len(data) - 20):
        with pytest.raises(BadImage):
            decode(data[:end], DecodeOptions())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(kind, picture())
    monkeypatch.setattr(formats, "lacking", lambda extra: f"pip install {extra}")
    extra = {"HEIF": "heif", "AVIF": "pillow"}[kind]
    with pytest.raises(BadImage, match=rf"{kind} image, which needs: pip install {extra}"):
        decode(data, DecodeOptions())


def test_endings_count_as_images() -> None:
    assert all(is_image(f"a.{ending}") for ending in ("HEIC", "heif", "avif", "dcm"))
    assert not is_image("a.jxl")
