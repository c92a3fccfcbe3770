"""Images that are nearly those of another split."""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from mpp.curation.check_report import Grouped
from mpp.curation.near_duplicates import near_duplicates, perceptual_hashes
from mpp.curation.scan import GOOD, ScanResult
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.names import Split
from tests.curation.made import under


def scene(seed: int, side: int = 120) -> Image.Image:
    """Smooth colours, as photographs have."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side + 30, 3)), (8, 8, 0))
    return Image.fromarray(np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth)))


def scans(**hashes: np.ndarray) -> dict[Any, tuple[Source, ScanResult]]:
    """Results of splits whose images are thumbnails."""
    found: dict[Split, tuple[Source, ScanResult]] = {}
    for split, thumbs in hashes.items():
        result = ScanResult(np.arange(len(thumbs)), 3)
        result.flags[:], result.thumbs[:] = GOOD, thumbs
        result.pixels[:] = np.arange(len(thumbs)) + 10**6 * len(found)
        found[split] = ListSource(thumbs), result  # type: ignore[index]
    return found


def test_changed_copies_in_the_test_split_are_named_and_others_are_not(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(12):
        folder = data / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / f"{number}.png")
    (data / "test" / "a").mkdir(parents=True)
    (data / "test" / "b").mkdir()
    scene(3).save(data / "test" / "a" / "compressed.jpg", quality=40)
    scene(4).resize((60, 50)).save(data / "test" / "a" / "small.png")
    ImageEnhance.Brightness(scene(5)).enhance(1.15).save(data / "test" / "b" / "bright.png")
    scene(6).save(data / "test" / "b" / "equal.png")  # which the duplicates have
    for number in range(100, 110):
        scene(number).save(data / "test" / "b" / f"new{number}.png")
    Image.new("RGB", (50, 50)).save(data / "train" / "a" / "blank.png")
    Image.new("RGB", (60, 60)).save(data / "test" / "a" / "blank.png")
    _, lines, report = check(data)
    assert under(lines, "near")[0] == "3 pairs of different splits, of hashes that differ in at most 6 of 64 bits"
    assert under(lines, "near")[1].startswith(f"{data}/test/a/compressed.jpg of test ~ {data}/train/b/3.png of train")
    assert any(line.startswith("WARNING: 3 images of the test split nearly the same as one of the") for line in lines)
    listed = report["near_duplicates"]["listed"]
    assert [(Path(one["file"]).name, Path(one["of_file"]).name) for one in listed] == [
        ("compressed.jpg", "3.png"),
        ("small.png", "4.png"),
        ("bright.png", "5.png"),
    ]
    assert len((tmp_path / "out" / "near_duplicates.csv").read_text().splitlines()) == 4
    with Image.open(tmp_path / "out" / "near_duplicates.png") as sheet:
        assert sheet.width > 6 * 100
    _, lines, report = check(data, "--near", "-1")
    assert report["near_duplicates"]["pairs"] == 0
    assert not (tmp_path / "out" / "near_duplicates.png").exists()


def test_every_pair_within_the_threshold_is_found_as_by_comparing_all():
    rng = np.random.default_rng(0)
    base = np.stack([np.asarray(scene(seed).convert("L").resize((16, 16))) for seed in range(150)])
    changed = np.uint8((base + rng.normal(0, 3, base.shape)).clip(0, 255))
    splits = scans(train=base, test=changed)
    mine, theirs = perceptual_hashes(changed), perceptual_hashes(base)
    bits = np.bitwise_count(mine[:, None] ^ theirs[None])
    alike = [i for i in range(150) if np.corrcoef(base[i].ravel(), changed[i].ravel())[0, 1] >= 0.98]
    for most in (0, 3, 4, 7):
        found = {(near.index, near.of_index): near.bits for near in near_duplicates(splits, most)}
        assert found == {(i, i): int(bits[i, i]) for i in alike if bits[i, i] <= most}
        assert len(found) > {0: 10, 3: 60, 4: 60, 7: 100}[most]


def test_frames_of_one_scene_take_little_memory():
    """All pairs are near, and each image has its nearest."""
    noise = np.random.default_rng(0).normal(0, 2, (600, 16, 16))
    thumbs = np.uint8((np.asarray(scene(0).convert("L").resize((16, 16))) + noise).clip(0, 255))
    tracemalloc.start()
    found = near_duplicates(scans(train=thumbs[:300], test=thumbs[300:]), 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6
    hashes = perceptual_hashes(thumbs)
    bits = np.bitwise_count(hashes[300:, None] ^ hashes[None, :300])
    assert len(found) > 250
    assert [(near.of_index, near.bits) for near in found] == [
        (int(row.argmin()), int(row.min())) for row in bits if row.min() <= 6
    ]


def test_thirty_thousand_images_take_seconds():
    rng = np.random.default_rng(0)
    thumbs = ndimage.gaussian_filter(rng.normal(size=(30_000, 16, 16)).astype(np.float32), (0, 2, 2))
    thumbs = np.uint8((128 + 400 * thumbs).clip(0, 255))
    start = time.process_time()
    found = near_duplicates(scans(train=thumbs[:24_000], test=np.concatenate([thumbs[24_000:], thumbs[:50]])), 4)
    assert time.process_time() - start < 20
    assert {(near.index - 6_000, near.of_index) for near in found} >= {(i, i) for i in range(50)}


def test_groups_that_splits_share_are_counted():
    class Named(ListSource):
        def record(self, index: int) -> str:
            return f"{self.name}{index}"

    sources: dict[Split, Source] = {
        "train": Named(np.zeros((6, 2, 2)), name="p"),
        "test": Named(np.zeros((3, 2, 2)), name="p"),
    }
    grouped = Grouped.of(sources, r"(p\d)")
    assert (grouped.number, grouped.shared) == (6, (("test", "train", 3, 3),))
    assert grouped.warnings() == ["3 groups of the train split also in the test split, 3 images there"]
    assert Grouped.of(sources, "") == (0, ())
    with pytest.raises(SourceError, match="matches no name"):
        Grouped.of(sources, "(x)")
