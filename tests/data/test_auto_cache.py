"""data.cache auto: the bits of a training that reads the files, from pixels that were decoded once where that pays."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp import cli
from mpp.data import auto_cache, pixel_cache
from mpp.data.auto_cache import keep_decoded
from mpp.data.pixel_cache import PixelSource
from mpp.data.randaugment import RandAugment
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Subset
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source
from mpp.data.transform import TrainTransform
from mpp.errors import Unreachable
from mpp.training.training_run import TrainingRun
from tests import runs
from tests.data.streams import assert_same, raising, run

DATA, SIDE = DataConfig(), 16
PLAIN = TrainTransform(DATA, (SIDE, SIDE), 3)


@pytest.fixture
def folder(tmp_path, encode) -> Path:
    """Noise of several sizes: PNG, JPEGs of which two are scaled at most crops to 16 pixels, one cut short."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    for number, side in enumerate((14, 20, 90, 14, 20, 38, 90, 160, 14, 20)):
        image = rng.integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
        kind = "PNG" if number < 3 or number > 7 else "JPEG"
        (root / f"{number}.{kind.lower()}").write_bytes(encode(image, kind))
    (root / "8.png").write_bytes((root / "8.png").read_bytes()[:200])
    return root


def cached(source, transform=PLAIN, **changed) -> tuple[Any, str]:
    lines = [""]
    settings = {"images": 1000, "workers": 0, "say": lines.append, **changed}
    return keep_decoded(DATA, source, transform, DecodeOptions(3), **settings), lines[-1]


@pytest.mark.parametrize(
    "transform",
    [
        PLAIN,
        TrainTransform(replace(DATA, crop_scale=(1, 1)), (14, 17), 3),
        TrainTransform(replace(DATA, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.3), (SIDE, SIDE), 3),
        RandAugment(DATA, "rand-m9-mstd0.5-inc1", (SIDE, SIDE), 3, (0.5,)),
    ],
    ids=["plain", "whole", "colours", "randaugment"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_bits(folder, transform, workers):
    source = open_source(f"folder:{folder}")
    found, note = cached(source, transform, workers=workers)
    assert isinstance(found, PixelSource)
    assert [found.decoded(index) for index in range(10)] == [*6 * [True], False, False, False, True]
    assert note.startswith("images are decoded once: ")
    assert str(found.path) in note
    assert note.endswith("; not 3 of them, JPEGs that are scaled to their crop while they are decoded, or damaged")
    part = np.array([5, 8, 2, 6])
    for one, other in ((found, source), (Subset(found, part), Subset(source, part))):
        assert_same(run(one, 10, transform), run(other, 10, transform))


def test_a_damaged_first_image_is_one_of_many(folder):
    (folder / "-0.png").write_bytes(b"what another system left behind")
    source = open_source(f"folder:{folder}")
    assert source.location(0).endswith("-0.png")
    found, note = cached(source)
    assert found is not source
    assert note.startswith("images are decoded once: ")


def test_a_part_is_decoded_alone(folder):
    source, decoding = open_source(f"folder:{folder}"), list[str]()
    part = Subset(source, np.array([5, 8, 2, 6]))
    found, _ = cached(part, images=8, say=decoding.append)
    assert decoding[0].startswith("decoding 4 images, once for all that is to be read: ")
    assert [found.decoded(index) for index in range(4)] == [True, False, True, False]
    assert_same(run(found, 10, PLAIN), run(part, 10, PLAIN))
    others = [cached(source)[0], cached(Subset(source, np.array([5, 8, 2, 7])))[0]]
    assert len({one.path for one in (found, *others)}) == 3


@pytest.mark.parametrize("order", [(64, 8), (8, 64)])
def test_another_size_of_crop_has_pixels_of_its_own(folder, monkeypatch, order):
    source = open_source(f"folder:{folder}")
    transforms = [TrainTransform(DATA, (side, side), 3) for side in order]
    for transform in transforms:
        cached(source, transform)
    on_device, _ = cached(source, transforms[0], device_jpegs=True)
    assert [on_device.decoded(index) for index in (2, 3, 6)] == [True, False, False]
    monkeypatch.setattr(pixel_cache, "_decode_all", None)  # they are there, and are taken for the shortest run, too
    monkeypatch.setattr(auto_cache, "_SAMPLE", None)
    for side, transform in zip(order, transforms, strict=True):
        found, _ = cached(source, transform, images=0, make=False)
        assert found.decoded(6) == (side == 64)
        assert_same(run(found, 10, transform), run(source, 10, transform))


def remote(folder):
    source = open_source(folder)
    source.name = "shards:s3://bucket/a.tar"
    return source


@pytest.mark.parametrize(
    ("opened", "changed", "reason"),
    [
        (open_source, {"images": 19}, "19 images of 10 are to be read, fewer than two passes"),
        (open_source, {"make": False}, "a dry run keeps no pixels"),
        (open_source, {"device_jpegs": True}, "JPEGs decoded on the device"),
        (lambda folder: MixtureSource("two", [open_source(folder)] * 2, [1, 2]), {}, "the sources are weighted"),
        (remote, {}, "they are remote (--data.keep true keeps the files)"),
        (lambda _: ListSource([b"", b"x"]), {}, "none of some decodes"),
    ],
)
def test_why_not(opened, changed, reason, folder, monkeypatch, cache):
    monkeypatch.setattr(pixel_cache, "_decode_all", None)
    if "device_jpegs" in changed:
        for name in ("0.png", "1.png", "2.png"):
            (folder / name).unlink()
    source, before = opened(f"folder:{folder}"), set(cache.rglob("*"))
    found, note = cached(source, **changed)
    assert found is source
    assert note == f"images are decoded each time they are read: {reason}"
    assert set(cache.rglob("*")) == before


def test_too_large(folder, monkeypatch, tmp_path):
    source = open_source(f"folder:{folder}")
    monkeypatch.setattr(auto_cache, "memory", lambda: 4 * 30_000)
    assert cached(source)[1].endswith("kB, more than a quarter of the memory")
    monkeypatch.setattr(auto_cache, "_SAMPLE", 1)  # only the first, which is small
    assert cached(source)[1].endswith("decoded they take more than 30 kB")  # and nothing is left of the attempt
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 20_000))
        assert "kB, more than a quarter of what is free in " in cached(source)[1]
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    assert "that MPP_CACHE_LIMIT allows" in cached(source)[1]
    monkeypatch.delenv("MPP_CACHE_LIMIT")
    monkeypatch.setenv("MPP_CACHE", str(folder / "0.png" / "cache"))
    assert cached(source)[1].endswith("0.png/cache (Not a directory)")


