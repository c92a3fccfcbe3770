"""Decoding on the device, by a stand-in for nvJPEG on the CPU, and by itself where there is CUDA."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from mpp.data.device_jpeg import choose_decoder, nvjpeg
from mpp.data.feed import feed
from mpp.data.randaugment import RandAugment
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import TrainTransform
from mpp.dist import World
from mpp.errors import UserError
from tests.data.streams import raising

CPU = torch.device("cpu")


def stand_in(files: Sequence[Tensor], channels: int) -> list[Tensor]:
    """As torchvision's decode_jpeg: (C, H, W) each, and RuntimeError for all where one is refused."""
    try:
        pixels = [simplejpeg.decode_jpeg(file.numpy().tobytes(), "RGB" if channels == 3 else "GRAY") for file in files]
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    return [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]


@pytest.fixture
def source(encode: Callable[..., bytes]) -> ListSource:
    """JPEGs, turned ones, a PNG, a JPEG cut short, one damaged where its header does not tell, and no image."""
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 50)) for _ in range(14)]
    exif = Image.Exif()
    images: list[bytes] = []
    for number, image in enumerate(smooth):
        exif[0x0112] = number % 8 + 1
        images.append(encode(image, "JPEG", quality=95, subsampling=0, exif=exif if number < 8 else b""))
    images[9] = encode(smooth[9], "PNG")
    images[10] = images[10][:900]
    images[11] = images[11][:700] + b"\xff\xc4\x00\x02" + images[11][720:]
    images[12] = b"no image"
    return ListSource(images, list(range(14)))


def batches(source, decode, device=CPU, workers=0, channels=3) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """Images, labels, and index and kind of bad ones of four micro-batches."""
    heard: list[tuple[int, str]] = []
    config = DataConfig(vflip=0.5, jitter=(0.2, 0.2, 0.2, 0.1) if channels == 3 else (0.2, 0.2, 0, 0))
    settings: Any = {"seed": 1, "batch_size": 14, "micro_batch": 7, "start": 0, "world": World(), "workers": workers}
    settings |= {"report_bad": lambda bad, _: heard.extend((one.index, one.kind) for one in bad), "decode": decode}
    transform = TrainTransform(config, (24, 24), channels)
    with contextlib.closing(feed(source, transform, DecodeOptions(channels), device, **settings)) as found:
        both = [next(found) for _ in range(4)]
    images = torch.cat([batch["images"].cpu() for batch in both])
    return images, torch.cat([batch["labels"].cpu() for batch in both]).tolist(), heard


def difference(images: Tensor, others: Tensor) -> Tensor:
    return (images.int() - others.int()).abs().float()


@pytest.mark.parametrize(("workers", "channels"), [(0, 3), (2, 3), (0, 1)])
def test_it_is_the_batch_of_the_workers(source: ListSource, workers: int, channels: int) -> None:
    late, labels, bad = batches(source, stand_in, workers=workers, channels=channels)
    usual, their_labels, their_bad = batches(source, None, channels=channels)
    assert labels == their_labels
    assert sorted(bad) == sorted(their_bad)
    assert {index for index, _ in bad} == {10, 11, 12}
    assert {9, 10, 11, 12} & set(labels) == {9}
    # One resizes in whole numbers, the other in floating point.
    assert difference(late, usual).mean() < 0.6
    assert difference(late, usual).max() <= 12


@pytest.mark.parametrize("most", [4, 3])
def test_the_decoder_gets_whole_jpegs_alone_in_groups(source: ListSource, monkeypatch, most: int) -> None:
    asked: list[int] = []

    def decode(files: Sequence[Tensor], channels: int) -> list[Tensor]:
        assert all(file[:2].tolist() == [0xFF, 0xD8] for file in files)
        assert all(file[-2:].tolist() == [0xFF, 0xD9] for file in files)
        asked.append(len(files))
        return stand_in(files, channels)

    if most == 3:
        monkeypatch.setattr("mpp.data.device_jpeg._MOST_PIXELS", 3 * 50 * 70)
    late, labels, _ = batches(source, decode)
    assert max(asked) == 3 if most == 3 else max(asked) >= 4
    usual, their_labels, _ = batches(source, None)
    assert labels == their_labels
    assert difference(late, usual).mean() < 0.6


def test_an_out_of_memory_error_is_no_bad_file(source: ListSource) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        batches(source, raising(RuntimeError("Error while decoding JPEG images: CUDA out of memory")))


def test_what_it_does_not_go_with() -> None:
    plain = TrainTransform(DataConfig(), (8, 8), 3)
    assert choose_decoder("cpu", CPU, plain) is None
    with pytest.raises(UserError, match=r"data\.decode cuda needs a CUDA device, and this run is on cpu"):
        choose_decoder("cuda", CPU, plain)
    augment = RandAugment(DataConfig(), "rand-m9", (8, 8), 3, (0.5,))
    with pytest.raises(UserError, match=r"does not go with data\.randaugment"):
        choose_decoder("cuda", torch.device("cuda"), augment)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpeg(source: ListSource) -> None:
    device = torch.device("cuda")
    late, labels, bad = batches(source, nvjpeg(device), device)
    usual, their_labels, their_bad = batches(source, None)
    assert (labels, sorted(bad)) == (their_labels, sorted(their_bad))
    assert difference(late, usual).mean() < 2


def test_jpegs_that_store_red_green_and_blue_stay_with_the_workers(encode: Callable[..., bytes]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    rgb = ListSource([encode(image, "JPEG", keep_rgb=True, quality=95)] * 14)
    assert batches(rgb, raising(AssertionError("decoded on the device")))[2] == []


def test_very_large_photographs_are_resized_all_the_same(encode: Callable[..., bytes]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((1200, 900))
    large = ListSource([encode(image, "JPEG", quality=90)] * 14)
    late, _, bad = batches(large, stand_in)
    usual, _, _ = batches(large, None)
    assert bad == []
    # The workers snap the boxes to blocks of 8 pixels, which moves these coarse colours a little.
    assert difference(late, usual).mean() < 6
