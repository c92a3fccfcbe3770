"""Pooling, and running an encoder over batches."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.data.loader import Batch
from mpp.downstream.features import extract_features, pool


def batch(images: Tensor, start: int, bad: tuple[int, ...] = ()) -> Batch:
    """As the loader gives it: the images whose number is in `bad` are not in it, but named."""
    good = [i for i in range(len(images)) if start + i not in bad]
    index = start + torch.tensor(good, dtype=torch.int64)
    return {"images": images[good], "index": index, "label": index % 3, "bad": [(i, "truncated") for i in bad]}


def encode(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :4].to(torch.bfloat16)


def test_pool_by_hand() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]])
    assert pool(tokens, 1, "mean").tolist() == [[2.0, 4.0]]
    assert pool(tokens, 1, "token").tolist() == [[9.0, 9.0]]
    assert pool(tokens, 2, "mean").tolist() == [[3.0, 6.0]]
    torch.testing.assert_close(pool(tokens, 0, "mean"), tokens.mean(dim=1))


def test_pool_refuses_a_token_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="take pool=mean"):
        pool(torch.zeros(1, 3, 2), 0, "token")
    with pytest.raises(ValueError, match="pool is mean or token, got 'max'"):
        pool(torch.zeros(1, 3, 2), 1, "max")  # pyright: ignore[reportArgumentType]


def test_features_are_those_of_the_encoder_in_order() -> None:
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    batches = [batch(images[:4], 100), batch(images[4:8], 104), batch(images[8:], 108)]
    features, index = extract_features(encode, iter(batches), "cpu")
    assert features.dtype == np.float32
    assert index.dtype == np.int64
    assert index.tolist() == list(range(100, 110))
    np.testing.assert_array_equal(features, encode(images).float().numpy())


def test_one_token_of_an_image_does_not_keep_all_of_them() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def encode(images: Tensor) -> Tensor:
        assert sum(tokens() is not None for tokens in kept) <= 1  # of the batch before
        tokens = images.float().reshape(len(images), 4, -1)
        kept.append(weakref.ref(tokens.untyped_storage()))
        return pool(tokens, 1, "token")

    batches = [batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), start) for start in range(0, 8, 2)]
    assert extract_features(encode, batches, "cpu")[0].shape == (8, 12)


def test_images_that_did_not_decode_are_left_out() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    features, index = extract_features(encode, [batch(images[:3], 0, (1,)), batch(images[3:], 3, (3, 4, 5))], "cpu")
    assert index.tolist() == [0, 2]
    np.testing.assert_array_equal(features, encode(images[[0, 2]]).float().numpy())


def test_no_gradients_are_kept() -> None:
    layer = torch.nn.Linear(48, 5)
    modes: list[bool] = []

    def remember(images: Tensor) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return layer(images.flatten(1).float())

    features, _ = extract_features(remember, [batch(torch.ones(2, 3, 4, 4, dtype=torch.uint8), 0)], "cpu")
    assert modes == [True]
    assert features.shape == (2, 5)


def test_reused_index_buffers_are_copied() -> None:
    held = batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0)

    def batches() -> Iterator[Batch]:
        for start in (0, 2):
            held["index"].copy_(torch.arange(start, start + 2))
            yield held

    assert extract_features(encode, batches(), "cpu")[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batches", [[], [batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0, (0, 1))]])
def test_no_image_at_all_is_no_row(batches: list[Batch]) -> None:
    def never(images: Tensor) -> Tensor:
        raise AssertionError("an encoder need not cope with an empty batch")

    features, index = extract_features(never, batches, "cpu")
    assert (features.shape, features.dtype, index.shape, index.dtype) == ((0, 0), np.float32, (0,), np.int64)


def test_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"encode must return \(2, d\) features, got \(2, 3, 4, 4\)"):
        extract_features(lambda images: images.float(), [batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0)], "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_what_the_cpu_gives() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    batches = [batch(part, start) for start, part in zip(range(0, 64, 16), images.split(16), strict=True)]
    on_device, index = extract_features(encode, batches, "cuda")
    np.testing.assert_array_equal(on_device, extract_features(encode, batches, "cpu")[0])
    assert index.tolist() == list(range(64))
