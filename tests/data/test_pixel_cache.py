"""Decoded pixels on disk: the same images as decoding each time, decoded once."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.data import pixel_cache
from mpp.data.loader import stream
from mpp.data.pixel_cache import PixelSource, cache_pixels, open_images
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Source, Subset
from mpp.data.sources.opening import open_source
from mpp.data.transform import TrainTransform
from mpp.errors import UserError

NAMES = [f"{label}/{number}.png" for label in ("a", "b") for number in range(6)]


@pytest.fixture
def folder(picture_folder: Callable[..., Path], encode: Callable[..., bytes]) -> Path:
    """Twelve pictures of noise in two classes, one of them cut short."""
    root = picture_folder(*NAMES)
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / name).write_bytes(encode(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)))
    (root / "b" / "2.png").write_bytes((root / "b" / "2.png").read_bytes()[:150])
    return root


def first(source: Source, reading: DecodeOptions, batches: int = 3) -> list[tuple[torch.Tensor, Any, Any, list[str]]]:
    transform = TrainTransform(DataConfig(), (8, 8), reading.channels)
    it = stream(source, transform, reading, seed=3, batch_size=8, micro_batch=8, start=0)
    try:
        found = [next(it) for _ in range(batches)]
    finally:
        it.close()
    return [(b["images"], b["index"].tolist(), b["label"].tolist(), [str(bad) for bad in b["bad"]]) for b in found]


@pytest.mark.parametrize(
    "reading", [DecodeOptions(3), DecodeOptions(1), DecodeOptions(3, (0.0, 100.0))], ids=["rgb", "grey", "range"]
)
def test_the_stream_is_the_same_bits(folder: Path, reading: DecodeOptions) -> None:
    source = open_source(f"folder:{folder}")
    kept = cache_pixels(source, reading, workers=0)
    assert (len(kept), kept.classes, kept.where(3)) == (12, ("a", "b"), source.where(3))  # pyright: ignore
    np.testing.assert_array_equal(kept.labels(), source.labels())
    for plain, cached in zip(first(source, reading), first(kept, reading), strict=True):
        assert torch.equal(plain[0], cached[0])
        assert plain[1:] == cached[1:]
    part = np.array([5, 2, 8])
    for plain, cached in zip(first(Subset(source, part), reading), first(Subset(kept, part), reading), strict=True):
        assert torch.equal(plain[0], cached[0])
        assert plain[1:] == cached[1:]


def test_it_decodes_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"folder:{folder}")
    before = cache_pixels(source, DecodeOptions(3), workers=2)
    monkeypatch.setattr(pixel_cache, "_decode_all", lambda *_: pytest.fail("decoded again"))
    after = cache_pixels(source, DecodeOptions(3), workers=0)
    assert before.path == after.path
    assert "; decoded pixels (4.62 kB) in " in after.describe()
    monkeypatch.undo()
    (folder / "a" / "0.png").write_bytes((folder / "a" / "1.png").read_bytes())
    assert cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(3), workers=0).path != before.path
    assert cache_pixels(source, DecodeOptions(1), workers=0).path != before.path


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"half a file"])
@pytest.mark.parametrize("suffix", ["pixels", "sizes.npy"])
def test_what_is_damaged_is_decoded_again(folder: Path, suffix: str, damage: bytes) -> None:
    source, reading = open_source(f"folder:{folder}"), DecodeOptions(3, background=(5,))
    path = cache_pixels(source, reading, workers=0).path
    whole = path.read_bytes()
    path.with_suffix(f".{suffix}").write_bytes(damage)
    assert cache_pixels(source, reading, workers=0).path == path
    assert path.read_bytes() == whole


def test_another_version_of_a_decoder_decodes_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Path:
        return cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(3, background=(4,)), workers=0).path

    before, version = made(), pixel_cache.metadata.version
    for name in ("pillow", "simplejpeg", "imagecodecs", "tifffile"):
        with monkeypatch.context() as patch:
            patch.setattr(pixel_cache.metadata, "version", lambda one, name=name: "0" if one == name else version(one))
            assert made() != before
    assert made() == before


def test_pixels_of_another_reading_are_others(folder: Path) -> None:
    source = open_source(f"folder:{folder}")
    readings = [DecodeOptions(3), DecodeOptions(3, (0.0, 100.0)), DecodeOptions(3, background=(0,)), DecodeOptions(1)]
    assert len({cache_pixels(source, reading, workers=0).path for reading in readings}) == 4


def test_what_a_killed_run_left_is_taken_away(folder: Path, cache: Path) -> None:
    source, reading = open_source(f"folder:{folder}"), DecodeOptions(3, background=(7,))
    path = cache_pixels(source, reading, workers=0).path
    path.unlink()
    left = path.with_name(f".{path.name}-0123456789ab")
    left.write_bytes(b"half")
    another = path.with_name(f".{path.name}-ba9876543210")
    another.write_bytes(b"of one that still writes")
    os.utime(left, (0, 0))
    assert cache_pixels(source, reading, workers=0).path == path
    assert not left.exists()
    assert another.exists()
    assert path.exists()


def test_an_array_whose_files_were_touched_makes_room_for_the_next(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(value: int) -> Path:
        return cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(3, background=(value,)), workers=0).path

    other, in_use = made(9), made(8)
    monkeypatch.setattr(pixel_cache, "use", lambda *names: None)  # as by a process that has ended since
    idle = made(6)
    os.utime(folder / NAMES[0])
    assert made(6) != idle
    assert made(8) != in_use
    assert [path.exists() for path in (idle, in_use, other)] == [False, True, True]


def test_arrays_of_other_splits_and_folders_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "use", lambda *names: None)  # as by processes that have ended since
    lists = tmp_path / "list.csv"
    lists.write_text("path,split\n" + "".join(f"{folder}/{name},{('train', 'test')[name > 'b']}\n" for name in NAMES))
    sources: list[Callable[[], Source]] = [
        lambda: open_source(f"csv:{lists}"),
        lambda: open_source(f"csv:{lists}", "test"),
    ]
    for here in ("one", "two"):
        shutil.copytree(folder, tmp_path / here / "images")
        monkeypatch.chdir(tmp_path / here)
        paths = [cache_pixels(opened(), DecodeOptions(), workers=0).path for opened in sources]
        paths.append(cache_pixels(open_source("folder:images"), DecodeOptions(), workers=0).path)
        assert all(path.exists() for path in paths)
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(pixel_cache, "_decode_all", None)  # all of them are there
    for opened in (*sources, lambda: open_source("folder:images")):
        cache_pixels(opened(), DecodeOptions(), workers=0)


def test_whole_arrays_go_in_blocks(folder: Path) -> None:
    (folder / "b" / "2.png").unlink()
    kept = cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(3), workers=0)
    block = kept.block(np.array([3, 0]))
    assert block is not None
    np.testing.assert_array_equal(block[1], kept.read(0)[0])
    pixels = first(kept, DecodeOptions(3))[0][0]
    assert pixels.shape == (8, 3, 8, 8)


def test_images_of_several_sizes_are_refused(folder: Path, encode: Callable[..., bytes]) -> None:
    (folder / "a" / "3.png").write_bytes(encode(np.zeros((10, 15, 3), dtype=np.uint8)))
    source = open_source(f"folder:{folder}")
    text = rf"of one size: the first is 14 x 10, {folder}/a/3.png: 15 x 10 pixels; leave data.cache at auto"
    with pytest.raises(UserError, match=text):
        cache_pixels(source, DecodeOptions(3), workers=0)


def test_no_room_and_no_images(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    source = open_source(f"folder:{folder}")
    usage = shutil.disk_usage(cache)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        text = r"of the decoded pixels of folder:.* takes 5\.04 kB, .* has room for 95 bytes\): set MPP_CACHE"
        with pytest.raises(UserError, match=text):
            cache_pixels(source, DecodeOptions(3, (0.0, 7.0)), workers=0)
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    with pytest.raises(UserError, match="kB, of the 1 kB that MPP_CACHE_LIMIT allows"):
        cache_pixels(source, DecodeOptions(3, (0.0, 7.0)), workers=0)
    for name in NAMES:
        (folder / name).write_text("no image")
    with pytest.raises(UserError, match=r"none of the images of folder:.* could be decoded"):
        cache_pixels(open_source(f"folder:{folder}"), DecodeOptions(3), workers=0)


def test_configs(folder: Path) -> None:
    spec = f"folder:{folder}"
    assert isinstance(open_images(DataConfig(spec, cache="pixels"), DecodeOptions(3), 0), PixelSource)
    assert not isinstance(open_images(DataConfig(spec), DecodeOptions(3), 0), PixelSource)
    with pytest.raises(UserError, match=r"data\.cache pixels does not go with weights"):
        open_images(DataConfig(f"3 * {spec} + 1 * {spec}/a", cache="pixels"), DecodeOptions(3), 0)
