"""Decoding on the device, by a stand-in for nvJPEG on the CPU, and by itself where there is CUDA."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from mpp.data.device_jpeg import choose_decoder, nvjpeg
from mpp.data.randaugment import RandAugment
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import TrainTransform
from mpp.errors import UserError
from tests.data.picture_files import exif
from tests.data.streams import CPU, fed, joined, raising

RNG = np.random.default_rng(0)


def stand_in(files: Sequence[Tensor], channels: int) -> list[Tensor]:
    """As torchvision's decode_jpeg: (C, H, W) each, and RuntimeError for all where one is refused."""
    try:
        pixels = [simplejpeg.decode_jpeg(file.numpy().tobytes(), "RGB" if channels == 3 else "GRAY") for file in files]
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    return [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]


def smooth(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))


@pytest.fixture
def source(encode: Callable[..., bytes]) -> ListSource:
    """JPEGs, turned ones, a PNG, a JPEG cut short, one damaged where its header does not tell, and no image."""
    images: list[bytes] = []
    for number in range(14):
        turned = exif(number % 8 + 1) if number < 8 else b""
        images.append(encode(smooth(70, 50), "JPEG", quality=95, subsampling=0, exif=turned))
    images[9] = encode(smooth(70, 50), "PNG")
    images[10] = images[10][:900]
    images[11] = images[11][:700] + b"\xff\xc4\x00\x02" + images[11][720:]
    images[12] = b"no image"
    return ListSource(images, list(range(14)))


def batches(source, decode, device=CPU, workers=0, channels=3) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """Images, labels, and sorted index and kind of bad ones of four micro-batches."""
    heard: list[tuple[int, str]] = []
    config = DataConfig(vflip=0.5, jitter=(0.2, 0.2, 0.2, 0.1) if channels == 3 else (0.2, 0.2, 0, 0))
    settings = {"batch_size": 14, "micro_batch": 7, "workers": workers, "decode": decode}
    settings |= {"report_bad": lambda bad, _: heard.extend((one.index, one.kind) for one in bad)}
    found = fed(source, 4, TrainTransform(config, (24, 24), channels), DecodeOptions(channels), device, **settings)
    return joined(found, "images").cpu(), joined(found, "labels").tolist(), sorted(heard)


def difference(images: Tensor, others: Tensor) -> Tensor:
    return (images.int() - others.int()).abs().float()


@pytest.mark.parametrize(("workers", "channels"), [(0, 3), (2, 3), (0, 1)])
def test_it_is_the_batch_of_the_workers(source: ListSource, workers: int, channels: int) -> None:
    late, *others = batches(source, stand_in, workers=workers, channels=channels)
    usual, labels, bad = batches(source, None, channels=channels)
    assert others == [labels, bad]
    assert {index for index, _ in bad} == {10, 11, 12}
    assert {9, 10, 11, 12} & set(labels) == {9}
    # One resizes in whole numbers, the other in floating point.
    assert difference(late, usual).mean() < 0.6
    assert difference(late, usual).max() <= 12


@pytest.mark.parametrize("most", [4, 3])
def test_the_decoder_gets_whole_jpegs_alone_in_groups(source: ListSource, monkeypatch, most: int) -> None:
    asked: list[int] = []

    def decode(files: Sequence[Tensor], channels: int) -> list[Tensor]:
        assert all((file[:2].tolist(), file[-2:].tolist()) == ([0xFF, 0xD8], [0xFF, 0xD9]) for file in files)
        asked.append(len(files))
        return stand_in(files, channels)

    if most == 3:
        monkeypatch.setattr("mpp.data.device_jpeg._MOST_PIXELS", 3 * 50 * 70)
    late, *others = batches(source, decode)
    assert max(asked) == 3 if most == 3 else max(asked) >= 4
    usual, *their_others = batches(source, None)
    assert others == their_others
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
    late, *others = batches(source, nvjpeg(device), device)
    usual, *their_others = batches(source, None)
    assert others == their_others
    assert difference(late, usual).mean() < 2


def test_jpegs_that_store_red_green_and_blue_stay_with_the_workers(encode: Callable[..., bytes]) -> None:
    rgb = ListSource([encode(smooth(30, 20), "JPEG", keep_rgb=True, quality=95)] * 14)
    assert batches(rgb, raising(AssertionError("decoded on the device")))[2] == []


def test_very_large_photographs_are_resized_all_the_same(encode: Callable[..., bytes]) -> None:
    large = ListSource([encode(smooth(1200, 900), "JPEG", quality=90)] * 14)
    late, _, bad = batches(large, stand_in)
    assert bad == []
    # The workers snap the boxes to blocks of 8 pixels, which moves these coarse colours a little.
    assert difference(late, batches(large, None)[0]).mean() < 6
