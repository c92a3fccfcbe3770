"""Measures of attention against their definitions written out, on attention whose measures are known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.errors import UserError
from mpp.objective.objective import patch_distances
from mpp.report.attention import (
    attention_rollout,
    attention_statistics,
    entropy,
    mean_distance,
    patch_attention,
    rollout,
)
from mpp.report.inspection import Inspected, inspect
from mpp.weights.base import Weights, build

GRID, PATCH = (3, 4), (8, 4)
N = GRID[0] * GRID[1]
APART = patch_distances(GRID, PATCH).double().sqrt()


def pairwise_distance() -> float:
    """The mean over all pairs of patches, a patch with itself included, one pair after the other."""
    places = [(row * PATCH[0], column * PATCH[1]) for row in range(GRID[0]) for column in range(GRID[1])]
    return float(np.mean([math.dist(one, other) for one in places for other in places]))


def batch(*heads: Tensor) -> Tensor:
    """Two images with these weights as their heads."""
    return torch.stack(heads).double().expand(2, -1, -1, -1)


def to_the_neighbour(axis: int) -> Tensor:
    """Every patch attends to the next one in its column (0) or row (1), the last to the one before it."""
    index = torch.arange(N).reshape(GRID)
    goal = torch.cat([index.narrow(axis, 1, GRID[axis] - 1), index.narrow(axis, GRID[axis] - 2, 1)], dim=axis)
    return torch.eye(N)[goal.flatten()]


def test_distances_of_known_attention() -> None:
    uniform, own = torch.full((N, N), 1 / N), torch.eye(N)
    found = mean_distance(batch(uniform, own, to_the_neighbour(0), to_the_neighbour(1)), APART)
    expected = torch.tensor([pairwise_distance(), 0, PATCH[0], PATCH[1]], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(found, expected)


def test_what_other_tokens_take_does_not_shorten_the_distance() -> None:
    weights = torch.rand(2, 3, N, N, dtype=torch.float64).softmax(dim=-1)
    share = torch.rand(2, 3, N, 1, dtype=torch.float64)
    torch.testing.assert_close(mean_distance(weights * share, APART), mean_distance(weights, APART))
    assert torch.equal(mean_distance(torch.zeros(1, 1, N, N), APART.float()), torch.zeros(1, 1))


def test_entropies_of_known_attention() -> None:
    two = (torch.eye(N) + to_the_neighbour(1)) / 2
    found = entropy(batch(torch.full((N, N), 1 / N), torch.eye(N), two))
    expected = torch.tensor([math.log(N), 0, math.log(2)], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(found, expected)


def test_rollout_multiplies_the_later_layer_from_the_left_and_averages_heads() -> None:
    first = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    # Token 2 reads token 0 in the second layer, which has read token 1 in the first: a quarter of it is token 1.
    by_hand = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(rollout([first[None, None], second[None, None]])[0], by_hand)
    weights = torch.rand(4, 2, 3, N, N, dtype=torch.float64).softmax(dim=-1)
    layers = [0.5 * w.mean(axis=1) + 0.5 * np.eye(N) for w in weights.numpy()]
    mixed = rollout(iter(weights))
    np.testing.assert_allclose(mixed, layers[3] @ layers[2] @ layers[1] @ layers[0], rtol=1e-12)
    torch.testing.assert_close(mixed.sum(dim=-1), torch.ones(2, N, dtype=torch.float64))


def open_vit(device: str = "cpu", pool: str = "token", **changes: Any) -> Inspected:
    """Two layers of three heads over 3 x 4 patches of 8 x 4 pixels, after a class token and two registers."""
    args = {"patch_size": list(PATCH), "embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": 2} | changes
    weights = Weights("vit_base_patch16_224", args, None, (24, 16), pool=pool)
    torch.manual_seed(0)
    # Larger than initial weights are, else all attention is nearly uniform.
    state = {key: value + 0.3 * torch.randn_like(value) for key, value in build(weights).state_dict().items()}
    return inspect(Weights("vit_base_patch16_224", args, state, (24, 16), pool=pool), device)


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 24, 16), dtype=torch.uint8, generator=generator)


def maps_of(inspected: Inspected, images: Tensor) -> np.ndarray:
    """(layers, batch, heads, tokens, tokens)"""
    with torch.no_grad():
        return torch.stack([*inspected.encoder.attention_maps(inspected.pixels(images))]).double().cpu().numpy()


def test_statistics_are_means_over_images_whatever_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inspected, images = open_vit(), pictures(7)
    maps = maps_of(inspected, images)
    prefix = 3
    patches = maps[:, :, :, prefix:, prefix:]
    distance = ((patches / patches.sum(axis=-1, keepdims=True)) * APART.numpy()).sum(axis=-1).mean(axis=-1)
    spread = -(maps[:, :, :, prefix:] * np.log(maps[:, :, :, prefix:])).sum(axis=-1).mean(axis=-1)
    for at_once in (2**25, 1):  # one image at a time where not even one is said to fit
        monkeypatch.setattr("mpp.report.attention._AT_ONCE", at_once)
        found = attention_statistics(inspected, images)
        np.testing.assert_allclose(found.distance, distance.mean(axis=1), rtol=1e-5)
        np.testing.assert_allclose(found.entropy, spread.mean(axis=1), rtol=1e-5)
        assert found.tokens == N + prefix
        assert found.distance.shape == (2, 3)
    assert found.uniform_distance == pytest.approx(pairwise_distance())


def test_rollout_of_images() -> None:
    images = pictures(3)
    for pool, prefix in (("token", 3), ("avg", 3)):
        inspected = open_vit(pool=pool)
        first, second = 0.5 * maps_of(inspected, images).mean(axis=2) + 0.5 * np.eye(N + prefix)
        mixed = second @ first
        row = mixed[:, 0] if pool == "token" else mixed[:, prefix:].mean(axis=1)
        expected = row[:, prefix:] / row[:, prefix:].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(attention_rollout(inspected, images), expected.reshape(3, *GRID), rtol=1e-5)


def test_what_one_patch_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    inspected, images = open_vit(), pictures(3)
    monkeypatch.setattr("mpp.report.attention._AT_ONCE", 1)
    found = patch_attention(inspected, images, (1, 3))
    assert found.dtype == np.float32
    expected = maps_of(inspected, images)[:, :, :, 3 + 1 * 4 + 3, 3:].reshape(2, 3, 3, *GRID)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_attention_that_cannot_be_had_is_told() -> None:
    args = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    inspected = inspect(Weights("vit_base_patch16_xp_224", args, None, (32, 32), pool="token"), "cpu")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for measure in (lambda: attention_statistics(inspected, images), lambda: attention_rollout(inspected, images)):
        with pytest.raises(UserError, match="cannot be shown"):
            measure()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_measures_the_same() -> None:
    images = pictures(5)
    here, there = open_vit(), open_vit("cuda")
    expected, found = (attention_statistics(inspected, images) for inspected in (here, there))
    tolerance: dict[str, Any] = {"rtol": 2e-2, "atol": 1e-3}  # convolutions are in TF32 there
    np.testing.assert_allclose(found.distance, expected.distance, **tolerance)
    np.testing.assert_allclose(found.entropy, expected.entropy, **tolerance)
    np.testing.assert_allclose(attention_rollout(there, images), attention_rollout(here, images), **tolerance)
    there_patch, here_patch = (patch_attention(inspected, images, (1, 2)) for inspected in (there, here))
    np.testing.assert_allclose(there_patch, here_patch, **tolerance)
