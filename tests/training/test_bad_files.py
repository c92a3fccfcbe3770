"""Files that could not be decoded are counted once, named, and too many of them end the run."""

import csv
from pathlib import Path

import pytest

from mpp.data.reader import Bad
from mpp.errors import RunError
from mpp.training.bad_files import HEAD, BadFiles, summary_of


def bad(*indices: int, kind: str = "truncated") -> list[Bad]:
    return [Bad(index, kind, f"dir/{index}.jpg", "broken, badly") for index in indices]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_bad_files_end_a_run_past_the_share(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    files = BadFiles(path, 0.01)
    files.add([], 16)
    assert not path.exists()
    # Of the first 1,000 images: 10 may be bad, however few have been read.
    for index in range(10):
        files.add(bad(index, index, kind="empty" if index < 3 else "truncated"), 16)  # each counts once
    with pytest.raises(RunError) as caught:
        files.add(bad(2, 10), 16)
    assert str(caught.value) == (
        "11 of the first 192 images cannot be used (8 truncated, 3 empty), more than data.max_bad allows; "
        f"the last is image 10: dir/10.jpg: broken, badly; all are in {path}: mend them, or raise data.max_bad"
    )
    kinds = ["empty"] * 3 + ["truncated"] * 8
    named = [[str(index), kind, f"dir/{index}.jpg", "broken, badly"] for index, kind in enumerate(kinds)]
    assert rows(path) == [list(HEAD), *named]


@pytest.mark.parametrize(("share", "read", "allowed"), [(0.01, 5000, 50), (0.001, 16, 1), (0.0, 8, 0)])
def test_the_share_is_of_the_images_read(share: float, read: int, allowed: int) -> None:
    files = BadFiles(None, share)
    files.add([], read)
    files.add(bad(*range(allowed)), 0)
    assert len(files) == allowed
    with pytest.raises(RunError, match=rf"^{allowed + 1} of the first {read:,} images"):
        files.add(bad(allowed), 0)


def test_any_name_can_be_written(tmp_path: Path) -> None:
    names = ["a\nb.jpg", 'say "cheese", please.jpg', "caf\udce9.jpg", "日本.jpg"]
    files = BadFiles(tmp_path / "bad_files.csv", 1.0)
    files.add([Bad(index, "empty", name, "empty file") for index, name in enumerate(names)], 16)
    assert [row[2] for row in rows(tmp_path / "bad_files.csv")[1:]] == names


def test_a_resumed_run_goes_on_counting_and_a_fresh_one_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.csv"
    BadFiles(path, 0.01).add(bad(3, 5), 640)
    with path.open("a") as file:
        file.write("9,emp")  # cut short by a crash
    again = BadFiles(path, 0.01, read=640)
    assert len(again) == 2
    again.add(bad(3, 9), 16)
    assert [row[:2] for row in rows(path)] == [["index", "kind"], *([i, "truncated"] for i in "359")]
    assert len(BadFiles(path, 0.01)) == 0
    assert not path.exists()


def test_bad_files_of_all_ranks_are_summed_up_once(tmp_path: Path) -> None:
    assert summary_of(tmp_path) == ""
    BadFiles(tmp_path / "bad_files.csv", 1.0).add(bad(1, 2), 16)
    BadFiles(tmp_path / "bad_files.rank1.csv", 1.0).add([*bad(2), *bad(7, kind="empty")], 16)
    files = f"{tmp_path / 'bad_files.csv'}, {tmp_path / 'bad_files.rank1.csv'}"
    assert summary_of(tmp_path) == f"3 images could not be used (2 truncated, 1 empty): {files}"
