"""A fingerprint changes with what a source holds, and with nothing else."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp.data.pixel_cache import PixelSource
from mpp.data.sources import files
from mpp.data.sources import fingerprint as fingerprints
from mpp.data.sources.base import ListSource, Subset
from mpp.data.sources.files import FileSource
from mpp.data.sources.fingerprint import Contents, fingerprint, quick_fingerprint
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)


class Own:
    """A source of somebody else's."""

    name, classes = "own", ("a", "b")

    def __init__(self, images: list[bytes], broken: int = -1) -> None:
        self.images, self.broken = images, broken

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[bytes, int | None]:
        if index == self.broken:
            raise OSError("broken")
        return self.images[index], index % 2

    def labels(self) -> np.ndarray:
        return np.arange(len(self)) % 2

    def describe(self) -> str:
        return "own"


def all_differ(*texts: str) -> bool:
    assert all(len(text) == 64 for text in texts)
    return len(set(texts)) == len(texts)


def test_files(picture_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = picture_folder("a/1.png", "b/2.png", "b/\udcff.png")
    monkeypatch.setattr(files, "read_file", lambda path: 1 / 0)  # nothing is read
    spec = f"folder:{folder}"
    before = fingerprint(open_source(spec))
    assert fingerprint(open_source(f"folder:{folder}/../{folder.name}")) == before
    monkeypatch.chdir(folder)
    assert fingerprint(open_source("folder:.")) == before
    path = folder / "a" / "1.png"
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 2 * 10**9))  # on any file system
    touched = fingerprint(open_source(spec))
    path.write_bytes(b"longer than before" * 100)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    resized = fingerprint(open_source(spec))
    path.rename(folder / "a" / "3.png")
    renamed = fingerprint(open_source(spec))
    source = open_source(spec)
    (folder / "a" / "3.png").unlink()
    assert all_differ(before, touched, resized, renamed, fingerprint(source))


def test_labels_and_names_count(tmp_path: Path) -> None:
    def made(labels: list[int] | None, classes: tuple[str, ...] | None) -> str:
        return fingerprint(FileSource("folder:x", tmp_path, ["1.png", "2.png"], labels, classes))

    assert made([0, 1], ("a", "b")) == made([0, 1], ("a", "b"))
    assert all_differ(made([0, 1], ("a", "b")), made([1, 0], ("a", "b")), made([0, 1], ("a", "c")), made(None, None))


def test_lists_and_arrays(tmp_path: Path) -> None:
    def memory(images: np.ndarray, labels: list[int] | None = None) -> str:
        return fingerprint(ListSource(images, labels))

    one_off = PIXELS.copy()
    one_off[5, 3, 3, 2] ^= 1
    labels = [0, 1, 0, 1, 0, 1]
    assert memory(PIXELS, labels) == memory(PIXELS[::1].copy(order="F"), labels)
    assert all_differ(memory(PIXELS), memory(one_off), memory(PIXELS[::-1]), memory(PIXELS, labels))
    # What is split between two images is not what is split elsewhere.
    assert all_differ(fingerprint(ListSource([b"ab", b"c"])), fingerprint(ListSource([b"a", b"bc"])))
    path = tmp_path / "a.npy"
    np.save(path, PIXELS)
    os.utime(path, ns=(0, 1))
    first = fingerprint(open_source(f"array:{path}"))
    assert fingerprint(open_source(f"array:{path}")) == first
    os.utime(path, ns=(0, 2))
    assert fingerprint(open_source(f"array:{path}")) != first


