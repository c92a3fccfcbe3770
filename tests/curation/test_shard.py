"""Packing into shards: the same images come back."""

import csv
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.curation import pack_task
from mpp.data.sources.opening import open_source
from tests.curation.made import complaint, contents, manifest, members, noise, pack, shards


def test_a_folder_comes_back_byte_for_byte(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / """my shards [1] {a,b} + 2 * "it's"?"""
    assert pack(images, out, "--shard-images", "7", "--no-shuffle") == 0
    told = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert told[-2:] == ["--run-dir", f"runs/{out.name}"]
    before, after = open_source(f"folder:{images}"), open_source(told[told.index("--data") + 1])
    assert [after.read(i) for i in range(len(after))] == [before.read(i) for i in range(len(before))]
    assert after.classes == before.classes == ("class 0", "class 1", "class 2")
    held = manifest(out)
    start = told.index("--data.mean") + 1
    assert [float(value) for value in told[start : start + 3]] == held["mean"]
    assert (held["images"], held["classes"]) == (40, {"class 0": 14, "class 1": 13, "class 2": 13})
    assert [each["images"] for each in held["shards"]] == [7, 7, 7, 7, 7, 5]
    found: list[tarfile.TarInfo] = []
    for each in held["shards"]:
        path = out / each["name"]
        assert (path.stat().st_size, pack_task.sha256(path)) == (each["bytes"], each["sha256"])
        assert Path(f"{path}.index").is_file()
        with tarfile.open(path) as tar:
            found += tar.getmembers()
    # As WebDataset names them.
    assert [member.name.partition(".")[0] for member in found] == [f"{place:09d}" for place in range(40) for _ in "ab"]
    assert all(member.name.endswith(".cls") for member in found[1::2])
    owners = {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in found}
    assert owners == {(0, 0, 0, "", 0o644)}


@pytest.mark.slow
def test_the_shuffle_is_by_the_seed_and_the_bytes_are_the_same_by_any_number_of_workers(
    images: Path, tmp_path: Path
) -> None:
    for name, seed, workers in (("a", "1", 1), ("b", "1", 2), ("c", "2", 5), ("d", "1", 5)):
        assert pack(images, tmp_path / name, "--shard-images", "9", "--seed", seed, workers=workers) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "d")
    a, c = (list(members(tmp_path / name).values()) for name in "ac")
    assert a != c
    assert sorted(a) == sorted(c)
    before = open_source(f"folder:{images}")
    assert sorted(a[::2]) == sorted(before.read(i)[0] for i in range(40))


