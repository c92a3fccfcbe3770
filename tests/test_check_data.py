"""The pre-flight, on folders whose every image is known."""

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mpp.checking.classes import Classes
from mpp.checking.look import look
from mpp.checking.scan import scan
from mpp.checking.sheet import CAPTION, MARGIN, TILE, spread_over_classes
from mpp.checking.values import Kind, Spread, propose
from mpp.cli import check_data
from mpp.data.config import DataConfig, Reading
from mpp.data.transform import EvalTransform
from mpp.dist import World
from mpp.errors import RunError
from mpp.model.config import ModelConfig
from mpp.objective.objective import Survey
from mpp.objective.picture import to_rgb
from mpp.parts import build, survey_source
from mpp.recipes import PretrainConfig
from mpp.sources.base import ListSource
from mpp.train.bad_files import BadFiles
from mpp.train.config import TrainConfig
from tests.data.zoo import CASES, Case

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, **options)
    return path


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`check(data, "--images", "3")`: exit code, printed lines and report.json."""

    def run(data: str | Path, *flags: str) -> tuple[int, list[str], dict[str, Any]]:
        out = tmp_path / "out"
        spec = data if isinstance(data, str) else f"folder:{data}"
        size = () if "--img-size" in flags else ("--img-size", "32")
        workers = () if "--workers" in flags else ("--workers", "0")
        code = check_data(["--data", spec, "--out", str(out), *size, *workers, *flags])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out.splitlines(), json.loads((out / "report.json").read_text())

    return run


def under(lines: list[str], title: str) -> list[str]:
    """What the report says under a title."""
    found: list[str] = []
    inside = False
    for line in lines:
        inside = line.startswith(f"{title:<13}") or (inside and line.startswith(" " * 13))
        if inside:
            found.append(line[13:])
    return found


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
    assert under(lines, "classes") == [
        "largest cat 4, smallest lone 1: 4.0 to 1",
        "1 class of one image: lone",
    ]
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
    scaled = [pixels.reshape(-1, 3) / 255 for pixels in images]
    mean = np.mean([pixels.mean(axis=0) for pixels in scaled], axis=0)
    std = np.sqrt(np.mean([(pixels**2).mean(axis=0) for pixels in scaled], axis=0) - mean**2)
    np.testing.assert_allclose(report["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(report["std"], std, rtol=1e-9)
    line = under(lines, "pixels")[0]
    found = re.fullmatch(r"--data.mean (.+) (.+) (.+) --data.std (.+) (.+) (.+)", line)
    assert found
    np.testing.assert_allclose([float(figure) for figure in found.groups()], [*mean, *std], atol=5.1e-5)


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
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(6):
        save(data / f"good{number}.png", noise(40, 40))
    for number in range(5):
        (data / f"empty{number}.jpg").write_bytes(b"")
    (data / "text.jpg").write_bytes(b"hello")
    cut = encode(noise(64, 64), "PNG")
    (data / "cut.png").write_bytes(cut[: len(cut) // 2])
    (data / "gone.png").symlink_to(data / "nowhere")
    os.mkfifo(data / "pipe.png")
    code, lines, report = check(data)
    assert code == 0
    kinds = {"empty": 5, "not an image": 1, "truncated": 1, "missing": 1, "not a file": 1}
    assert report["bad"] == kinds
    bad = under(lines, "bad")
    assert bad[0] == "9 of 15 images (60.00%); max_bad 1% allows 10 in all"
    assert bad[1:5] == [
        "5 empty:",
        f"  image 1: {data}/empty0.jpg: empty file",
        f"  image 2: {data}/empty1.jpg: empty file",
        f"  image 3: {data}/empty2.jpg: empty file",
    ]
    rows = (out / "bad_files.csv").read_text().splitlines()
    assert rows[0] == "index,kind,file,reason"
    assert len(rows) == 10
    assert rows[1].startswith(f"0,truncated,{data}/cut.png,")
    assert [row.split(",")[1] for row in rows[1:]].count("empty") == 5
    assert report["usable"] == 6


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
    assert [(row[0], row[2], row[3]) for row in rows[1:]] == [
        ("0", "0", "cat"),
        ("0", "1", "cat"),
        ("0", "2", "dog"),
        ("1", "3", "dog"),
        ("1", "4", "dog"),
    ]
    hashes = [row[4] for row in rows[1:]]
    assert hashes[0] == hashes[1] != hashes[2]


def test_images_of_both_splits_are_found(check: Callable[..., Any], tmp_path: Path):
    data, twice = tmp_path / "data", noise(40, 40)
    for split, images in {"train": (twice, noise(40, 40)), "test": (twice, twice, noise(40, 40))}.items():
        for number, pixels in enumerate(images):
            save(data / split / ("a", "b")[number % 2] / f"{number}.png", pixels)
    save(data / "test" / "a" / "bad.png", noise(40, 40)).write_bytes(b"")
    _, lines, report = check(data)
    assert under(lines, "test split") == ["4 images looked at, 1 of them bad (1 empty)"]
    assert report["duplicates"]["test_images_in_train"] == 2
    warning = "WARNING: 2 images of the test split also in the train split: "
    assert any(line.startswith(f"{warning}{data}/train/a/0.png (a) of train = ") for line in lines)


def write_raw(data: Path, kind: str) -> list[np.ndarray]:
    """Three images of values that are known, as (H, W, C)."""
    data.mkdir(parents=True)
    if kind == "uint16 tiff":
        images = [RNG.integers(100, 4096, (50, 60, 1), dtype=np.uint16) for _ in range(3)]
        for number, values in enumerate(images):
            tifffile.imwrite(data / f"{number}.tif", values[:, :, 0])
    elif kind == "uint16 png":
        images = [RNG.integers(0, 1024, (50, 60, 1), dtype=np.uint16) for _ in range(3)]
        for number, values in enumerate(images):
            Image.fromarray(values[:, :, 0]).save(data / f"{number}.png")
    elif kind == "float tiff":
        images = [RNG.normal(0, 100, (50, 60, 1)).astype(np.float32) for _ in range(3)]
        for number, values in enumerate(images):
            tifffile.imwrite(data / f"{number}.tif", values[:, :, 0])
    elif kind == "planar tiff":
        images = [RNG.integers(0, 16384, (50, 60, 5), dtype=np.uint16) for _ in range(3)]
        for number, values in enumerate(images):
            tifffile.imwrite(
                data / f"{number}.tif", np.moveaxis(values, 2, 0), planarconfig="separate", photometric="minisblack"
            )
    elif kind == "paged tiff":
        images = [RNG.integers(0, 4096, (50, 60, 4), dtype=np.uint16) for _ in range(3)]
        for number, values in enumerate(images):
            with tifffile.TiffWriter(data / f"{number}.tif") as file:
                for page in np.moveaxis(values, 2, 0):
                    file.write(page, photometric="minisblack")
    else:
        images = [(RNG.random((50, 60, 5)) * [10, 100, 1000, 1, 2]).astype(np.float32) for _ in range(3)]
        for number, values in enumerate(images):
            np.save(data / f"{number}.npy", values)
    return images


@pytest.mark.parametrize(
    ("kind", "channels", "proposed"),
    [
        ("uint16 tiff", 3, (0, 4095)),
        ("uint16 png", 3, (0, 1023)),
        ("planar tiff", 5, (0, 16383)),
        ("paged tiff", 4, (0, 4095)),
        ("float tiff", 3, None),
        ("float npy", 5, None),
    ],
)
def test_values_and_the_range_to_state(
    check: Callable[..., Any], tmp_path: Path, kind: str, channels: int, proposed: tuple[int, int] | None
):
    images = write_raw(tmp_path / "data", kind)
    code, lines, report = check(tmp_path / "data", "--in-chans", str(channels))
    all_values = np.concatenate([values.reshape(-1, values.shape[2]) for values in images])
    (found,) = report["values"]
    for name, expected in (
        ("smallest", all_values.min(axis=0)),
        ("p0.1", np.percentile(all_values.astype(np.float64), 0.1, axis=0)),
        ("p99.9", np.percentile(all_values.astype(np.float64), 99.9, axis=0)),
        ("largest", all_values.max(axis=0)),
    ):
        np.testing.assert_allclose([channel[name] for channel in found["channels"]], expected, rtol=1e-12)
    assert found["images"] == 3
    assert code == (0 if proposed else 1)  # floating point beyond 0 to 1 has no range
    value_range = found["value_range"]
    if proposed:
        assert tuple(value_range) == proposed
    else:
        assert len(value_range) == 2 * (channels if channels == 5 else 1)
        low, high = np.array(value_range).reshape(-1, 2).T
        span = np.ptp(all_values, axis=0)
        assert (np.abs(low - np.percentile(all_values, 0.1, axis=0)) <= 0.002 * span).all()
        assert (np.abs(high - np.percentile(all_values, 99.9, axis=0)) <= 0.002 * span).all()
    flag = "--data.value-range " + " ".join(f"{value:g}" for value in value_range)
    assert any(flag in line for line in under(lines, "values"))
    # With the range that it proposes there is nothing left to say.
    ranged = ("--value-range", *(f"{value:g}" for value in value_range))
    code, _, report = check(tmp_path / "data", "--in-chans", str(channels), *ranged)
    assert (code, report["values"][0]["value_range"], report["bad"]) == (0, None, {})


def test_values_that_use_their_range_propose_nothing(check: Callable[..., Any], tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        tifffile.imwrite(tmp_path / "data" / f"{number}.tif", RNG.integers(0, 65536, (40, 40), dtype=np.uint16))
    _, lines, report = check(tmp_path / "data")
    assert report["values"][0]["value_range"] is None
    assert "value-range" not in "".join(lines)
    _, lines, report = check(tmp_path / "data", "--value-range", "0", "4095")
    assert "% of the values lie outside the stated range; --data.value-range 0 65535 would suit" in "".join(lines)


def test_values_that_are_not_finite_are_counted():
    spread = Spread(2)
    spread.add(np.array([[[0.0, np.nan], [4.0, np.inf]]]))
    assert spread.infinite == 2
    assert spread.smallest[0] == 0
    assert spread.largest[0] == 4
    assert np.isnan(spread.largest[1])
    assert propose(Kind("float64", 2), spread, Reading(2)) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_file_is_looked_at_as_it_is_decoded(case: Case):
    part = look(ListSource([case.make()]), [0], case.reading)
    assert [bad.kind for bad in part.bad] == ([case.kind] if case.kind else [])
    assert all(kind.dtype in form for kind in part.spreads for form in part.forms)
    if case.kind == "wrong channels":
        (held,) = part.channels
        assert held != case.reading.channels
        assert all(kind.channels == held for kind in part.spreads)


def test_percentiles_of_many_values_stay_near_in_bounded_memory():
    spread = Spread(4)
    for _ in range(100):
        part = Spread(4)
        part.add(RNG.integers(0, 10_000, (128, 128, 4), dtype=np.uint16))
        spread.merge(part)
    assert sum(part.size for part in spread._parts) <= 2**22
    low, high = spread.percentiles()
    np.testing.assert_allclose(low, 10, atol=3)
    np.testing.assert_allclose(high, 9989, atol=3)


def test_wrong_channels_name_those_that_fit(check: Callable[..., Any], tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in range(3):
        np.save(tmp_path / "data" / f"{number}.npy", noise(40, 40, 5))
    code, lines, report = check(tmp_path / "data")
    assert code == 1
    assert lines[-1] == (
        "a run would not start: 3 of 3 images cannot be used (3 wrong channels); "
        "--model.in-chans 5 would fit those of wrong channels"
    )
    assert report["bad"] == {"wrong channels": 3}
    code, lines, _ = check(tmp_path / "data", "--in-chans", "5")
    assert (code, lines[-1]) == (0, "a run would start")


def test_would_not_start(check: Callable[..., Any], tmp_path: Path):
    one = tmp_path / "one"
    save(one / "a.png", noise(40, 40))
    code, lines, _ = check(one)
    assert (code, lines[-1]) == (1, "a run would not start: there is one image only")
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(2):
        (bad / f"{number}.png").write_bytes(b"")
    code, lines, report = check(bad)
    assert (code, lines[-1]) == (1, "a run would not start: 2 of 2 images cannot be used (2 empty)")
    assert report["mean"] is None
    assert not report["would_start"]


@pytest.mark.parametrize("number", [3, 4])
def test_as_many_bad_files_as_a_run_would_take(check: Callable[..., Any], tmp_path: Path, number: int):
    data = tmp_path / "data"
    for image in range(6):
        save(data / f"{image}.png", noise(40, 40))
    for image in range(number):
        (data / f"empty{image}.png").write_bytes(b"")
    code, lines, report = check(data, "--max-bad", "0.3%")
    files = BadFiles(None, DataConfig(max_bad="0.3%").max_bad_share)
    bad = [type("B", (), {"index": i, "kind": "empty", "where": "", "reason": ""})() for i in range(number)]
    if number == 3:
        files.add(bad, 9)
        assert (code, lines[-1]) == (0, "a run would start")
    else:
        with pytest.raises(RunError):
            files.add(bad, 10)
        assert code == 1
        assert lines[-1].endswith("4 of 10 images cannot be used (4 empty), more than max_bad 0.3% allows")
    assert report["would_start"] is (number == 3)


def test_collapsed_targets_are_warned_of_as_by_a_run(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(4):
        save(data / f"{number}.png", noise(40, 40) // 16)
    _, lines, report = check(data)
    assert f"WARNING: {Survey(1, torch.tensor([9, 0]), torch.tensor([0])).warning}" in lines
    assert report["targets"]["counts"] == {"0": 512 * 4}
    assert under(lines, "targets") == [
        "1 of 512 classes occur in 512 images, effectively 1.0; the most frequent is 100.0% of the patches",
        "most frequent classes 0: 100.0%",
    ]


def test_targets_are_those_that_a_run_surveys(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(5):
        save(data / f"{number}.png", noise(40, 40) // 4 + 32 * number)
    _, _, report = check(data)
    config = PretrainConfig(
        data=DataConfig(f"folder:{data}", workers=0),
        model=ModelConfig("vit_tiny_patch16_224", (32,), embed_dim=48, depth=1, num_heads=3),
        train=TrainConfig(length="1 steps", batch_size=16, device="cpu"),
    )
    parts = build(config, World(), torch.device("cpu"))
    counts = survey_source(parts).counts
    assert counts is not None
    assert report["targets"]["counts"] == {str(int(c)): int(counts[c]) for c in counts.nonzero().flatten()}


def test_a_test_split_that_cannot_be_opened_is_no_reason_to_stop(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(2):
        save(data / "train" / f"{number}.png", noise(40, 40))
    (data / "test").mkdir()
    code, lines, _ = check(data)
    assert code == 0
    assert under(lines, "test split")[0].startswith("cannot be opened: folder:")


def test_target_histogram_is_of_the_colours_there_are(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        save(data / f"{number}.png", np.full((40, 40, 3), colour, dtype=np.uint8))
    _, _, report = check(data, "--bits", "1")
    assert report["targets"]["counts"] == {"1": 1024, "4": 1024}  # 4 r + 2 g + b, in each of 512 images 4 patches
    assert report["targets"]["perplexity"] == pytest.approx(2)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_says_the_same(check: Callable[..., Any], tmp_path: Path, workers: int):
    data = tmp_path / "data"
    for number in range(70):
        save(data / ("a", "b")[number % 2] / f"{number}.png", noise(36, 40 + number % 7))
    (data / "a" / "x.png").write_bytes(b"")
    tifffile.imwrite(data / "b" / "y.tif", RNG.integers(0, 300, (40, 40), dtype=np.uint16))
    found = []
    for count in (0, workers):
        code, lines, report = check(data, "--workers", str(count))
        del report["rates"]
        tables = [(tmp_path / "out" / name).read_bytes() for name in ("bad_files.csv", "duplicates.csv")]
        shown = [line for line in lines if "images/s" not in line and "crops/s" not in line]
        found.append((code, shown, report, tables))
    assert found[0] == found[1]


def test_some_images_drawn_evenly(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(10):
        save(data / f"{number}.png", noise(32 + number, 40))
    _, lines, report = check(data, "--images", "5")
    assert under(lines, "looked at") == ["5 of them, drawn evenly"]
    assert report["height"] == {"min": 32, "median": 36.0, "max": 40}
    assert under(lines, "duplicates") == ["none among the images looked at"]
    _, lines, report = check(data, "--images", "50")
    assert under(lines, "looked at") == []
    assert report["looked_at"] == 10


def test_weighted_mixture(check: Callable[..., Any], tmp_path: Path):
    for name, count in (("a", 3), ("b", 2)):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", noise(40, 40))
    code, lines, report = check(f"1 * folder:{tmp_path}/a + 3 * folder:{tmp_path}/b")
    assert code == 0
    assert report["usable"] == 5
    assert "drawn" in under(lines, "images")[0]


def test_classes_like_splits_and_one_huge_class():
    source = ListSource([b""] * 20, [0] * 17 + [1] * 2 + [2], ("cat", "Val", "dog"))
    classes = Classes.of(source)
    assert classes is not None
    assert classes.warnings() == [
        "classes called Val: if they are splits, give the folder of one of them",
        "the class cat holds 85.0% of the images",
    ]
    even = Classes.of(ListSource([b""] * 4, [0, 0, 0, 1], ("cat", "dog")))
    assert even is not None
    assert even.warnings() == []
    assert Classes.of(ListSource([b""])) is None


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


def test_tiles_are_drawn_evenly_over_the_classes():
    labels = np.repeat([0, 1, 2], [100, 10, 2])
    chosen = spread_over_classes(np.arange(112), labels, 30)
    assert np.bincount(labels[chosen]).tolist() == [18, 10, 2]
    assert len(np.unique(chosen)) == 30
    assert spread_over_classes(np.arange(5), None, 96).tolist() == [0, 1, 2, 3, 4]
    assert spread_over_classes(np.arange(200), np.arange(200), 96).size == 96
    assert spread_over_classes(np.arange(112), labels, 200).size == 112


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "no images to look at: give --data"),
        (("--data", "folder:/nowhere/at/all"), "there is no folder /nowhere/at/all"),
        (("--data", "demo", "--img-size", "30"), "img_size [30] is not a multiple of patch_size [16]"),
        (("--data", "demo", "--value-range", "0", "1", "0", "2"), "data.value_range takes low high, or 3 such pairs"),
        (("--data", "demo", "--out", "/dev/null/x"), "out /dev/null/x: cannot be written to"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], expected: str):
    assert check_data(list(flags)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert expected in printed.err


class Made:
    """Images made as they are read: no memory of their own."""

    name, classes = "made", None

    def __init__(self, length: int, deadly: int = -1) -> None:
        self.length, self.deadly = length, deadly

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> tuple[np.ndarray, None]:
        if index == self.deadly:
            os._exit(9)
        return np.full((2, 2, 3), index % 251, dtype=np.uint8) + np.arange(12, dtype=np.uint8).reshape(2, 2, 3), None

    def labels(self) -> None:
        return None

    def describe(self) -> str:
        return "made"


def test_memory_grows_by_a_few_bytes_an_image():
    def peak(length: int) -> int:
        tracemalloc.start()
        scan(Made(length), Reading(), np.arange(length), 0)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(4_000) - peak(1_000) < 3_000 * 60


def test_a_killed_process_is_one_clear_error():
    with pytest.raises(RunError, match="a process was killed, perhaps for want of memory: try fewer --workers"):
        scan(Made(200, deadly=70), Reading(), np.arange(200), 2)


def test_rates_are_of_this_machine(check: Callable[..., Any], tmp_path: Path):
    for number in range(3):
        save(tmp_path / "data" / f"{number}.png", noise(40, 40))
    _, lines, report = check(tmp_path / "data")
    rates = report["rates"]
    assert rates["decode_per_core"] > rates["looked_at"] > 0  # looking takes more than decoding
    assert rates["training_crops"] > 0
    assert under(lines, "rate")[0].endswith("looked at in all (no workers)")
    assert torch.get_num_threads() == 1  # as it was before
