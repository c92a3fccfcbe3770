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
PLACES = [(row * PATCH[0], column * PATCH[1]) for row in range(GRID[0]) for column in range(GRID[1])]
UNIFORM_DISTANCE = float(np.mean([math.dist(one, other) for one in PLACES for other in PLACES]))


def to_the_neighbour(axis: int) -> Tensor:
    """Every patch attends to the next one in its column (0) or row (1), the last to the one before it."""
    index = torch.arange(N).reshape(GRID)
    goal = torch.cat([index.narrow(axis, 1, GRID[axis] - 1), index.narrow(axis, GRID[axis] - 2, 1)], dim=axis)
    return torch.eye(N)[goal.flatten()]


def test_distances_and_entropies_of_known_attention() -> None:
    heads = [torch.full((N, N), 1 / N), torch.eye(N), to_the_neighbour(0), to_the_neighbour(1)]
    heads.append((torch.eye(N) + to_the_neighbour(1)) / 2)
    weights = torch.stack(heads).double().expand(2, -1, -1, -1)  # of two images
    expected = torch.tensor([UNIFORM_DISTANCE, 0, PATCH[0], PATCH[1], PATCH[1] / 2]).double().expand(2, -1)
    torch.testing.assert_close(mean_distance(weights, APART), expected)
    torch.testing.assert_close(mean_distance(weights / 3, APART), expected)  # other tokens take the rest
    assert torch.equal(mean_distance(torch.zeros(1, 1, N, N), APART.float()), torch.zeros(1, 1))
    expected = torch.tensor([math.log(N), 0, 0, 0, math.log(2)]).double().expand(2, -1)
    torch.testing.assert_close(entropy(weights), expected, atol=1e-6, rtol=0)


def test_rollout_multiplies_the_later_layer_from_the_left_and_averages_heads() -> None:
    weights = torch.rand(4, 2, 3, N, N, dtype=torch.float64).softmax(dim=-1)
    layers = [0.5 * w.mean(axis=1) + 0.5 * np.eye(N) for w in weights.numpy()]
    np.testing.assert_allclose(rollout(iter(weights)), layers[3] @ layers[2] @ layers[1] @ layers[0], rtol=1e-12)


def open_vit(device: str = "cpu", pool: str = "token") -> Inspected:
    """Two layers of three heads over 3 x 4 patches of 8 x 4 pixels, after a class token and two registers."""
    args = {"patch_size": list(PATCH), "embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": 2}
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
        return torch.stack([*inspected.encoder.attention_maps(inspected.pixels(images))]).double().numpy()


@pytest.mark.parametrize("at_once", [2**25, 1])  # one image at a time where not even one is said to fit
def test_measures_of_images_whatever_fits_into_memory(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.report.attention._AT_ONCE", at_once)
    inspected, images = open_vit(), pictures(7)
    maps = maps_of(inspected, images)
    patches = maps[:, :, :, 3:, 3:]
    distance = ((patches / patches.sum(axis=-1, keepdims=True)) * APART.numpy()).sum(axis=-1).mean(axis=(1, 3))
    spread = -(maps[:, :, :, 3:] * np.log(maps[:, :, :, 3:])).sum(axis=-1).mean(axis=(1, 3))
    found = attention_statistics(inspected, images)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, spread, rtol=1e-5)
    assert (found.tokens, found.uniform_distance) == (N + 3, pytest.approx(UNIFORM_DISTANCE))
    expected = maps[:, :, :, 3 + 1 * 4 + 3, 3:].reshape(2, 7, 3, *GRID)
    np.testing.assert_allclose(patch_attention(inspected, images, (1, 3)), expected, rtol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_of_images(pool: str) -> None:
    inspected, images = open_vit(pool=pool), pictures(3)
    first, second = 0.5 * maps_of(inspected, images).mean(axis=2) + 0.5 * np.eye(N + 3)
    mixed = second @ first
    row = mixed[:, 0] if pool == "token" else mixed[:, 3:].mean(axis=1)
    expected = row[:, 3:] / row[:, 3:].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(attention_rollout(inspected, images), expected.reshape(3, *GRID), rtol=1e-5)


@pytest.mark.parametrize("measure", [attention_statistics, attention_rollout])
def test_blocks_without_attention_weights_are_refused(measure: Any) -> None:
    args = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    inspected = inspect(Weights("vit_base_patch16_xp_224", args, None, (32, 32), pool="token"), "cpu")
    with pytest.raises(UserError, match="cannot be shown"):
        measure(inspected, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_measures_the_same() -> None:
    images = pictures(5)
    measured = []
    for inspected in (open_vit(), open_vit("cuda")):
        of = attention_statistics(inspected, images)
        patch = patch_attention(inspected, images, (1, 2))
        measured.append((of.distance, of.entropy, attention_rollout(inspected, images), patch))
    for expected, found in zip(*measured, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)  # convolutions are in TF32 there
