import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp.data.transform import EvalTransform
from mpp.downstream.contact_sheet import CAPTION, MARGIN, TILE, spread_over_classes
from mpp.objective.reconstruction import to_rgb
from tests.curation.made import noise, save, under


@pytest.mark.usefixtures("any_name")
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_contact_sheet_shows_what_the_model_sees(check: Callable[..., Any], tmp_path: Path, channels: int):
    data = tmp_path / "data"
    images = [noise(64, 64, channels) for _ in range(14)]
    for number, pixels in enumerate(images):
        path = data / ("ä", "b")[number // 7] / f"{number:02}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, pixels)
    (data / "b" / "99.npy").write_bytes(b"")
    check(data, "--in-chans", str(channels), "--img-size", "64", "32")
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    width, cell_h = TILE // 2, TILE + CAPTION + MARGIN
    assert sheet.shape == (2 * cell_h + MARGIN, 12 * (width + MARGIN) + MARGIN, 3)
    seen = to_rgb(EvalTransform((64, 32))(images[7]))  # the first of class b
    tile = sheet[MARGIN : MARGIN + TILE, MARGIN : MARGIN + width]
    np.testing.assert_array_equal(tile[::2, ::2], seen)
    caption = sheet[MARGIN + TILE : MARGIN + TILE + CAPTION, MARGIN : MARGIN + width]
    assert caption.min() < 100 < caption.max()
    bad = sheet[MARGIN:][:TILE, MARGIN + 7 * (width + MARGIN) :][:, :width]  # the last of class b
    assert (bad[0] == 200).all()
    assert bad.min() < 100


def test_class_names_that_are_no_text(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for folder in (b"\xff\n", b"\x1b[31m"):
        for number in range(2):
            save(data / os.fsdecode(folder) / f"{number}.png", np.full((40, 40, 3), 9, dtype=np.uint8))
    code, lines, _ = check(data)
    assert code == 0
    assert under(lines, "classes") == [r"largest \x1b[31m 2, smallest \xff\n 2: 1.0 to 1"]
    assert r"(\x1b[31m) = " in under(lines, "duplicates")[1]
    assert all(line.isprintable() for line in lines)
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    assert sheet[MARGIN + TILE : MARGIN + TILE + CAPTION].min() < 100


def test_tiles_are_drawn_evenly_over_the_classes():
    labels = np.repeat([0, 1, 2], [100, 10, 2])
    chosen = spread_over_classes(112, labels, 30)
    assert np.bincount(labels[chosen]).tolist() == [18, 10, 2]
    assert len(np.unique(chosen)) == 30
    assert chosen[:18].tolist() == [number * 100 // 18 for number in range(18)]  # nor do they begin with the first 18
    assert spread_over_classes(5, None, 96).tolist() == [0, 1, 2, 3, 4]
    assert spread_over_classes(200, np.arange(200), 96).size == 96
    assert spread_over_classes(112, labels, 200).size == 112
