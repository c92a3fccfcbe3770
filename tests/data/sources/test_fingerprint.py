import os
import shutil

import numpy as np
import pytest

from mpp.data.pixel_cache import PixelSource
from mpp.data.sources import base, files
from mpp.data.sources.base import Subset
from mpp.data.sources.contents import Contents
from mpp.data.sources.files import FileSource
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source
from tests.data.sources.reading import write_tar

PIXELS = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
LISTED = ListSource(PIXELS, [0, 1] * 3, ("a", "b"))


class Own(ListSource):
    """A source of somebody else's, which is read."""

    def __init__(self, images, broken=-1):
        super().__init__(images)
        self.broken = broken

    def image(self, index):
        if index == self.broken:
            raise OSError("broken")
        return super().image(index)


def all_differ(*texts):
    assert all(len(text) == 64 for text in texts)
    return len(set(texts)) == len(texts)


def test_they_are_those_of_earlier_releases(tmp_path):
    """By which caches and checkpoints know their images. Made by release 0.1."""
    for name in "ab":
        (tmp_path / "f" / name).mkdir(parents=True)
        (tmp_path / "f" / name / "1.png").write_bytes(name.encode() * 7)
    np.save(tmp_path / "a.npy", PIXELS)
    write_tar(tmp_path / "s.tar", [("1.jpg", b"image"), ("1.cls", b"1")])
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": b"abc", "path": None}, {"bytes": b"abcd", "path": "x"}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features)
    table.save_to_disk(str(tmp_path / "hf"))
    known = {
        "folder:f": ("5d53569c9d5e3de7", "d67432f4e28f8e17"),
        "array:a.npy": ("16fed55399b6f6aa", "16fed55399b6f6aa"),
        "shards:s.tar": ("825c55d0f1b0f379", "6783ddb4c8f4fd0a"),
        "hf:hf": ("9a54d0c098f11742", "9a54d0c098f11742"),
    }

    def found():
        sources = {spec: open_source(spec.replace(":", f":{tmp_path}/")) for spec in known}
        short = {s: (each.fingerprint(times=False)[:16], each.quick_fingerprint()[:16]) for s, each in sources.items()}
        return short, {spec: source.fingerprint() for spec, source in sources.items()}

    short, before = found()
    assert short == known
    assert LISTED.fingerprint()[:16] == "54ea8636d0b3b527"
    assert Subset(LISTED, [3, 1]).fingerprint()[:16] == "2ca687a669e84f1d"
    assert MixtureSource("m", [LISTED, LISTED], (1, 2)).fingerprint()[:16] == "951b0da96b8579af"
    for name in ("f/a/1.png", "a.npy", "s.tar"):
        os.utime(tmp_path / name, ns=(0, 1))
    short, touched = found()
    assert short == known
    assert [spec for spec in known if touched[spec] == before[spec]] == ["hf:hf"]
    (tmp_path / "classes.txt").write_text("ant\nbee\n")  # class names count
    assert [spec for spec, each in found()[0].items() if each != known[spec]] == ["shards:s.tar"]


def test_files(picture_folder, monkeypatch):
    folder = picture_folder("a/1.png", "b/2.png", "b/\udcff.png")
    monkeypatch.setattr(files, "read_file", lambda path: 1 / 0)  # nothing is read

    def found():
        source = open_source(f"folder:{folder}")
        return source.fingerprint(), source.fingerprint(times=False)

    before = found()
    assert open_source(f"folder:{folder}/../{folder.name}").fingerprint() == before[0]
    path, copy = folder / "a" / "1.png", folder.parent / "copy"
    shutil.copytree(folder, copy)
    os.utime(path, ns=(1, 1))
    touched = found()
    assert touched[1] == before[1] == open_source(f"folder:{copy}").fingerprint(times=False)
    path.write_bytes(b"longer than before" * 100)
    os.utime(path, ns=(1, 1))
    resized = found()
    path.rename(folder / "a" / "3.png")
    renamed = found()
    (folder / "a" / "3.png").unlink()
    states = [before, touched, resized, renamed, found()]
    assert all_differ(open_source(f"folder:{copy}").fingerprint(), *(times for times, _ in states))
    assert all_differ(*(sizes for _, sizes in states[1:]))


def test_images_that_are_read():
    one_off = PIXELS.copy()
    one_off[5, 3, 3, 2] ^= 1
    assert LISTED.fingerprint() == ListSource(PIXELS.copy(order="F"), [0, 1] * 3, ("a", "b")).fingerprint()
    sources = [LISTED, *(ListSource(pixels) for pixels in (PIXELS, one_off, PIXELS[::-1]))]
    sources += [ListSource(PIXELS, labels, classes) for labels, classes in (([1, 0] * 3, "ab"), ([0, 1] * 3, "ac"))]
    # What is split between two images is not what is split elsewhere.
    sources += [ListSource([b"ab", b"c"]), ListSource([b"a", b"bc"])]
    images = [b"one", b"two", b"three"]
    sources += [Own(images), Own([b"one", b"two", b"3"]), Own(images, 1), Own(images, 2)]
    subset = Subset(LISTED, [3, 1])
    sources += [Subset(LISTED, range(6)), subset, Subset(LISTED, [1, 3]), Subset(subset, [1, 0])]
    one, two = ListSource([b"1", b"2"]), ListSource([b"3"])
    sources += [MixtureSource("m", parts) for parts in ([one, two], [two, one], [one])]
    sources += [MixtureSource("m", [one, two], weights) for weights in ((1, 1), (1, 2))]
    assert all_differ(*(source.fingerprint() for source in sources))
    assert all_differ(*(Contents.of(source).digest for source in (*sources[1:4], *sources[6:])))  # without labels


