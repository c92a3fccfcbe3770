from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.curation.made import noise, save, under


def test_duplicates_by_bytes_and_by_pixels_and_across_labels(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    same, other, alone = noise(40, 40), noise(40, 40), noise(40, 40)
    save(data / "cat" / "1.png", same)
    save(data / "cat" / "2.png", same)  # the same bytes
    save(data / "dog" / "3.bmp", same)  # the same pixels, another label
    save(data / "dog" / "4.png", other)
    save(data / "dog" / "5.png", other)
    save(data / "dog" / "6.png", alone)
    save(data / "dog" / "7.png", alone.reshape(20, 80, 3))  # the same values in another shape
    (data / "dog" / "8.png").write_bytes(b"")
    (data / "dog" / "9.png").write_bytes(b"")  # bad files are no duplicates
    _, lines, report = check(data)
    assert under(lines, "duplicates") == [
        "2 groups of equal files (4 images); 1 group of equal pixels in other files (3 images)",
        f"{data}/cat/1.png (cat) = {data}/cat/2.png (cat) = {data}/dog/3.bmp (dog)",
        f"{data}/dog/4.png (dog) = {data}/dog/5.png (dog)",
    ]
    warning = "WARNING: 1 group of duplicates with different labels: "
    assert any(line.startswith(f"{warning}{data}/cat/1.png (cat) = ") for line in lines)
    assert report["duplicates"]["label_conflicts"] == 1
    rows = [row.split(",") for row in (tmp_path / "out" / "duplicates.csv").read_text().splitlines()]
    assert rows[0] == ["group", "split", "index", "class", "bytes", "file"]
    groups = [("0", "0", "cat"), ("0", "1", "cat"), ("0", "2", "dog"), ("1", "3", "dog"), ("1", "4", "dog")]
    assert [(row[0], row[2], row[3]) for row in rows[1:]] == groups
    hashes = [row[4] for row in rows[1:]]
    assert hashes[0] == hashes[1] != hashes[2]


def test_images_of_both_splits_are_found(check: Callable[..., Any], tmp_path: Path):
    data, twice = tmp_path / "data", noise(40, 40)
    for split, images in {"train": (twice, noise(40, 40)), "test": (twice, twice, noise(40, 40))}.items():
        for number, pixels in enumerate(images):
            save(data / split / ("a", "b")[number % 2] / f"{number}.png", pixels)
        save(data / split / "a" / "blank.png", np.zeros((40, 40, 3), np.uint8))  # tells nothing of the test
    save(data / "test" / "a" / "bad.png", noise(40, 40)).write_bytes(b"")
    _, lines, report = check(data)
    assert under(lines, "test split") == ["5 images looked at, 1 of them bad (1 empty)"]
    assert report["duplicates"]["test_images_in_train"] == 2
    warning = "WARNING: 2 images of the test split also in the train split: "
    assert any(line.startswith(f"{warning}{data}/train/a/0.png (a) of train = ") for line in lines)
    save(data / "valid" / "a" / "0.png", twice)
    _, lines, report = check(data)
    assert under(lines, "val split") == ["1 images looked at, none of them bad"]
    assert report["duplicates"]["test_images_in_train"] == 3
    assert any(line.startswith("WARNING: 3 images of the val or test split also in another split: ") for line in lines)
