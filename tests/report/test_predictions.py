"""Counts of colours: predictions made by hand, and the model's own figures."""

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.masking import Corruption, draw_corruption, pick_patches
from mpp.objective.objective import MaskedPatchPrediction, survey_targets
from mpp.objective.reconstruction import draw_tiles, reconstruct
from mpp.objective.target import build_target
from mpp.report.predictions import ColourCounts

Model = MaskedPatchPrediction


def made(name: str, channels: int = 3, bits: int = 3) -> Model:
    """A model of 4x4 patches on 8x12 pixels with random weights."""
    torch.manual_seed(0)
    config = ModelConfig("vit_tiny_patch16_224", (8, 12), (4, 4), in_chans=channels, depth=1, embed_dim=48, num_heads=3)
    target, pixels = build_target(name, (4, 4), channels, bits), Normalise((0.5,), (0.5,), channels)
    model: Model = MaskedPatchPrediction(build_encoder(config), target, pixels)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model.eval()


def noise(batch: int, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Corruption]:
    """Images of flat patches in few colours with a little noise, the same normalised, and a corruption."""
    generator = Generator().manual_seed(seed)
    levels = torch.tensor([16, 80, 240])
    flat = levels[torch.randint(0, 3, (batch, channels, 2, 3), generator=generator)]
    images = flat.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = (images + torch.randint(-8, 9, images.shape, generator=generator)).to(torch.uint8)
    drawn = draw_corruption(pick_patches(batch, (2, 3), 0.5, generator), 6, generator)
    return images, images.float() / 127.5 - 1, drawn


def predicting(monkeypatch: pytest.MonkeyPatch, model: Model, output: Tensor) -> None:
    monkeypatch.setattr(model, "predict", lambda pixels, corruption: output)


def predicted(counts: ColourCounts) -> np.ndarray:
    """How often each colour was predicted."""
    _, guesses, times = counts.pairs
    return np.bincount(guesses, times, counts.classes)


@pytest.mark.parametrize(
    ("name", "channels", "bits"),
    [("mean_colour", 3, 3), ("colour_4x4", 3, 3), ("mean_colour", 4, 3), ("mean_colour", 2, 6), ("mean_colour", 1, 8)],
)
def test_counts_add_up_to_the_models_own_figures(name: str, channels: int, bits: int) -> None:
    model = made(name, channels, bits)
    occurring = survey_targets(model.target, noise(16, channels)[0]).counts
    assert occurring is not None
    with torch.no_grad():  # so that it is right at times
        model.head.bias.copy_(3 * (occurring > 0).repeat(model.head.out_features // len(occurring)))
    counts, right, total, truths = ColourCounts(model.target), 0.0, 0.0, []
    for seed in range(3):
        images, pixels, drawn = noise(16, channels, seed)
        counts.add(model, images, pixels, drawn)
        with torch.inference_mode():
            _, figures = model(images, drawn)
        right, total = right + float(figures["accuracy"][0]), total + float(figures["accuracy"][1])
        truths += [row[at].flatten() for row, at in zip(model.target.of(images), drawn.picked, strict=True)]
    assert counts.pairs[2].sum() == total * (16 if name == "colour_4x4" else 1)
    np.testing.assert_array_equal(counts.true, np.bincount(torch.cat(truths).numpy(), minlength=counts.classes))
    assert 0 < counts.right.sum() / counts.true.sum() == pytest.approx(right / total)


def test_pixels_are_counted_by_the_mean_colour_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("pixels")
    images, pixels, drawn = noise(8)
    counts = ColourCounts(model.target)
    # Predicted are patches of half 0 and half 100 in red, 200 in green, and out of range in blue.
    patch = torch.empty(3, 4, 4)
    patch[0, :2], patch[0, 2:], patch[1], patch[2] = 0, 100, 200, 300
    predicting(monkeypatch, model, (patch.flatten() / 127.5 - 1).expand(8, 3, -1))
    counts.add(model, images, pixels, drawn)
    assert {i: n for i, n in enumerate(predicted(counts).tolist()) if n} == {64 * 1 + 8 * 6 + 7: 24}
    classes = build_target("mean_colour", (4, 4), 3, 3).of(images).gather(1, drawn.picked[..., None])
    np.testing.assert_array_equal(counts.true, np.bincount(classes.flatten().numpy(), minlength=512))


@pytest.mark.parametrize(
    ("channels", "bits", "cells", "counted", "bits_counted"),
    [(8, 3, "mean_colour", 3, 3), (8, 3, "colour_4x4", 3, 3), (3, 5, "mean_colour", 3, 4), (2, 7, "mean_colour", 1, 7)],
)
def test_predictions_by_channel_are_joined_to_colours(
    channels: int, bits: int, cells: str, counted: int, bits_counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(cells, channels, bits)
    counts = ColourCounts(model.target)
    images, pixels, drawn = noise(4, channels)
    every = model.target.of(images)
    truth = every.gather(1, drawn.picked[..., None].expand(-1, -1, every.shape[-1]))
    guess = (truth + torch.arange(truth.shape[1])[:, None]) % 2**bits  # right at the first patch of three
    predicting(monkeypatch, model, torch.nn.functional.one_hot(guess, 2**bits).flatten(-2).float())
    counts.add(model, images, pixels, drawn)
    assert 0 < counts.right.sum() < counts.true.sum()
    for found, classes in ((counts.true, truth), (predicted(counts), guess)):
        bins = classes.unflatten(-1, (-1, channels))[..., :counted].flatten(0, -2) >> bits - bits_counted
        joined = np.ravel_multi_index(tuple(bins.T.numpy()), (2**bits_counted,) * counted)
        np.testing.assert_array_equal(found, np.bincount(joined, minlength=counts.classes))


@pytest.mark.parametrize(
    ("channels", "bits", "known"),
    [
        (3, 3, {0: (16, 16, 16), 7: (16, 16, 240), 64: (48, 16, 16), 511: (240, 240, 240)}),
        (1, 8, {0: (0, 0, 0), 200: (200, 200, 200)}),
        (2, 3, {1: (16, 16, 16), 8: (48, 48, 48)}),  # the first of two channels, as grey
        (4, 3, {7: (16, 16, 16), 8: (16, 16, 48)}),  # the first three of four
    ],
)
def test_a_class_has_the_colour_of_its_centre(channels: int, bits: int, known: dict[int, tuple[int, int, int]]) -> None:
    colours = ColourCounts(build_target("mean_colour", (4, 4), channels, bits)).colours
    assert colours.shape == (2 ** (channels * bits), 3)
    assert {i: tuple(colours[i].tolist()) for i in known} == known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mean_colour", "colour_4x4", "pixels"])
def test_on_a_cuda_device_the_same_is_counted_and_drawn(name: str) -> None:
    model, (images, pixels, drawn) = made(name), noise(8)
    moved = Corruption(drawn.picked.cuda(), drawn.kinds.cuda(), drawn.other.cuda(), drawn.group)
    counts, expected = ColourCounts(model.target), ColourCounts(model.target)
    expected.add(model, images, pixels, drawn)
    tiles = draw_tiles(reconstruct(model, images, pixels, drawn)).pixels
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        counts.add(model, images.cuda(), pixels.cuda(), moved)
        rows = reconstruct(model, images.cuda(), pixels.cuda(), moved)
    np.testing.assert_array_equal(counts.true, expected.true)
    assert predicted(counts).sum() == predicted(expected).sum()
    shown = [0, 1, 3]  # all that does not depend on rounding
    np.testing.assert_array_equal(draw_tiles(rows).pixels[:, shown], tiles[:, shown])
