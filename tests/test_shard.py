"""Packing into shards: the same images come back, whatever stops it in between."""

import csv
import io
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.cli import shard
from mpp.data.config import Reading
from mpp.data.decode import decode
from mpp.packing import tar_writer
from mpp.packing.figures import Figures
from mpp.packing.folder import PackingFolder
from mpp.packing.images import Form
from mpp.packing.tasks import Plan, pack_task
from mpp.sources.base import ListSource
from mpp.sources.opening import open_source


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """40 small pictures of several formats and sizes in three classes."""
    formats = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP"), ("gif", "GIF"), ("tif", "TIFF")]
    for number in range(40):
        extension, container = formats[number % len(formats)]
        path = tmp_path / "images" / f"class {number % 3}" / f"{number:02d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(8 + number, 30 - number // 2, seed=number), container))
    return tmp_path / "images"


def pack(images: Path | str, out: Path, *flags: str, workers: int = 2) -> int:
    data = images if isinstance(images, str) else f"folder:{images}"
    return shard(["--data", data, "--out", str(out), "--workers", str(workers), *flags])


def shards(out: Path) -> str:
    return f"shards:{out}/*.tar"


def members(out: Path) -> dict[str, bytes]:
    held: dict[str, bytes] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            held |= {member.name: tar.extractfile(member).read() for member in tar}
    return held


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_folder_comes_back_byte_for_byte(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my shards [1]"
    assert pack(images, out, "--shard-images", "7", "--no-shuffle") == 0
    told = shlex.split(capsys.readouterr().out.splitlines()[-1])
    before, after = open_source(f"folder:{images}"), open_source(told[told.index("--data") + 1])
    assert [after.read(i) for i in range(len(after))] == [before.read(i) for i in range(len(before))]
    assert after.classes == before.classes == ("class 0", "class 1", "class 2")
    held = manifest(out)
    start = told.index("--data.mean") + 1
    assert [float(value) for value in told[start : start + 3]] == held["mean"]
    assert held["images"] == 40
    assert held["classes"] == {"class 0": 14, "class 1": 13, "class 2": 13}
    assert [each["images"] for each in held["shards"]] == [7, 7, 7, 7, 7, 5]
    for each in held["shards"]:
        path = out / each["name"]
        assert (path.stat().st_size, tar_writer.sha256(path)) == (each["bytes"], each["sha256"])
        assert Path(f"{path}.index").is_file()


def test_members_are_named_as_webdataset_names_them(images: Path, tmp_path: Path) -> None:
    assert pack(images, tmp_path / "out", "--shard-images", "25") == 0
    found = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += tar.getmembers()
    assert [member.name.partition(".")[0] for member in found] == [f"{place:09d}" for place in range(40) for _ in "ab"]
    assert all(member.name.endswith(".cls") for member in found[1::2])
    assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in found} == {
        (0, 0, 0, "", 0o644)
    }


