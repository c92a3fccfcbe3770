"""data.cache auto: the bits of a training that reads the files, from pixels that were decoded once where that pays."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp import cli
from mpp.data import auto_cache, pixel_cache
from mpp.data.auto_cache import keep_decoded
from mpp.data.loader import stream
from mpp.data.pixel_cache import PixelSource
from mpp.data.randaugment import RandAugment
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import ListSource, Source, Subset
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source
from mpp.data.transform import TrainTransform, Transform
from mpp.errors import Unreachable
from mpp.pretraining import recipe as pretrain
from tests import runs

READING, DATA, SIDE = DecodeOptions(3), DataConfig(), 16
PLAIN = TrainTransform(DATA, (SIDE, SIDE), 3)


@pytest.fixture
def folder(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """Noise of several sizes: PNG, JPEGs of which two are scaled at most crops to 16 pixels, one cut short."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    for number, side in enumerate((14, 20, 90, 14, 20, 38, 90, 160, 14, 20)):
        image = rng.integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
        kind = "PNG" if number < 3 or number > 7 else "JPEG"
        (root / f"{number}.{kind.lower()}").write_bytes(encode(image, kind))
    (root / "8.png").write_bytes((root / "8.png").read_bytes()[:200])
    return root


def kept(source: Source, transform: Transform = PLAIN, **changed: Any) -> tuple[Source, str]:
    lines = [""]
    told = {"images": 1000, "workers": 0, "say": lines.append}
    return keep_decoded(DATA, source, transform, READING, **{**told, **changed}), lines[-1]


def first(source: Source, transform: Transform = PLAIN) -> list[Any]:
    it = stream(source, transform, READING, seed=3, batch_size=8, micro_batch=8, start=0)
    batches = [next(it) for _ in range(5)]
    it.close()
    return [
        (batch["images"].tolist(), batch["index"].tolist(), batch["label"].tolist(), batch["bad"]) for batch in batches
    ]


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
def test_the_stream_is_the_same_bits(folder: Path, transform: Transform, workers: int) -> None:
    source = open_source(f"folder:{folder}")
    found, note = kept(source, transform, workers=workers)
    assert isinstance(found, PixelSource)
    assert [found.decoded(index) for index in range(10)] == [*6 * [True], False, False, False, True]
    assert note.startswith("images are decoded once: ")
    assert str(found.path) in note
    assert note.endswith("; not 3 of them, JPEGs that are scaled to their crop while they are decoded, or damaged")
    assert first(found, transform) == first(source, transform)
    part = np.array([5, 8, 2, 6])
    assert first(Subset(found, part), transform) == first(Subset(source, part), transform)


def test_a_part_is_decoded_alone(folder: Path) -> None:
    source, decoding = open_source(f"folder:{folder}"), list[str]()
    part = Subset(source, np.array([5, 8, 2, 6]))
    found, _ = kept(part, images=8, say=decoding.append)
    assert isinstance(found, PixelSource)
    assert decoding[0].startswith("decoding 4 images, once for all that is to be read: ")
    assert [found.decoded(index) for index in range(4)] == [True, False, True, False]
    assert first(found) == first(part)
    whole, _ = kept(source)
    again, _ = kept(Subset(source, np.array([5, 8, 2, 7])))
    assert len({one.path for one in (found, whole, again)}) == 3  # pyright: ignore


@pytest.mark.parametrize("order", [(64, 8), (8, 64)])
def test_another_size_of_crop_has_pixels_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    source = open_source(f"folder:{folder}")
    transforms = [TrainTransform(DATA, (side, side), 3) for side in order]
    for transform in transforms:
        kept(source, transform)
    late, _ = kept(source, transforms[0], device_jpegs=True)
    assert [late.decoded(index) for index in (2, 3, 6)] == [True, False, False]  # pyright: ignore
    monkeypatch.setattr(pixel_cache, "_decode_all", None)  # they are there, and are taken for the shortest run, too
    monkeypatch.setattr(auto_cache, "_SAMPLE", None)
    for side, transform in zip(order, transforms, strict=True):
        found, _ = kept(source, transform, images=0, make=False)
        assert found.decoded(6) == (side == 64)  # pyright: ignore
        assert first(found, transform) == first(source, transform)


def weighted(folder: Path) -> Source:
    part = open_source(f"folder:{folder}")
    return MixtureSource("two", [part, part], [1, 2])