def test_shards(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, data in (("1.jpg", b"image"), ("1.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    spec = f"shards:{tmp_path}/*.tar"
    first = fingerprint(open_source(spec))
    assert fingerprint(open_source(f"shards:{tmp_path}/{{0,1}}.tar")) == first
    one = fingerprint(open_source(f"shards:{tmp_path}/0.tar"))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    named = fingerprint(open_source(spec))
    os.utime(tmp_path / "1.tar", ns=(0, 1))
    assert all_differ(first, one, named, fingerprint(open_source(spec)))


def test_subsets() -> None:
    source, other = ListSource(PIXELS), ListSource(PIXELS[::-1])
    subset = Subset(source, [3, 1])
    assert fingerprint(subset) == fingerprint(Subset(ListSource(PIXELS.copy()), np.array([3, 1], dtype=np.int32)))
    whole = Subset(source, range(6))
    nested = Subset(subset, [1, 0])
    assert all_differ(*map(fingerprint, (source, whole, subset, Subset(source, [1, 3]), Subset(other, [3, 1]), nested)))


def test_other_sources_are_read() -> None:
    images = [b"one", b"two", b"three"]
    assert fingerprint(Own(images)) == fingerprint(Own(list(images)))
    assert all_differ(*map(fingerprint, (Own(images), Own([b"one", b"two", b"3"]), Own(images, 1), Own(images, 2))))

    class Darker(FileSource):
        """Reads something else than what lies in the files."""

        def read(self, index: int) -> tuple[bytes, int | None]:
            return b"dark", None

    class Lighter(Darker):
        def read(self, index: int) -> tuple[bytes, int | None]:
            return b"light", None

    assert fingerprint(Darker("x", Path("/x"), ["1"])) != fingerprint(Lighter("x", Path("/x"), ["1"]))


def test_demo() -> None:
    train, test = open_source("demo"), open_source("demo", "test")
    assert fingerprint(train) == fingerprint(open_source("demo"))
    assert all_differ(fingerprint(train), fingerprint(test))


def test_without_times_it_survives_a_copy_and_a_touch_but_no_other_image(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for number, shade in enumerate((10, 200)):
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4), (shade, 0, 0)).save(folder / "a.png")
    os.utime(tmp_path / "two" / "0" / "a.png", ns=(1, 1))
    first, second = (open_source(f"folder:{tmp_path / name}") for name in ("one", "two"))
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first, times=False) == fingerprint(second, times=False)
    Image.new("RGB", (40, 40)).save(tmp_path / "two" / "0" / "b.png")
    assert fingerprint(open_source(second.name), times=False) != fingerprint(first, times=False)


def test_lists_of_files(picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("1.png", "2.png")
    (folder / "list.csv").write_text("1.png,a\n2.png,b\n")
    spec = f"csv:{folder / 'list.csv'}"
    first = fingerprint(open_source(spec))
    assert fingerprint(open_source(spec)) == first
    os.utime(folder / "2.png", ns=(0, 1))
    touched = fingerprint(open_source(spec))
    (folder / "list.csv").write_text("1.png,a\n2.png,a\n")
    assert all_differ(first, touched, fingerprint(open_source(spec)))


def test_mixtures() -> None:
    one, two = ListSource([b"1", b"2"], name="one"), ListSource([b"3"], name="two")
    other = ListSource([b"4"], name="two")
    same = MixtureSource("x", [ListSource([b"1", b"2"]), ListSource([b"3"])])
    assert fingerprint(MixtureSource("m", [one, two])) == fingerprint(same)
    mixtures = [MixtureSource("m", parts) for parts in ([one, two], [two, one], [one, other], [one])]
    weighted = [MixtureSource("m", [one, two], weights) for weights in ((1, 1), (1, 2))]
    assert all_differ(*map(fingerprint, (*mixtures, *weighted)))


def test_the_quick_one_survives_a_copy_but_no_other_name_label_order_or_count(
    picture_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    stat = os.stat
    monkeypatch.setattr(fingerprints, "_SEVERAL", 3)
    monkeypatch.setattr(fingerprints.os, "stat", lambda path, **kwargs: (asked.append(path), stat(path, **kwargs))[1])
    names = [f"{number}.png" for number in range(10)]
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        shutil.copytree(picture_folder(*names), copy)
    os.utime(copies[1] / names[0], ns=(1, 1))

    def of(root: Path, paths: list[str], labels: list[int] | None = None, classes: Any = None) -> str:
        asked.clear()
        found = quick_fingerprint(FileSource("x", root, paths, labels, classes))
        assert len(asked) == min(3, len(paths))
        return found

    first = of(copies[0], names)
    assert first == of(copies[1], names) == of(copies[1], [str(copies[1] / name) for name in names])
    zeros, halves = [0] * 10, [0, 1] * 5
    assert all_differ(
        *(first, of(copies[0], names[::-1]), of(copies[0], names[:9]), of(copies[0], ["10.png", *names[1:]])),
        *(of(copies[0], names, labels, classes) for labels in (zeros, halves) for classes in (("a", "b"), ("a", "c"))),
    )
    (copies[1] / names[9]).write_bytes(b"cut off")
    assert of(copies[1], names) != first
    images = [b"%d" % number for number in range(10)]
    longer = quick_fingerprint(ListSource([*images, b"10"]))
    assert all_differ(
        longer, *(quick_fingerprint(Own(images[:n])) for n in (9, 10)), quick_fingerprint(Own(images[1:]))
    )


def test_decoded_pixels_are_the_images_that_they_came_from(tmp_path: Path) -> None:
    PIXELS.tofile(tmp_path / "pixels")
    source = ListSource(PIXELS, [0, 1] * 3)
    sizes = np.tile(np.array([PIXELS.shape[1:3]], dtype=np.int32), (len(PIXELS), 1))
    decoded = PixelSource(source, tmp_path / "pixels", sizes, PIXELS.shape[3])
    assert fingerprint(decoded) == fingerprint(source)
    assert quick_fingerprint(Subset(decoded, [1, 2])) == quick_fingerprint(Subset(source, [1, 2]))


def seen(spec: str) -> Contents:
    return Contents.of(open_source(spec))


def test_contents_survive_a_copy_and_tell_of_more_fewer_and_others(picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("here/a/1.png", "here/b/2.png")
    shutil.copytree(folder / "here", folder / "there")
    before = seen(f"folder:{folder / 'here'}")
    os.utime(folder / "there" / "a" / "1.png", ns=(1, 1))
    assert seen(f"folder:{folder / 'there'}") == before
    assert Contents.from_dict(before.to_dict()) == before
    assert seen(f"folder:{folder / 'there'}").changes(before) == []
    (folder / "there" / "a" / "1.png").rename(folder / "there" / "a" / "3.png")
    assert seen(f"folder:{folder / 'there'}").changes(before) == [
        "2 images then and now, but others, or in another order"
    ]
    (folder / "there" / "a" / "3.png").rename(folder / "there" / "a" / "1.png")
    (folder / "there" / "a" / "1.png").write_bytes(b"of another size")
    assert seen(f"folder:{folder / 'there'}").changes(before) == [
        "2 images then and now, but others, or in another order"
    ]
    (folder / "there" / "a" / "1.png").unlink()
    after = seen(f"folder:{folder / 'there'}")
    assert after.changes(before) == ["2 images then, 1 now"]
    assert before.changes(after) == ["1 image then, 2 now"]


def test_contents_of_lists_wherever_their_files_lie(picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("one/a/1.png", "one/b/2.png", "lists/none.png")
    shutil.copytree(folder / "one", folder / "two")
    found = []
    for name in ("one", "two"):
        path = folder / "lists" / f"{name}.csv"
        path.write_text(f"{folder / name}/a/1.png,x\n{folder / name}/b/2.png,y\n")
        found.append(seen(f"csv:{path}"))
    (folder / "lists" / "one.csv").write_text(f"{folder}/one/b/2.png,x\n{folder}/one/a/1.png,y\n")
    assert found[0] == found[1] != seen(f"csv:{folder / 'lists' / 'one.csv'}")


def test_contents_of_shards_of_the_same_names_and_sizes(tmp_path: Path) -> None:
    found = []
    for sizes in ((100, 200), (100, 200), (200, 100)):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for number, size in enumerate(sizes):
                info = tarfile.TarInfo(f"{number}.jpg")
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
        found.append((seen(f"shards:{tmp_path}/0.tar"), (tmp_path / "0.tar").stat().st_size))
    assert found[0] == found[1]
    assert found[0][1] == found[2][1]
    assert found[0][0] != found[2][0]


def test_contents_of_other_sources() -> None:
    one, other = ListSource(PIXELS), ListSource(PIXELS[::-1])
    sources = [one, other, Subset(one, [3, 1]), Subset(one, [1, 3]), Subset(other, [3, 1])]
    sources += [MixtureSource("m", parts) for parts in ([one, other], [other, one])]
    sources += [MixtureSource("m", [one, other], weights) for weights in ((1, 1), (1, 2))]
    sources += [Own([b"one", b"two"]), Own([b"one", b"2"]), Own([b"one", b"two"], broken=1)]
    assert all_differ(*(Contents.of(source).digest for source in sources))
    assert Contents.of(ListSource(PIXELS, [0] * 6)) == Contents.of(one)  # labels are of no account
    assert seen("demo") == seen("demo") != Contents.of(open_source("demo", "test"))


def test_labels_and_classes_where_they_are_learnt() -> None:
    def of(labels: list[int], *classes: str) -> Contents:
        return Contents.of(ListSource(PIXELS[: len(labels)]), np.array(labels), classes)

    before = of([0, 1, 0], "ant", "bee")
    assert of([0, 1, 0], "ant", "bee").changes(before) == []
    assert of([0, 1, 1], "ant", "bee").changes(before) == ["other labels"]
    assert of([0, 1, 0], "bee", "ant").changes(before) == ["the classes in another order: class 0 was ant and is bee"]
    assert of([0, 1, 2, 1], "ant", "cat", "dog").changes(before) == [
        "3 images then, 4 now", "2 classes then, 3 now (new: cat, dog; gone: bee)"
    ]  # fmt: skip
    assert of([0], *"abcdefg").changes(before)[1] == "2 classes then, 7 now (new: a, b, c, ...; gone: ant, bee)"
