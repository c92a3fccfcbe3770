"""data.cache pixels: the same images as decoding each time, decoded once."""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from mpp.data import pixel_cache
from mpp.data.pixel_cache import PixelSource, cache_pixels, open_images
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Subset
from mpp.data.sources.opening import open_source
from mpp.data.transform import TrainTransform
from mpp.errors import UserError
from tests.data.picture_files import noise
from tests.data.streams import assert_same, run

NAMES = [f"{label}/{number}.png" for label in ("a", "b") for number in range(6)]


@pytest.fixture
def folder(picture_folder, encode) -> Path:
    """Twelve pictures of noise in two classes, one of them cut short."""
    root = picture_folder(*NAMES)
    for name, image in zip(NAMES, noise((12, 10, 14, 3)), strict=True):
        (root / name).write_bytes(encode(image))
    (root / "b" / "2.png").write_bytes((root / "b" / "2.png").read_bytes()[:150])
    return root


@pytest.fixture
def made(folder):
    """`made(options)`: the folder opened anew, from the cache."""
    return lambda *options, **named: cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(*options, **named), 0)


@pytest.mark.parametrize("options", [(3,), (1,), (3, (0.0, 100.0))], ids=["rgb", "grey", "range"])
def test_the_stream_is_the_same_bits(folder, made, options):
    source, cached = open_source(f"folder:{folder}"), made(*options)
    assert (len(cached), cached.classes, cached.location(3)) == (12, ("a", "b"), source.location(3))
    np.testing.assert_array_equal(cached.labels(), source.labels())
    part = np.array([5, 2, 8])
    for plain, decoded in ((source, cached), (Subset(source, part), Subset(cached, part))):
        settings = {"transform": TrainTransform(DataConfig(), (8, 8), options[0]), "options": DecodeOptions(*options)}
        assert_same(run(plain, 6, **settings), run(decoded, 6, **settings))
    (folder / "b" / "2.png").unlink()  # whole arrays go in blocks
    block = made(*options).block(np.array([3, 0]))
    assert block is not None
    np.testing.assert_array_equal(block[1], made(*options).read(0)[0])


def test_it_decodes_once(folder, made, monkeypatch):
    before = cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(3), workers=2)
    monkeypatch.setattr(pixel_cache, "_decode_all", None)
    after = made(3)
    assert before.path == after.path
    assert "; decoded pixels (4.62 kB) in " in after.describe()
    monkeypatch.undo()
    (folder / "a" / "0.png").write_bytes((folder / "a" / "1.png").read_bytes())
    assert made(3).path != before.path


def test_whatever_pixels_depend_on_has_pixels_of_its_own(made, monkeypatch):
    options = [(3,), (3, (0.0, 100.0)), (3, (), (0,)), (1,)]
    assert len({made(*each).path for each in options}) == 4
    before, decoders = made(3).path, pixel_cache._decoders()
    assert decoders == {name: version(name) for name in ("pillow", "simplejpeg", "imagecodecs", "tifffile")}
    for name in decoders:
        with monkeypatch.context() as patch:
            patch.setattr(pixel_cache, "_decoders", lambda name=name: {**decoders, name: "0"})
            assert made(3).path != before
    assert made(3).path == before


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"half a file"])
@pytest.mark.parametrize("suffix", ["pixels", "sizes.npy"])
def test_what_is_damaged_is_decoded_again(made, suffix, damage):
    path = made(background=(5,)).path
    whole = path.read_bytes()
    path.with_suffix(f".{suffix}").write_bytes(damage)
    assert made(background=(5,)).path == path
    assert path.read_bytes() == whole


def test_what_a_killed_run_left_is_taken_away(made):
    path = made(background=(7,)).path
    path.unlink()
    left, another = (path.with_name(f".{path.name}-{end}") for end in ("0123456789ab", "ba9876543210"))
    left.write_bytes(b"half")
    another.write_bytes(b"of one that still writes")
    os.utime(left, (0, 0))
    assert made(background=(7,)).path == path
    assert [each.exists() for each in (path, left, another)] == [True, False, True]


def test_an_array_whose_files_were_touched_makes_room_for_the_next(folder, made, monkeypatch):
    other, in_use = made(background=(9,)).path, made(background=(8,)).path
    monkeypatch.setattr(pixel_cache, "use", lambda *names: None)
    unused = made(background=(6,)).path
    os.utime(folder / NAMES[0])
    assert made(background=(6,)).path != unused
    assert made(background=(8,)).path != in_use
    assert [path.exists() for path in (unused, in_use, other)] == [False, True, True]


def test_arrays_of_other_splits_and_folders_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_cache, "use", lambda *names: None)  # as of processes that have ended since
    lists = tmp_path / "list.csv"
    lists.write_text("path,split\n" + "".join(f"{folder}/{name},{('train', 'test')[name > 'b']}\n" for name in NAMES))
    sources = [
        lambda: open_source(f"csv:{lists}"),
        lambda: open_source(f"csv:{lists}", "test"),
        lambda: open_source("folder:images"),
    ]
    for here in ("one", "two"):
        shutil.copytree(folder, tmp_path / here / "images")
        monkeypatch.chdir(tmp_path / here)
        assert all(path.exists() for path in [cache_pixels(opened(), DecodeOptions(), 0).path for opened in sources])
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(pixel_cache, "_decode_all", None)  # all of them are there
    for opened in sources:
        cache_pixels(opened(), DecodeOptions(), workers=0)


def test_what_is_refused(folder, made, monkeypatch, cache, encode):
    spec = f"folder:{folder}"
    assert isinstance(open_images(DataConfig(spec, cache="pixels"), DecodeOptions(3), 0), PixelSource)
    assert not isinstance(open_images(DataConfig(spec), DecodeOptions(3), 0), PixelSource)
    with pytest.raises(UserError, match=r"data\.cache pixels does not go with weights"):
        open_images(DataConfig(f"3 * {spec} + 1 * {spec}/a", cache="pixels"), DecodeOptions(3), 0)
    usage = shutil.disk_usage(cache)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        text = r"of the decoded pixels of folder:.* takes 5\.04 kB, .* has room for 95 bytes\): set MPP_CACHE"
        with pytest.raises(UserError, match=text):
            made(3, (0.0, 7.0))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    with pytest.raises(UserError, match="kB, of the 1 kB that MPP_CACHE_LIMIT allows"):
        made(3, (0.0, 7.0))
    monkeypatch.delenv("MPP_CACHE_LIMIT")
    (folder / "a" / "3.png").write_bytes(encode(np.zeros((10, 15, 3), dtype=np.uint8)))
    text = rf"of one size: the first is 14 x 10, {folder}/a/3.png: 15 x 10 pixels; leave data.cache at auto"
    with pytest.raises(UserError, match=text):
        made(3)
    for name in NAMES:
        (folder / name).write_text("no image")
    with pytest.raises(UserError, match=r"none of the images of folder:.* could be decoded"):
        made(3)
