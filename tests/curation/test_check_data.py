"""Whether a run would start, on folders whose every image is known."""

import csv
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.cli import check_data
from mpp.data.loader import sequential
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.opening import open_source
from mpp.data.transform import EvalTransform
from mpp.dist import World
from mpp.errors import RunError
from mpp.model.settings import ModelConfig
from mpp.objective.objective import Survey
from mpp.pretraining.build import build
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import survey_source
from mpp.training.bad_files import BadFiles
from mpp.training.settings import TrainConfig
from tests.curation.made import noise, save, under


def test_images_of_too_many_bytes_are_bad(check: Callable[..., Any], tmp_path: Path):
    for number in range(3):
        save(tmp_path / "data" / f"{number}.png", noise(40, 40))
    save(tmp_path / "data" / "large.png", np.zeros((600, 500, 3), dtype=np.uint8))
    with (tmp_path / "data" / "file.jpg").open("wb") as file:
        file.truncate(2**36)
    assert check(tmp_path / "data")[2]["bad"] == {"too large": 1}
    assert check(tmp_path / "data", "--max-image-mb", "1")[2]["bad"] == {"too large": 2}
    assert check(tmp_path / "data", "--data.max-image-mb", "1", "--workers", "1")[2]["bad"] == {"too large": 2}


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


def test_warnings_of_the_source_are_among_the_others(check: Callable[..., Any], tmp_path: Path):
    save(tmp_path / "data" / "0.png", noise(40, 40))
    save(tmp_path / "data" / "1.png", noise(40, 40))
    for number in range(3):
        (tmp_path / "data" / f"{number}.heic").touch()
    _, lines, report = check(tmp_path / "data")
    (warning,) = open_source(f"folder:{tmp_path / 'data'}").warnings
    assert f"WARNING: {warning}" in lines
    assert report["warnings"][0] == warning


def test_images_that_are_no_files_are_named_in_every_list(check: Callable[..., Any], tmp_path: Path):
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    png = save(tmp_path / "0.png", noise(40, 40)).read_bytes()
    held = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate([png, b"", png, png[:99]])]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": held}), tmp_path / "d" / "train.parquet")
    _, lines, _ = check(f"hf:{tmp_path / 'd'}", "--max-bad", "100%")
    rows = [f"row {i} of hf:{tmp_path / 'd'} ({i}.png)" for i in range(4)]
    for name, named in (("bad_files", [rows[1], rows[3]]), ("duplicates", [rows[0], rows[2]])):
        with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
            assert [row["file"] for row in csv.DictReader(file)] == named
    assert f"{rows[0]} = {rows[2]}" in "\n".join(lines)
    files, source = BadFiles(tmp_path / "run.csv", 1.0), open_source(f"hf:{tmp_path / 'd'}")
    batch = next(iter(sequential(source, EvalTransform((8, 8)), DecodeOptions(), range(4), batch_size=4)))
    files.add(batch["bad"], 4)
    assert [row.split(",")[2] for row in (tmp_path / "run.csv").read_text().splitlines()[1:]] == [rows[1], rows[3]]


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


def test_a_disk_that_fills_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in range(2):
        save(tmp_path / "data" / f"{number}.png", noise(40, 40))
    monkeypatch.setattr("mpp.curation.check_data.write_csv", full)
    words = ["--data", f"folder:{tmp_path / 'data'}", "--out", str(tmp_path / "out"), "--img-size", "32"]
    assert check_data([*words, "--workers", "0"]) == 1
    assert f"cannot write to {tmp_path / 'out'} (No space left on device); make room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "no images to look at: give --data"),
        (("--data", "folder:/nowhere/at/all"), "there is no folder /nowhere/at/all"),
        (("--data", "demo", "--img-size", "30"), "img_size [30] is not a multiple of patch_size [16]"),
        (("--data", "demo", "--value-range", "0", "1", "0", "2"), "data.value_range takes low high, or 3 such pairs"),
        (("--data", "demo", "--out", "/dev/null/x"), "--out /dev/null/x cannot be written to (Not a directory)"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], expected: str):
    assert check_data(list(flags)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert expected in printed.err


@pytest.mark.parametrize(("flag", "value"), [("images", "-4"), ("bits", "9")])
def test_a_number_out_of_range_is_named(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data(["--data", "demo", f"--{flag}", value]) == 2
    assert re.fullmatch(rf"check_data: error: {flag} is .*, got {value}\n", capsys.readouterr().err)


def test_what_an_earlier_look_found_stays_where_a_later_one_does_not_start(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "bad_files.csv").write_text("of an earlier look")
    assert check_data(["--data", f"folder:{tmp_path / 'gone'}", "--out", str(out)]) == 2
    assert (out / "bad_files.csv").read_text() == "of an earlier look"