def test_extensions_are_by_content(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encode(noise(5, 5), "PNG"))
    (folder / "b.png").write_bytes(encode(noise(5, 5), "JPEG"))
    np.save(folder / "c.npy", noise(5, 5))
    assert pack(folder, tmp_path / "out", "--no-shuffle") == 0
    assert list(members(tmp_path / "out")) == ["000000000.png", "000000001.jpg", "000000002.npy"]
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_the_shuffle_is_by_the_seed(images: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert pack(images, tmp_path / name, "--seed", seed) == 0
    a, b, c = (list(members(tmp_path / name).values()) for name in "abc")
    assert a == b != c
    assert sorted(a) == sorted(c)
    before = open_source(f"folder:{images}")
    assert sorted(a[::2]) == sorted(before.read(i)[0] for i in range(40))


def test_any_number_of_workers_gives_the_same_bytes(images: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        assert pack(images, tmp_path / str(workers), "--shard-images", "9", workers=workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


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


def test_figures_equal_numpys(images: Path, tmp_path: Path) -> None:
    assert pack(images, tmp_path / "out", "--shard-images", "7") == 0
    source = open_source(f"folder:{images}")
    decoded = [decode(source.read(i)[0], Reading()) for i in range(len(source))]
    pixels = np.concatenate([image.reshape(-1, 3) for image in decoded]) / 255
    held = manifest(tmp_path / "out")
    np.testing.assert_allclose(held["mean"], pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(held["std"], pixels.std(axis=0), atol=1e-6)
    for axis, name in enumerate(("height", "width")):
        sides = [image.shape[axis] for image in decoded]
        assert held["sizes"][name] == {"min": min(sides), "median": np.median(sides), "max": max(sides)}


def test_resizing_is_pillows_and_never_enlarges(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    small = encode(noise(20, 90), "PNG")
    (folder / "0.png").write_bytes(small)
    (folder / "1.png").write_bytes(encode(noise(50, 70)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (folder / "2.jpg").write_bytes(encode(noise(60, 81), "JPEG", exif=exif))
    assert pack(folder, tmp_path / "out", "--resize", "24", "--no-shuffle") == 0
    held = members(tmp_path / "out")
    assert list(held) == ["000000000.png", "000000001.png", "000000002.jpg"]
    assert held["000000000.png"] == small
    expected = Image.fromarray(noise(50, 70)).resize((34, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(held["000000001.png"]))), np.asarray(expected))
    turned = Image.fromarray(decode((folder / "2.jpg").read_bytes(), Reading()))
    assert turned.size == (60, 81)
    jpeg = encode(turned.resize((24, 32), Image.Resampling.BICUBIC), "JPEG", quality=92)
    assert held["000000002.jpg"] == jpeg
    assert manifest(tmp_path / "out")["sizes"]["height"] == {"min": 20, "median": 24, "max": 32}


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_encoding_anew(form: str, extension: str, images: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    assert pack(images, tmp_path / "out", "--encode", form, "--quality", "80", "--no-shuffle") == 0
    before, after = open_source(f"folder:{images}"), open_source(shards(tmp_path / "out"))
    assert {name.partition(".")[2] for name in members(tmp_path / "out")} == {extension, "cls"}
    options = {} if form == "png" else {"quality": 80}
    for index in range(40):
        pixels = decode(before.read(index)[0], Reading())
        assert after.read(index)[0] == encode(pixels, form, **options)
    seen = np.concatenate([decode(after.read(i)[0], Reading()).reshape(-1, 3) for i in range(40)]) / 255
    np.testing.assert_allclose(manifest(tmp_path / "out")["mean"], seen.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "extension"),
    [((6, 7, 3), "uint8", "png"), ((6, 7), "uint8", "png"), ((6, 7, 5), "uint8", "npy"), ((6, 7, 3), "uint16", "npy")],
)
def test_arrays_keep_their_values(shape: tuple[int, ...], dtype: str, extension: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (4, *shape)).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    channels = shape[2] if len(shape) == 3 else 1
    source = f"array:{tmp_path / 'a.npy'}"
    assert pack(source, tmp_path / "out", "--no-shuffle", "--in-chans", str(channels)) == 0
    for image, (name, data) in zip(values, members(tmp_path / "out").items(), strict=True):
        assert name.endswith(extension)
        held = np.load(io.BytesIO(data)) if extension == "npy" else np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(held, image)


def test_many_channels_shrink_as_npy(tmp_path: Path) -> None:
    values = noise(40, 60, 5)
    np.save(tmp_path / "a.npy", values[None])
    assert pack(f"array:{tmp_path / 'a.npy'}", tmp_path / "out", "--in-chans", "5", "--resize", "20") == 0
    (data,) = members(tmp_path / "out").values()
    planes = [Image.fromarray(values[:, :, channel].copy()) for channel in range(5)]
    expected = np.stack([np.asarray(plane.resize((30, 20), Image.Resampling.BICUBIC)) for plane in planes], axis=2)
    np.testing.assert_array_equal(np.load(io.BytesIO(data)), expected)


def test_a_stated_range_is_used_up_once(tmp_path: Path) -> None:
    """With a range, small images are converted, too, for one setting must then read all of them."""
    folder = tmp_path / "images"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (40, 40, 3)).astype(np.uint16)
    np.save(folder / "0.npy", values[:10, :10])
    np.save(folder / "1.npy", values)
    told = ("--value-range", "0", "4095")
    assert pack(folder, tmp_path / "out", "--resize", "20", "--no-shuffle", *told) == 0
    small, large = (np.asarray(Image.open(io.BytesIO(data))) for data in members(tmp_path / "out").values())
    scaled = np.rint(values / 4095 * 255).astype(np.uint8)
    np.testing.assert_array_equal(small, scaled[:10, :10])
    assert large.shape == (20, 20, 3)


def test_images_without_a_label_have_no_cls(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["path,label", "class 0/00.jpg,cat", "class 1/01.png,", "class 2/02.webp,dog"]
    (images / "list.csv").write_text("\n".join(rows))
    assert pack(f"csv:{images / 'list.csv'}", tmp_path / "out", "--no-shuffle") == 0
    assert [name for name in members(tmp_path / "out") if name.endswith("cls")] == ["000000000.cls", "000000002.cls"]
    held = manifest(tmp_path / "out")
    assert (held["classes"], held["unlabelled"]) == ({"cat": 1, "dog": 1}, 1)
    assert "1 have no label" in capsys.readouterr().out


def test_memory_is_that_of_a_shard_whatever_the_images(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    def peak(tasks: int) -> int:
        source = ListSource([encode(noise(8, 8))] * 40 * tasks, [0] * 40 * tasks)
        plan = Plan(np.arange(len(source)), 40, 10**9, Form(Reading()))
        figures = Figures(1, 3)
        tracemalloc.start()
        for task in range(tasks):
            figures.merge(pack_task(source, plan, task, tmp_path, lambda _: None).figures)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    peak(1)  # what is made once
    assert peak(16) - peak(2) < 560 * 64  # bytes for each further image


def test_bad_files_are_left_out_and_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "class 0" / "empty.jpg").write_bytes(b"")
    (images / "class 1" / "text.png").write_text("not an image")
    (images / "class 2" / "gone.png").symlink_to("nowhere")
    assert pack(images, tmp_path / "out", "--shard-images", "7") == 0
    held = manifest(tmp_path / "out")
    assert held["images"] == 40
    assert held["bad_files"] == {"empty": 1, "not an image": 1, "missing": 1}
    rows = list(csv.reader((tmp_path / "out" / "bad_files.csv").read_text().splitlines()))[1:]
    assert {(Path(row[2]).name, row[1]) for row in rows} == {
        ("empty.jpg", "empty"),
        ("text.png", "not an image"),
        ("gone.png", "missing"),
    }
    assert "bad_files.csv" in capsys.readouterr().out
    names = [name for name in members(tmp_path / "out") if not name.endswith(".cls")]
    assert len(names) == 40  # the keys of the bad ones are passed over
    assert len({int(name[:9]) for name in names} & set(range(43))) == 40


def test_too_many_bad_files_stop_it_until_they_are_allowed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(11):
        (images / "class 0" / f"empty {number}.jpg").write_bytes(b"")
    flags = ("--shard-images", "9")
    assert pack(images, tmp_path / "out", *flags) == 1
    line = complaint(capsys)
    assert "11 empty" in line
    assert str(tmp_path / "out" / "bad_files.csv") in line
    assert not list((tmp_path / "out").glob("*.tar"))
    assert pack(images, tmp_path / "out", *flags, "--max-bad", "5%") == 0
    assert manifest(tmp_path / "out")["bad_files"] == {"empty": 11}


def test_nothing_but_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    assert pack(tmp_path / "images", tmp_path / "out") == 1
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


FLAGS = ("--shard-images", "6", "--resize", "12")


def in_a_process(images: Path, out: Path, before: Callable[[], object] = lambda: None) -> multiprocessing.Process:
    def run() -> None:
        before()
        os._exit(pack(images, out, *FLAGS))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture
def uninterrupted(images: Path, tmp_path: Path) -> tuple[dict[str, bytes], float]:
    """What an undisturbed packing gives, bad files and all, and how long it takes."""
    for number in (0, 20):
        (images / "class 0" / f"bad {number:02d}.jpg").write_bytes(b"")
    begun = time.monotonic()
    process = in_a_process(images, tmp_path / "reference")
    process.join()
    assert process.exitcode == 0
    return contents(tmp_path / "reference"), time.monotonic() - begun


def killed_and_resumed(images: Path, out: Path, seconds: float, draw: random.Random) -> None:
    for _ in range(3):
        process = in_a_process(images, out)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
    assert pack(images, out, *FLAGS) == 0


@pytest.mark.parametrize("number", range(4))
def test_killed_and_resumed(
    number: int, images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    killed_and_resumed(images, tmp_path / "out", uninterrupted[1], random.Random(number))
    assert contents(tmp_path / "out") == uninterrupted[0]


@pytest.mark.slow
def test_killed_many_times(images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path) -> None:
    draw = random.Random(100)
    for number in range(60):
        killed_and_resumed(images, tmp_path / str(number), uninterrupted[1], draw)
        assert contents(tmp_path / str(number)) == uninterrupted[0]


def test_interrupted_at_each_step_of_the_end(
    images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, me = os.replace, os.getpid()

    class Crash(BaseException):
        pass

    crashes = 0
    while True:
        left = crashes

        def until(source: Path, target: Path) -> None:
            nonlocal left
            if os.getpid() == me:  # in the processes of the tasks all goes well
                if not left:
                    raise Crash
                left -= 1
            replace(source, target)

        out = tmp_path / str(crashes)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until)
            try:
                assert pack(images, out, *FLAGS) == 0
                break
            except Crash:
                crashes += 1
        assert pack(images, out, *FLAGS) == 0
        assert contents(out) == uninterrupted[0]
        shutil.rmtree(out)
    shards = sum(name.endswith(".tar") for name in uninterrupted[0])
    assert crashes == 1 + 2 * shards + 4  # settings; shards and indices; class names and manifest, written and moved


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(
    number: signal.Signals,
    images: Path,
    uninterrupted: tuple[dict[str, bytes], float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    process = in_a_process(images, out)
    while not list(out.glob(".packing/*.json")):
        time.sleep(0.001)
    assert process.pid
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 1
    assert f"stopped by {number.name}; the same command again goes on" in complaint(capfd)
    assert not list(out.glob("*.tar"))
    assert pack(images, out, *FLAGS) == 0
    assert contents(out) == uninterrupted[0]


def test_a_full_disk(
    images: Path,
    uninterrupted: tuple[dict[str, bytes], float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    process = in_a_process(images, out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    process.join()
    assert process.exitcode == 1
    assert f"cannot write to {out} (File too large); make room" in complaint(capfd)
    assert not list(out.glob("*.tar"))
    assert pack(images, out, *FLAGS) == 0
    assert contents(out) == uninterrupted[0]


def test_a_killed_worker(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = tar_writer.TarWriter.finish
    monkeypatch.setattr(tar_writer.TarWriter, "finish", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert pack(images, tmp_path / "out", *FLAGS) == 1
    assert "ended by SIGKILL" in complaint(capsys)
    monkeypatch.setattr(tar_writer.TarWriter, "finish", finish)
    assert pack(images, tmp_path / "out", *FLAGS) == 0
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_other_bytes_read_back(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad_disk(path: Path) -> str:
        path.write_bytes(path.read_bytes().replace(b"ustar", b"ustsr"))
        return right(path)

    right = tar_writer.sha256
    monkeypatch.setattr(tar_writer, "sha256", bad_disk)
    assert pack(images, tmp_path / "out") == 1
    assert "read back gives other bytes" in complaint(capsys)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_two_at_once(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    identity = {"source": "", "fingerprint": "", "settings": {}}
    with PackingFolder(out, identity).locked():
        (out / ".packing" / "packing.json").unlink()  # so that the lock alone is in the way
        process = in_a_process(images, out)
        process.join()
    assert process.exitcode == 2
    assert "another process is packing into it" in complaint(capfd)