def remote(folder: Path) -> Source:
    source = open_source(f"folder:{folder}")
    source.name = "shards:s3://bucket/a.tar"
    return source


WHY: dict[str, tuple[Callable[[Path], Source], dict[str, Any], str]] = {
    "short": (
        lambda f: open_source(f"folder:{f}"),
        {"images": 19},
        "19 images of 10 are to be read, fewer than two passes",
    ),
    "dry": (lambda f: open_source(f"folder:{f}"), {"make": False}, "a dry run keeps no pixels"),
    "late": (lambda f: open_source(f"folder:{f}"), {"device_jpegs": True}, "JPEGs decoded on the device"),
    "weighted": (weighted, {}, "the sources are weighted"),
    "remote": (remote, {}, "they are remote (--data.keep true keeps the files)"),
    "none decodes": (lambda _: ListSource([b"", b"x"]), {}, "none of some decodes"),
}


@pytest.mark.parametrize("why", WHY)
def test_why_not(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    opened, changed, said = WHY[why]
    monkeypatch.setattr(pixel_cache, "_decode_all", None)
    if why == "late":
        for name in ("0.png", "1.png", "2.png"):
            (folder / name).unlink()
    source = opened(folder)
    before = set(cache.rglob("*"))
    found, note = kept(source, **changed)
    assert found is source
    assert note == f"images are decoded each time they are read: {said}"
    assert set(cache.rglob("*")) == before


def test_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = open_source(f"folder:{folder}")
    monkeypatch.setattr(auto_cache, "memory", lambda: 4 * 30_000)
    assert kept(source)[1].endswith("kB, more than a quarter of the memory")
    monkeypatch.setattr(auto_cache, "_SAMPLE", 1)  # only the first, which is small
    assert kept(source)[1].endswith("decoded they take more than 30 kB")  # and nothing is left of the attempt
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 20_000))
        assert "kB, more than a quarter of what is free in " in kept(source)[1]
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    assert "that MPP_CACHE_LIMIT allows" in kept(source)[1]
    monkeypatch.delenv("MPP_CACHE_LIMIT")
    monkeypatch.setenv("MPP_CACHE", str(folder / "0.png" / "cache"))
    assert kept(source)[1].endswith("0.png/cache (Not a directory)")


def test_what_needs_no_decoding_and_what_is_not_auto(folder: Path) -> None:
    array = ListSource(np.zeros((9, 8, 8, 3), dtype=np.uint8))
    assert kept(array) == (array, "")
    source = open_source(f"folder:{folder}")
    for how in ("none", "pixels"):
        config = DataConfig(cache=how)
        found = keep_decoded(config, source, PLAIN, READING, images=1000, workers=0, say=pytest.fail)
        assert found is source


def test_a_store_that_gives_no_answer_is_no_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"folder:{folder}")

    def away(_: int) -> None:
        raise Unreachable("away")

    monkeypatch.setattr(source, "read", away)
    with pytest.raises(Unreachable):
        kept(source)


def trained(source: str, folder: Path, cache: str) -> Path:
    words = runs.command(source, folder, data__cache=cache, fewshot__data="", train__length="12 steps")
    assert cli.pretrain(words[1:]) == 0
    return folder


def test_a_run_ends_in_the_same_bits_and_may_go_on_with_or_without(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12, 40):
        image = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number}.jpg")
    source = f"folder:{folder}"
    cached, plain, changed = (tmp_path / "runs" / name for name in ("cached", "plain", "changed"))
    trained(source, cached, "auto")
    said = capsys.readouterr().err
    assert said.index("decoding 38 images, once for all") < said.index("images are decoded once: ")
    trained(source, plain, "none")
    assert "decoded once" not in capsys.readouterr().err
    runs.assert_same_run(cached, plain)
    shutil.copytree(plain, changed)
    for path in (changed / "checkpoints").glob("step_000000012*"):
        path.unlink()
    trained(source, changed, "auto")
    runs.assert_same_run(changed, plain)
    monkeypatch.setattr(pretrain, "read_decoded", None)  # not for a run that is finished, or refused
    trained(source, changed, "auto")
    words = runs.command(source, changed, data__cache="auto", fewshot__data="", train__length="13 steps")
    assert cli.pretrain(words[1:]) == 2
