"""What the pre-flight says of folders whose every image is known."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.curation.check_report import Classes
from mpp.data.sources.in_memory import ListSource
from tests.curation.made import each_alike, noise, pictures, save, under


def test_counts_classes_forms_and_sizes(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(4):
        save(data / "cat" / f"{number}.jpg", noise(40 + 10 * number, 64))
    save(data / "dog" / "a.png", noise(20, 100))
    save(data / "dog" / "b.png", noise(50, 50, 4))
    save(data / "lone" / "c.png", noise(48, 48, 1))
    (data / "dog" / "notes.txt").write_text("x")
    code, lines, report = check(data)
    assert code == 0
    assert lines[-1] == "a run would start"
    assert under(lines, "images") == ["7 images in 3 classes; ignored 1 other file"]
    assert under(lines, "classes") == ["largest cat 4, smallest lone 1: 4.0 to 1", "1 class of one image: lone"]
    assert under(lines, "forms") == ["JPEG 4; PNG L 1; PNG RGB 1; PNG RGBA 1"]
    assert under(lines, "height") == ["min 20, median 50, max 70"]
    assert under(lines, "width") == ["min 48, median 64, max 100"]
    assert under(lines, "aspect") == [f"1 image longer than 4 to 1, at most 5 to 1: {data}/dog/a.png"]
    assert under(lines, "small") == ["1 image below 32 x 32 would be enlarged"]
    assert under(lines, "bad") == ["none"]
    assert under(lines, "duplicates") == ["none"]
    assert report["classes"] == {"cat": 4, "dog": 2, "lone": 1}
    assert report["height"] == {"min": 20, "median": 50.0, "max": 70}
    assert report["usable"] == report["looked_at"] == report["images"] == 7
    assert not [line for line in lines if "WARNING" in line]


def test_mean_and_std_are_numpys_over_the_images_each_alike(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    images = [noise(30, 40) // np.array([1, 2, 4], dtype=np.uint8) for _ in range(5)] + [noise(90, 120)]
    for number, pixels in enumerate(images):
        save(data / f"{number}.png", pixels)
    _, lines, report = check(data)
    mean, std = each_alike(images)
    np.testing.assert_allclose(report["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(report["std"], std, rtol=1e-9)
    numbers = [" ".join(f"{value:.4f}" for value in values) for values in (mean, std)]
    assert under(lines, "pixels") == [f"--data.mean {numbers[0]} --data.std {numbers[1]}"]
    _, lines, _ = check(data, "--value-range", "0", "300.125", "--background", "7", "8", "9")
    assert under(lines, "pixels")[0].endswith("--data.value-range 0 300.125 --data.background 7 8 9")


def test_grey_as_colour_and_blank_images_are_counted(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    save(data / "a.png", np.repeat(noise(40, 40, 1), 3, axis=2))
    save(data / "b.png", noise(40, 40, 1))  # honest grey
    save(data / "c.png", np.full((40, 40, 3), (10, 200, 30), dtype=np.uint8))
    save(data / "d.png", noise(40, 40))
    # The same levels in each channel, at other places.
    turned = noise(40, 40, 1)
    save(data / "e.png", np.concatenate([turned, turned[::-1], turned[:, ::-1]], axis=2))
    _, lines, report = check(data)
    assert under(lines, "grey") == ["1 image stored as colour with all channels the same"]
    assert under(lines, "blank") == [f"1 image of one colour throughout: {data}/c.png"]
    assert (report["grey"], report["blank"]) == (1, 1)


def test_bad_files_by_kind_all_in_the_list(check: Callable[..., Any], tmp_path: Path, encode: Callable[..., bytes]):
    data = pictures(tmp_path / "data", 6)
    for number in range(5):
        (data / f"empty{number}.jpg").write_bytes(b"")
    (data / "text.jpg").write_bytes(b"hello")
    cut = encode(noise(64, 64), "PNG")
    (data / "cut.png").write_bytes(cut[: len(cut) // 2])
    (data / "gone.png").symlink_to(data / "nowhere")
    os.mkfifo(data / "pipe.png")
    code, lines, report = check(data)
    assert code == 0
    assert report["bad"] == {"empty": 5, "not an image": 1, "truncated": 1, "missing": 1, "not a file": 1}
    assert under(lines, "bad")[:5] == [
        "9 of 15 images (60.00%); max_bad 1% allows 10 in all",
        "5 empty:",
        *(f"  image {7 + number}: {data}/empty{number}.jpg: empty file" for number in range(3)),
    ]
    rows = (tmp_path / "out" / "bad_files.csv").read_text().splitlines()
    assert (rows[0], len(rows)) == ("index,kind,file,reason", 10)
    assert rows[1].startswith(f"6,truncated,{data}/cut.png,")
    assert [row.split(",")[1] for row in rows[1:]].count("empty") == 5
    assert report["usable"] == 6


def test_some_images_drawn_evenly_and_a_weighted_mixture(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(10):
        save(data / f"{number}.png", noise(32 + number, 40))
    _, lines, report = check(data, "--images", "5")
    assert under(lines, "looked at") == ["5 of them, drawn evenly"]
    assert report["height"] == {"min": 32, "median": 36.0, "max": 40}
    assert under(lines, "duplicates") == ["none among the images looked at"]
    code, lines, report = check(f"1 * folder:{data} + 3 * folder:{data}", "--images", "50")
    assert under(lines, "looked at") == []
    assert (code, report["looked_at"], report["usable"]) == (0, 20, 20)
    assert "drawn" in under(lines, "images")[0]
    rates = report["rates"]
    assert rates["decode_per_core"] > rates["looked_at"] > 0  # looking takes more than decoding
    assert rates["training_crops"] > 0
    assert under(lines, "rate")[0].endswith("looked at in all (no workers)")
    assert torch.get_num_threads() == 1  # as it was before


def test_classes_like_splits_and_one_huge_class():
    def warnings(labels: list[int], *names: str) -> list[str]:
        classes = Classes.of(ListSource([b""] * len(labels), labels, names))
        assert classes is not None
        return classes.warnings()

    assert warnings([0] * 17 + [1] * 2 + [2], "cat", "Val", "dog") == [
        "classes called Val: if they are splits, give the folder of one of them",
        "the class cat holds 85.0% of the images",
    ]
    assert warnings([0, 0, 0, 1], "cat", "dog") == []
    assert Classes.of(ListSource([b""])) is None