def test_what_needs_no_decoding_and_what_is_not_auto(folder, monkeypatch):
    array = ListSource(np.zeros((9, 8, 8, 3), dtype=np.uint8))
    assert cached(array) == (array, "")
    source = open_source(f"folder:{folder}")
    settings = {"images": 1000, "workers": 0, "say": pytest.fail}
    for how in ("none", "pixels"):
        assert keep_decoded(DataConfig(cache=how), source, PLAIN, DecodeOptions(3), **settings) is source
    monkeypatch.setattr(source, "read", raising(Unreachable("away")))
    with pytest.raises(Unreachable):
        cached(source)


@pytest.mark.slow
def test_a_run_ends_in_the_same_bits_and_may_go_on_with_or_without(folder, tmp_path, capsys, monkeypatch):
    for number in range(12, 40):
        image = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number}.jpg")
    first, plain, changed = (tmp_path / "runs" / name for name in ("cached", "plain", "changed"))

    def trained(run_dir: Path, cache: str, length: str = "8 steps") -> int:
        changed = {"fewshot__data": "", "train__length": length, "checkpoint__every": "4 steps"}
        words = runs.command(f"folder:{folder}", run_dir, data__cache=cache, **changed)
        return cli.pretrain(words[1:])

    assert trained(first, "auto") == 0
    said = capsys.readouterr().err
    assert said.index("decoding 38 images, once for all") < said.index("images are decoded once: ")
    assert trained(plain, "none") == 0
    assert "decoded once" not in capsys.readouterr().err
    runs.assert_same_run(first, plain)
    shutil.copytree(plain, changed)
    for path in (changed / "checkpoints").glob("step_000000008*"):
        path.unlink()
    assert trained(changed, "auto") == 0
    runs.assert_same_run(changed, plain)
    monkeypatch.setattr(TrainingRun, "decoded", None)  # not for a run that is finished, or refused
    assert trained(changed, "auto") == 0
    assert trained(changed, "auto", "9 steps") == 2