def test_shards_keep_to_the_bytes(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(11):
        side = 700 if number == 5 else 320  # about 1.5 MB, and 300 kB
        (folder / f"{number:02d}.png").write_bytes(encode(noise(side, side, seed=number)))
    assert pack(folder, tmp_path / "out", "--shard-mb", "1", "--shard-images", "8", "--no-shuffle") == 0
    found = manifest(tmp_path / "out")["shards"]
    assert [each["name"] for each in found] == [f"shards-{number:06d}.tar" for number in range(len(found))]
    assert [each["images"] for each in found] == [3, 2, 1, 2, 3]
    assert [each["bytes"] > 10**6 for each in found] == [False, False, True, False, False]
    after, before = open_source(shards(tmp_path / "out")), open_source(f"folder:{folder}")
    assert [after.read(i) for i in range(11)] == [before.read(i) for i in range(11)]


def test_images_without_a_label_have_no_cls(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["path,label", "class 0/00.jpg,cat", "class 1/01.png,", "class 2/02.webp,dog"]
    (images / "list.csv").write_text("\n".join(rows))
    assert pack(f"csv:{images / 'list.csv'}", tmp_path / "out", "--no-shuffle") == 0
    assert [name for name in members(tmp_path / "out") if name.endswith("cls")] == ["000000000.cls", "000000002.cls"]
    held = manifest(tmp_path / "out")
    assert (held["classes"], held["unlabelled"]) == ({"cat": 1, "dog": 1}, 1)
    assert "1 have no label" in capsys.readouterr().out


def test_bad_files_are_left_out_and_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"empty.jpg": "empty", "text.png": "not an image", "gone.png": "missing", "huge.jpg": "too large"}
    (images / "class 0" / "empty.jpg").write_bytes(b"")
    (images / "class 1" / "text.png").write_text("not an image")
    (images / "class 2" / "gone.png").symlink_to("nowhere")
    with (images / "class 0" / "huge.jpg").open("wb") as file:
        file.truncate(2**36)
    for number in range(100):
        (images / f"{number}.jp2").touch()
    assert pack(images, tmp_path / "out", "--shard-images", "7", "--max-bad", "5%") == 0
    said = capsys.readouterr()
    assert "bad_files.csv" in said.out
    assert "\nWARNING: 100 pictures ignored, such as 0.jp2: only files that end in jpg " in said.err
    held = manifest(tmp_path / "out")
    assert (held["images"], held["bad_files"]) == (40, dict.fromkeys(bad.values(), 1))
    assert "max_image_mb" not in held["settings"]  # so that a packing of before there was a limit goes on
    rows = list(csv.reader((tmp_path / "out" / "bad_files.csv").read_text().splitlines()))[1:]
    assert {Path(row[2]).name: row[1] for row in rows} == bad
    names = [name for name in members(tmp_path / "out") if not name.endswith(".cls")]
    assert len(names) == 40  # the keys of the bad ones are passed over
    assert len({int(name[:9]) for name in names} & set(range(44))) == 40
    Image.fromarray(np.zeros((500, 600, 3), dtype=np.uint8)).save(images / "class 0" / "large.png")
    assert pack(images, tmp_path / "b", "--max-image-mb", "1", "--max-bad", "5%") == 0
    assert manifest(tmp_path / "b")["bad_files"]["too large"] == 2


def test_too_many_bad_files_stop_it_until_they_are_allowed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(11):
        (images / "class 0" / f"empty {number}.jpg").write_bytes(b"")
    flags, out = ("--shard-images", "9"), tmp_path / "out"
    assert pack(images, out, *flags) == 1
    line = complaint(capsys)
    assert "11 empty" in line
    assert str(out / "bad_files.csv") in line
    assert not list(out.glob("*.tar"))
    assert pack(images, out, *flags, "--max-bad", "5%") == 0
    assert manifest(out)["bad_files"] == {"empty": 11}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jpg").write_bytes(b"")
    assert pack(tmp_path / "none", tmp_path / "empty") == 1
    assert "no image of" in complaint(capsys)


def test_refused_in_one_line(
    images: Path, picture_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(data: Path | str, out: str, *flags: str) -> str:
        assert pack(data, tmp_path / out, *flags) == 2
        return complaint(capsys)

    assert pack(images, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert "resize 0 there, 16 here" in refused(images, "out", "--resize", "16")
    assert "seed 0 there, 3 here" in refused(images, "out", "--seed", "3")
    assert f"source folder:{images} there, demo here" in refused("demo", "out")
    (tmp_path / "out" / "notes.tar").write_bytes(b"")
    assert "notes.tar" in refused(images, "out")
    (tmp_path / "out" / "notes.tar").unlink()
    assert contents(tmp_path / "out") == before
    (images / "class 0" / "new.png").write_bytes((images / "class 1" / "01.png").read_bytes())
    assert "have changed since" in refused(images, "out")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    assert "thesis.txt" in refused(images, "full")
    assert "thesis.txt" in refused(images, "full/thesis.txt")
    assert "weights" in refused(f"2 * folder:{images} + 1 * folder:{images}", "new")
    assert "in_chans 1 or 3, got 4" in refused(images, "new", "--encode", "png", "--in-chans", "4")
    assert "quality" in refused(images, "new", "--quality", "101")
    odd = picture_folder("odd/a\nb/1.png", "odd/c/1.png") / "odd"
    assert "classes.txt" in refused(odd, "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("device", [True, False])
def test_a_folder_that_cannot_be_written_is_said_before_an_image_is_read(
    images: Path, device: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.curation.shard.pack_task", lambda *_: pytest.fail("it was read"))
    out = Path("/dev/null/x") if device else tmp_path / "out"
    if not device:
        out.mkdir()
        (out / ".packing").touch()
    assert pack(images, out, workers=1) == 2
    line = complaint(capsys)
    assert f"--out {out} cannot be written to (" in line
    assert "goes on" not in line


def test_a_complete_packing_is_left_as_it_is(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert pack(images, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack(images, out, workers=1) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with (out / "shards-000000.tar").open("ab") as file:
        file.write(b"more")
    assert pack(images, out) == 1
    assert "shards-000000.tar" in complaint(capsys)
