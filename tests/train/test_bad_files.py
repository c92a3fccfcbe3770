"""Files that could not be decoded are counted once, named, and too many of them end the run."""

import csv
from pathlib import Path

import pytest

from mpp.errors import RunError
from mpp.train.bad_files import BadFiles


def test_bad_files_end_a_run_past_the_share(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    bad = BadFiles(path, 0.01)
    bad.add([], 16)
    assert not path.exists()
    # Of the first 1,000 images: 10 may be bad, however few have been read.
    for index in range(10):
        bad.add([(index, f"file {index}: broken, badly")], 16)
    with pytest.raises(RunError, match=r"^11 of the first 192 images .* data\.max_bad .*image 10: the last") as caught:
        bad.add([(10, "the last")], 16)
    assert str(path) in str(caught.value)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [[str(index), f"file {index}: broken, badly"] for index in range(10)] + [["10", "the last"]]


def test_bad_files_are_a_share_of_the_images_read() -> None:
    bad = BadFiles(None, 0.01)
    bad.add([], 5000)
    bad.add([(index, "broken") for index in range(50)], 0)
    assert len(bad) == 50
    with pytest.raises(RunError, match=r"^51 of the first 5000 images"):
        bad.add([(50, "broken")], 0)


def test_a_bad_file_counts_once(tmp_path: Path) -> None:
    bad = BadFiles(tmp_path / "bad_files.csv", 0.001)
    for _ in range(20):
        bad.add([(3, "broken"), (3, "broken")], 16)
    assert len(bad) == 1
    assert (tmp_path / "bad_files.csv").read_text().splitlines() == ["3,broken"]


def test_a_max_bad_of_nothing_allows_none() -> None:
    with pytest.raises(RunError, match=r"^1 of the first 8 images"):
        BadFiles(None, 0.0).add([(0, "broken")], 8)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    BadFiles(path, 0.01).add([(3, "broken"), (5, "torn, too")], 640)
    again = BadFiles(path, 0.01, read=640)
    assert len(again) == 2
    again.add([(3, "broken"), (9, "new")], 16)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["3", "5", "9"]


def test_a_fresh_run_forgets_what_an_earlier_start_named(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    BadFiles(path, 0.01).add([(3, "broken")], 640)
    assert len(BadFiles(path, 0.01)) == 0
    assert not path.exists()


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    path.write_text("3,broken\n5")
    assert len(BadFiles(path, 0.01, read=16)) == 1
