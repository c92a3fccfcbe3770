"""Whether a run would start, on folders whose every image is known."""

import csv
import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.cli import check_data
from mpp.data.loader import sequential
from mpp.data.reader import Bad
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.opening import open_source
from mpp.data.transform import EvalTransform
from mpp.dist import World
from mpp.errors import RunError
from mpp.model.settings import ModelConfig
from mpp.objective.objective import Survey
from mpp.pretraining.build import build
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.survey import survey_source, surveyed_images
from mpp.training.bad_files import BadFiles
from mpp.training.settings import TrainConfig
from tests.curation.made import noise, pictures, save, under


@pytest.mark.slow
def test_images_of_too_many_bytes_are_bad(check: Callable[..., Any], tmp_path: Path):
    data = pictures(tmp_path / "data", 3)
    save(data / "large.png", np.zeros((600, 500, 3), dtype=np.uint8))
    with (data / "file.jpg").open("wb") as file:
        file.truncate(2**36)
    assert check(data)[2]["bad"] == {"too large": 1}
    assert check(data, "--max-image-mb", "1")[2]["bad"] == {"too large": 2}
    assert check(data, "--data.max-image-mb", "1", "--workers", "1")[2]["bad"] == {"too large": 2}


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
    code, lines, _ = check(pictures(tmp_path / "one", 1))
    assert (code, lines[-1]) == (1, "a run would not start: there is one image only")
    bad = pictures(tmp_path / "bad", 2)
    for path in bad.iterdir():
        path.write_bytes(b"")
    code, lines, report = check(bad)
    assert (code, lines[-1]) == (1, "a run would not start: 2 of 2 images cannot be used (2 empty)")
    assert report["mean"] is None
    assert not report["would_start"]


@pytest.mark.parametrize("number", [3, 4])
def test_as_many_bad_files_as_a_run_would_take(check: Callable[..., Any], tmp_path: Path, number: int):
    data = pictures(tmp_path / "data", 6)
    for image in range(number):
        (data / f"empty{image}.png").write_bytes(b"")
    code, lines, report = check(data, "--max-bad", "0.3%")
    files = BadFiles(None, DataConfig(max_bad="0.3%").max_bad_share)
    with pytest.raises(RunError) if number == 4 else nullcontext():
        files.add([Bad(image, "empty", "", "") for image in range(number)], 6 + number)
    assert (code, report["would_start"]) == (int(number == 4), number == 3)
    reason = "not start: 4 of 10 images cannot be used (4 empty), more than max_bad 0.3% allows"
    assert lines[-1] == f"a run would {reason if number == 4 else 'start'}"


def test_images_that_are_no_files_are_named_in_every_list(check: Callable[..., Any], tmp_path: Path):
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    png = save(tmp_path / "0.png", noise(40, 40)).read_bytes()
    held = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate([png, b"", png, png[:99]])]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": held}), tmp_path / "d" / "train.parquet")
    spec = f"hf:{tmp_path / 'd'}"
    _, lines, _ = check(spec, "--max-bad", "100%")
    files = BadFiles(tmp_path / "out" / "run.csv", 1.0)
    batch = next(iter(sequential(open_source(spec), EvalTransform((8, 8)), DecodeOptions(), range(4), batch_size=4)))
    files.add(batch["bad"], 4)
    rows = [f"row {i} of {spec} ({i}.png)" for i in range(4)]
    bad, twice = [rows[1], rows[3]], [rows[0], rows[2]]
    for name, named in (("bad_files", bad), ("duplicates", twice), ("run", bad)):
        with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
            assert [row["file"] for row in csv.DictReader(file)] == named
    assert " = ".join(twice) in "\n".join(lines)


def test_targets_are_those_that_a_run_surveys(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(5):
        save(data / f"{number}.png", noise(40, 40) // 4 + 32 * number)
    _, _, report = check(data, crops=512)
    config = PretrainConfig(
        data=DataConfig(f"folder:{data}", workers=0),
        model=ModelConfig("vit_tiny_patch16_224", (32,), embed_dim=48, depth=1, num_heads=3),
        train=TrainConfig(length="1 steps", batch_size=16, device="cpu"),
    )
    parts = build(config, World(), torch.device("cpu"))
    counts = survey_source(parts, surveyed_images(parts)).counts
    assert counts is not None
    assert report["targets"]["counts"] == {str(int(c)): int(counts[c]) for c in counts.nonzero().flatten()}


def test_a_test_split_that_cannot_be_opened_is_no_reason_to_stop_and_warnings_of_the_source_are_among_the_others(
    check: Callable[..., Any], tmp_path: Path
):
    pictures(tmp_path / "data" / "train", 2)
    (tmp_path / "data" / "test").mkdir()
    for number in range(3):
        (tmp_path / "data" / "train" / f"{number}.jp2").touch()
    code, lines, report = check(tmp_path / "data")
    assert code == 0
    assert under(lines, "test split")[0].startswith("cannot be opened: folder:")
    (warning,) = open_source(f"folder:{tmp_path / 'data'}").warnings
    assert f"WARNING: {warning}" in lines
    assert report["warnings"][0] == warning


def test_target_histogram_is_of_the_colours_there_are(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        save(data / f"{number}.png", np.full((40, 40, 3), colour, dtype=np.uint8))
    _, _, report = check(data, "--bits", "1", crops=512)
    assert report["targets"]["counts"] == {"1": 1024, "4": 1024}  # 4 r + 2 g + b, in each of 512 images 4 patches
    assert report["targets"]["perplexity"] == pytest.approx(2)
    save(data / "1.png", np.full((40, 40, 3), (240, 0, 0), dtype=np.uint8))
    _, lines, report = check(data, "--bits", "1", crops=512)
    assert report["targets"]["counts"] == {"4": 2048}
    assert f"WARNING: {Survey(1, torch.tensor([9, 0]), torch.tensor([0])).warning}" in lines  # as by a run
    assert under(lines, "targets") == [
        "1 of 8 classes occur in 512 images, effectively 1.0; the most frequent is 100.0% of the patches",
        "most frequent classes 4: 100.0%",
    ]


def test_a_disk_that_fills_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mpp.curation.check_data.write_csv", full)
    data, out = pictures(tmp_path / "data", 2), tmp_path / "out"
    assert check_data(["--data", f"folder:{data}", "--out", str(out), "--img-size", "32", "--workers", "0"]) == 1
    assert f"cannot write to {out} (No space left on device); make room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "no images to look at: give --data"),
        ("--data folder:/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("--data demo --img-size 30", "img_size [30] is not a multiple of patch_size [16]"),
        ("--data demo --value-range 0 1 0 2", "data.value_range takes low high, or 3 such pairs"),
        ("--data demo --out /dev/null/x", "--out /dev/null/x cannot be written to (Not a directory)"),
        ("--data demo --images -4", "check_data: error: images is at least 0 (all of them), got -4"),
        ("--data demo --bits 9", "check_data: error: bits is 1 to 8, got 9"),
    ],
)
def test_bad_input_is_one_line_and_leaves_what_an_earlier_look_found(
    capsys: pytest.CaptureFixture[str], flags: str, expected: str, tmp_path: Path
):
    (tmp_path / "bad_files.csv").write_text("of an earlier look")
    assert check_data(["--out", str(tmp_path), *flags.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert expected in printed.err
    assert (tmp_path / "bad_files.csv").read_text() == "of an earlier look"