def test_the_quick_one_survives_a_copy_but_no_other_name_label_order_or_count(picture_folder, tmp_path, monkeypatch):
    asked = []
    stat = os.stat
    monkeypatch.setattr(base, "_QUICK", 3)
    monkeypatch.setattr(files.os, "stat", lambda path, **kwargs: (asked.append(path), stat(path, **kwargs))[1])
    names = [f"{number}.png" for number in range(10)]
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        shutil.copytree(picture_folder(*names), copy)
    os.utime(copies[1] / names[0], ns=(1, 1))

    def of(root, paths, labels=None, classes=None):
        asked.clear()
        found = FileSource("x", root, paths, labels, classes).quick_fingerprint()
        assert len(asked) == 3
        return found

    first = of(copies[0], names)
    assert first == of(copies[1], names) == of(copies[1], [str(copies[1] / name) for name in names])
    labelled = (([0] * 10, "ab"), ([0, 1] * 5, "ab"), ([0, 1] * 5, "ac"))
    others = [of(copies[0], paths) for paths in (names[::-1], names[:9], ["10.png", *names[1:]])]
    assert all_differ(first, *others, *(of(copies[0], names, labels, classes) for labels, classes in labelled))
    (copies[1] / names[9]).write_bytes(b"cut off")
    assert of(copies[1], names) != first


def test_decoded_pixels_are_the_images_that_they_came_from(tmp_path):
    PIXELS.tofile(tmp_path / "pixels")
    sizes = np.tile(np.array([PIXELS.shape[1:3]], dtype=np.int32), (len(PIXELS), 1))
    decoded = PixelSource(LISTED, tmp_path / "pixels", sizes, PIXELS.shape[3])
    assert decoded.fingerprint() == LISTED.fingerprint()
    assert Subset(decoded, [1, 2]).quick_fingerprint() == Subset(LISTED, [1, 2]).quick_fingerprint()


def contents(spec):
    return Contents.of(open_source(spec))


def test_contents_survive_a_copy_and_tell_of_more_fewer_and_others(picture_folder):
    folder = picture_folder("here/a/1.png", "here/b/2.png")
    shutil.copytree(folder / "here", folder / "there")
    before, image = contents(f"folder:{folder / 'here'}"), folder / "there" / "a" / "1.png"

    def changes():
        return contents(f"folder:{folder / 'there'}").changes(before)

    os.utime(image, ns=(1, 1))
    assert contents(f"folder:{folder / 'there'}") == before == Contents.from_dict(before.to_dict())
    assert changes() == []
    others = ["2 images then and now, but others, or in another order"]
    renamed = image.rename(image.with_name("3.png"))
    assert changes() == others
    renamed.rename(image).write_bytes(b"of another size")
    assert changes() == others
    image.unlink()
    assert changes() == ["2 images then, 1 now"]
    assert before.changes(contents(f"folder:{folder / 'there'}")) == ["1 image then, 2 now"]


def test_contents_of_lists_wherever_their_files_lie(picture_folder):
    folder = picture_folder("one/a/1.png", "one/b/2.png", "lists/none.png")
    shutil.copytree(folder / "one", folder / "two")
    found = []
    for name, order in (("one", "1x 2y"), ("two", "1x 2y"), ("one", "2x 1y")):
        lines = [f"{folder / name}/{'ab'[int(each[0]) - 1]}/{each[0]}.png,{each[1]}\n" for each in order.split()]
        (folder / "lists" / "list.csv").write_text("".join(lines))
        found.append(contents(f"csv:{folder}/lists/list.csv"))
    assert found[0] == found[1] != found[2]


def test_contents_of_shards_of_the_same_names_and_sizes(tmp_path):
    found, tar = [], tmp_path / "0.tar"
    for sizes in ((100, 200), (100, 200), (200, 100)):
        write_tar(tar, [(f"{number}.jpg", bytes(size)) for number, size in enumerate(sizes)])
        found.append((tar.stat().st_size, contents(f"shards:{tar}")))
    assert found[0] == found[1] != found[2]
    assert found[0][0] == found[2][0]


def test_labels_and_classes_where_they_are_learnt():
    def of(labels, *classes):
        return Contents.of(ListSource(PIXELS[: len(labels)]), np.array(labels), classes)

    assert Contents.of(ListSource(PIXELS)) == Contents.of(LISTED)  # where they are not learnt, they do not count
    before = of([0, 1, 0], "ant", "bee")
    assert of([0, 1, 0], "ant", "bee").changes(before) == []
    assert of([0, 1, 1], "ant", "bee").changes(before) == ["other labels"]
    assert of([0, 1, 0], "bee", "ant").changes(before) == ["the classes in another order: class 0 was ant and is bee"]
    assert of([0, 1, 2, 1], "ant", "cat", "dog").changes(before) == [
        "3 images then, 4 now", "2 classes then, 3 now (new: cat, dog; gone: bee)"
    ]  # fmt: skip
    assert of([0], *"abcdefg").changes(before)[1] == "2 classes then, 7 now (new: a, b, c, ...; gone: ant, bee)"
