import os
import shutil

import numpy as np
import pytest

from mpp.data.pixel_cache import cache_pixels
from mpp.data.settings import DecodeOptions
from mpp.data.sources import overlap
from mpp.data.sources.base import Subset
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.opening import open_source
from mpp.data.sources.overlap import Shared, same_places, shared
from tests.data.sources.reading import write_tar


def compared(test, there, indices=None):
    test, there = (open_source(of) if isinstance(of, str) else of for of in (test, there))
    return shared(test, np.arange(len(test)) if indices is None else np.asarray(indices), there)


@pytest.fixture
def pictures(tmp_path, encode):
    """`pictures("a", 1, 2)`: a folder with two pictures, those of a number always the same; all of one size."""

    def make(name, *numbers):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
            (folder / f"{number}.bmp").write_bytes(encode(pixels, "BMP"))
        return folder

    return make


def test_a_folder_by_any_name_is_itself(pictures, tmp_path, monkeypatch):
    folder = pictures("here/test", 1, 2, 3)
    pictures("here/other", 4, 5)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "of links").mkdir()
    for path in folder.iterdir():
        (tmp_path / "of links" / path.name).symlink_to(path)
    listed = tmp_path / "list.csv"
    listed.write_text("path\n" + "".join(f"here/other/../test/{n}.bmp\n" for n in (3, 1, 2)))
    monkeypatch.chdir(tmp_path)
    test = f"folder:{folder}"
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "image_digest", lambda data: pytest.fail("read"))
        names = [folder, f"{folder}/", "here/test", "./here//other/../test", tmp_path / "link", "link/", "of links"]
        for other in [*(f"folder:{name}" for name in names), f"csv:{listed}", "folder:link + folder:here/other"]:
            found = compared(test, other)
            assert found[:4] == (3, 3, 0, 0), other
            assert found.all_of_them
            assert other.startswith(("csv", "folder:link +")) or same_places(open_source(test), open_source(other))
        assert compared(test, f"folder:{folder}").example == str(folder / "1.bmp")
    assert compared(test, f"folder:{tmp_path}/here/other") == Shared(3, 0, 0, 0, "")
    assert compared(test, f"folder:{tmp_path}/here").places == 3  # all that lies below
    assert not same_places(open_source(test), open_source(f"folder:{tmp_path}/here"))
    # Only those that are tested count.
    part = Subset(open_source(f"folder:{tmp_path}/here"), [4, 0, 3, 2])
    assert compared(part, test, [0, 3])[:4] == (2, 2, 0, 0)
    assert compared(part, f"folder:{tmp_path}/here/other", [0, 3]).found == 0


def test_copies_are_found_by_their_bytes(pictures, tmp_path):
    test, train = pictures("test", 1, 2, 3, 4), pictures("train", 5, 6, 7)
    shutil.copy(test / "2.bmp", train / "another name.bmp")
    (train / "7.bmp").write_bytes((test / "3.bmp").read_bytes()[:-1] + b"?")  # of the same size
    (train / "longer.bmp").write_bytes((test / "4.bmp").read_bytes() + b"\0")
    found = compared(f"folder:{test}", f"folder:{train}")
    assert (found[:4], found.all_of_them) == ((4, 0, 1, 0), False)
    assert found.example == f"{test / '2.bmp'} = {train / 'another name.bmp'}"
    (line,) = found.sentences("the pretraining data")
    assert line == f"1 of the 4 test images are in the pretraining data, 1 byte for byte, such as {found.example}"
    shutil.copytree(test, tmp_path / "copy")
    assert compared(f"folder:{test}", f"folder:{tmp_path / 'copy'}").all_of_them
    os.link(test / "1.bmp", train / "link.bmp")
    opened = open_source(f"folder:{test}")
    (line,) = compared(opened, f"folder:{train}").sentences("x")
    assert "2 of the 4 test images are in x, 1 as the same files and 1 byte for byte, such as" in line
    (test / "2.bmp").unlink()  # one that cannot be read is passed over
    assert compared(opened, f"folder:{train}")[:4] == (4, 1, 0, 0)


def test_in_shards_arrays_datasets_and_caches(pictures, tmp_path, monkeypatch):
    test = pictures("test", 1, 2, 3)
    for name, numbers in (("a", (1, 2)), ("b", (3, 4))):
        paths = [pictures("more", number) / f"{number}.bmp" for number in numbers]
        write_tar(tmp_path / f"{name}.tar", [(path.name, path.read_bytes()) for path in paths])
    (tmp_path / "c.tar").symlink_to(tmp_path / "a.tar")
    assert compared(f"shards:{tmp_path}/a.tar", f"shards:{tmp_path}/[bc].tar").places == 2
    assert compared(f"folder:{test}", f"shards:{tmp_path}/[ab].tar")[:4] == (3, 0, 3, 0)
    cached = cache_pixels(open_source(f"folder:{test}"), DecodeOptions(3), 0)
    assert compared(cached, f"folder:{test}").places == compared(f"folder:{test}", cached).places == 3
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "b.npy", images[2:4])
    (tmp_path / "c.npy").symlink_to(tmp_path / "a.npy")
    assert compared(f"array:{tmp_path}/a.npy", f"array:{tmp_path}/c.npy")[:3] == (5, 5, 0)
    assert compared(f"array:{tmp_path}/a.npy", f"array:{tmp_path}/b.npy")[:3] == (5, 0, 2)
    assert compared(ListSource(images[:3]), f"array:{tmp_path}/b.npy")[:3] == (3, 0, 1)
    assert compared(ListSource(images.view(np.int8)), ListSource(images)).found == 0
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": (test / f"{n}.bmp").read_bytes(), "path": None} for n in (1, 2)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "saved")
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    assert compared(f"hf:{tmp_path}/saved", f"hf:{tmp_path}/link").all_of_them
    assert compared(f"folder:{test}", f"hf:{tmp_path}/saved")[:4] == (3, 0, 2, 0)
    far = open_source(f"shards:{tmp_path}/a.tar")
    far.tars = [None]  # as one behind a URL
    monkeypatch.setattr(overlap, "image_digest", lambda data: pytest.fail("read"))
    assert compared(f"folder:{test}", far)[:4] == (3, 0, 0, 3)
    assert compared(far, f"folder:{test}")[:4] == (2, 0, 0, 2)


def test_only_so_much_is_read(pictures, monkeypatch):
    test, train = pictures("test", *range(8)), pictures("train", *range(100, 110))
    for number in range(8):
        shutil.copy(test / f"{number}.bmp", train)
    size = (test / "0.bmp").stat().st_size
    read = []
    monkeypatch.setattr(overlap, "image_digest", lambda data: read.append(len(data)) or data)
    monkeypatch.setattr(overlap, "MOST_IMAGES", 21)  # all 18 there, and 3
    found = compared(f"folder:{test}", f"folder:{train}")
    assert (found.copies, found.unread, len(read), found.all_of_them) == (3, 5, 21, False)
    (_, line) = found.sentences("x")
    assert "5 of the 8 test images were not compared with x byte for byte: that reads up to 21 images and 2 GiB" in line
    monkeypatch.setattr(overlap, "MOST_IMAGES", 100)
    monkeypatch.setattr(overlap, "MOST_BYTES", 18 * size)
    assert compared(f"folder:{test}", f"folder:{train}")[2:4] == (0, 8)
