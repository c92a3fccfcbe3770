"""Blocks of small images: the crops of one image at a time, whatever else is in the block."""

import numpy as np
import pytest
import torch

from mpp.data.batch_resize import crop_and_resize, is_small
from mpp.data.seeds import image_seeds, uniforms
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Source, Subset
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import TrainTransform, resize
from tests.data.streams import joined, run

RNG, PLAIN = np.random.default_rng(0), DecodeOptions(3)


def some(number: int, height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    images = RNG.integers(0, 256, (number, height, width, channels), dtype=np.uint8)
    size = np.stack([RNG.integers(1, height + 1, number), RNG.integers(1, width + 1, number)], axis=1)
    corner = (RNG.random((number, 2)) * (np.array([height, width]) + 1 - size)).astype(np.int64)
    return images, np.concatenate([corner, size], axis=1)


@pytest.mark.parametrize(
    ("hw", "channels", "target"), [((32, 32), 3, (32, 32)), ((28, 20), 1, (16, 24)), ((9, 13), 5, (40, 7))]
)
def test_crops_equal_torchs(hw: tuple[int, int], channels: int, target: tuple[int, int]) -> None:
    images, boxes = some(200, *hw, channels)
    no = np.zeros(200, dtype=bool)
    ours = crop_and_resize(images, boxes, no, no, target)
    assert ours.shape == (200, channels, *target)
    for image, (top, left, height, width), out in zip(images, boxes.tolist(), ours, strict=True):
        exact = resize(image[top : top + height, left : left + width], target)
        # Both round between the axes, in fixed point of their own.
        difference = (out.int() - exact.int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.1


def test_an_image_is_the_same_in_any_block_but_flipped() -> None:
    images, boxes = some(64, 32, 32, 3)
    flip = RNG.random(64) < 0.5
    together = crop_and_resize(images, boxes, flip, ~flip, (32, 32))
    plain = crop_and_resize(images, boxes, flip & False, flip & False, (32, 32))
    assert torch.equal(together[flip], plain[flip].flip(3))
    assert torch.equal(together[~flip], plain[~flip].flip(2))
    for part in (slice(0, 1), slice(1, 8), slice(8, 64)):
        alone = crop_and_resize(images[part], boxes[part], flip[part], ~flip[part], (32, 32))
        assert torch.equal(alone, together[part])


def test_a_block_is_what_one_image_at_a_time_is() -> None:
    transform = TrainTransform(DataConfig(vflip=0.5), (32, 32), 3)
    images, _ = some(100, 32, 32, 3)
    draws = uniforms(image_seeds(0, np.arange(100)), transform.draws)
    block = transform.block(images, draws)
    one_by_one = torch.stack([transform(image, row) for image, row in zip(images, draws.tolist(), strict=True)])
    difference = (block.int() - one_by_one.int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.01


def test_what_is_large_or_jittered_goes_one_by_one() -> None:
    assert is_small((64, 64), (64, 64))
    assert not is_small((224, 224), (32, 32))
    assert TrainTransform(DataConfig(), (32, 32), 3).takes_blocks(32, 40)
    assert not TrainTransform(DataConfig(), (32, 32), 3).takes_blocks(300, 200)
    for colours in (DataConfig(jitter=(0.1, 0, 0, 0)), DataConfig(grayscale=0.1)):
        assert not TrainTransform(colours, (32, 32), 3).takes_blocks(32, 32)


def test_the_stream_is_the_same_bits_in_blocks_of_an_array_and_of_what_a_batch_reads(encode) -> None:
    images, _ = some(40, 32, 32, 3)
    transform = TrainTransform(DataConfig(), (32, 32), 3)

    def first(source: Source, options: DecodeOptions = PLAIN, micro: int = 20, workers: int = 0) -> torch.Tensor:
        settings = {"seed": 1, "batch_size": 20, "micro_batch": micro, "start": 20, "workers": workers}
        return joined(run(source, 40 // micro, transform, options, **settings), "images")

    labels = np.arange(40)
    whole = first(ListSource(images, labels))
    assert torch.equal(whole, first(ListSource(images, labels), micro=5, workers=2))
    part = Subset(ListSource(np.concatenate([images, images]), np.tile(labels, 2)), np.arange(40, 80))
    assert torch.equal(whole, first(part))
    assert torch.equal(whole, first(ListSource(list(images), labels)))
    assert torch.equal(whole, first(ListSource([encode(image, "png") for image in images], labels), workers=1))
    # Images of other sizes, in their block and not, and damaged ones among them change nothing.
    mixed = [
        encode(image if row % 3 else np.full((25 + 8 * (row % 2), 31, 3), 255, np.uint8))
        for row, image in enumerate(images)
    ]
    mixed[4] = b"damaged"
    plain, among = (
        run(ListSource(those), 2, transform, PLAIN, batch_size=20, micro_batch=20) for those in (images, mixed)
    )
    index = joined(plain, "index")
    same = (index == joined(among, "index")) & (index % 3 > 0)
    assert same.sum() == 25
    assert torch.equal(joined(plain, "images")[same], joined(among, "images")[same])
    stated = first(ListSource(images, labels), DecodeOptions(3, (0.0, 127.5)))
    assert torch.equal(stated, first(ListSource(list(images), labels), DecodeOptions(3, (0.0, 127.5))))
