"""Targets against their definitions, written as loops and in float64 numpy."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.errors import UserError
from mpp.objective.target import ColourTarget, PixelTarget, Target, build_target, details

SHAPES: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {  # channels, grid, patch
    "colour": (3, (2, 3), (8, 8)),
    "grey": (1, (2, 3), (8, 8)),
    "eight channels": (8, (2, 3), (8, 8)),
    "flat patches": (3, (3, 2), (4, 12)),
    "one patch": (3, (1, 1), (8, 4)),
}
per_shape = pytest.mark.parametrize(("channels", "grid", "patch"), SHAPES.values(), ids=SHAPES)


def noise(channels: int, grid: tuple[int, int], patch: tuple[int, int], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    # Every patch has its own range of colours, so that its mean is not always mid-grey.
    low = torch.randint(0, 256, (batch, channels, *grid), generator=generator).repeat_interleave(patch[0], 2)
    low = low.repeat_interleave(patch[1], 3)
    return (low + (256 - low) * torch.rand(size, generator=generator)).floor().clamp(0, 255).to(torch.uint8)


def patches_of(images: Tensor, patch: tuple[int, int]) -> list[list[np.ndarray]]:
    """The patches (channels, height, width) of each image, rows first."""
    (height, width), (rows, columns) = images.shape[2:], patch
    corners = list(itertools.product(range(0, height, rows), range(0, width, columns)))
    return [[image[:, r : r + rows, c : c + columns] for r, c in corners] for image in images.numpy()]


def colour_classes(patch: np.ndarray, bits: int, cells: int) -> list[int]:
    """The classes of one patch by the definition, cells rows first, channels joined up to 4096 classes."""
    channels, height, width = patch.shape
    classes = []
    for r, c in itertools.product(range(cells), repeat=2):
        h, w = height // cells, width // cells
        bins = []
        for channel in range(channels):
            total = sum(int(v) for v in patch[channel, r * h : (r + 1) * h, c * w : (c + 1) * w].flatten())
            bins.append(total * 2**bits // (256 * h * w))
        if 2 ** (bits * channels) <= 4096:
            joint = 0
            for value in bins:
                joint = joint * 2**bits + value
            classes.append(joint)
        else:
            classes += bins
    return classes


@per_shape
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("cells", [1, 4])
def test_classes_are_the_definition(
    channels: int, grid: tuple[int, int], patch: tuple[int, int], bits: int, cells: int
) -> None:
    images = noise(channels, grid, patch)
    expected = [[colour_classes(p, bits, cells) for p in row] for row in patches_of(images, patch)]
    assert ColourTarget(patch, channels, bits, cells).of(images).tolist() == expected


@pytest.mark.parametrize("side", [2, 16, 224, 1024])
def test_a_bin_begins_at_its_edge_however_large_the_patch(side: int) -> None:
    image = torch.full((1, 1, side, side), 32, dtype=torch.uint8)
    assert ColourTarget((side, side), 1).of(image).item() == 1
    image[0, 0, -1, -1] = 31
    assert ColourTarget((side, side), 1).of(image).item() == 0


@per_shape
def test_pixels_are_the_patches_from_minus_1_to_1_and_details_less_their_mean_over_their_deviation(
    channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    images = noise(channels, grid, patch)
    flat = np.array([[p.flatten() / 255 * 2 - 1 for p in row] for row in patches_of(images, patch)])
    np.testing.assert_allclose(PixelTarget(patch, channels).of(images).numpy(), flat, atol=1e-6)
    centred = flat - flat.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(flat.var(axis=-1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(details(images, patch).numpy(), expected, atol=1e-5)


def test_a_flat_patch_has_no_details() -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    images[..., 0, 0] = 201
    assert details(images, (8, 8)).max() < 1  # by its deviation alone, that grey level in one pixel would be 8
    assert details(images[..., 1:5, 1:5], (4, 4)).abs().max() < 1e-4


@per_shape
def test_constant_colours_have_the_targets_of_constant_images_and_drawn_targets_themselves(
    channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    images = noise(channels, grid, patch)
    colours = torch.randint(0, 256, (5, 1, channels), generator=torch.Generator().manual_seed(1))
    flat = colours[:, 0, :, None, None].expand(-1, -1, *images.shape[2:]).to(torch.uint8)
    of_colours = [ColourTarget(patch, channels, bits, cells) for bits in range(1, 9) for cells in (1, 4)]
    for target in (*of_colours, PixelTarget(patch, channels)):
        constant = target.of_constant(colours.float()).expand(-1, grid[0] * grid[1], -1)
        torch.testing.assert_close(constant, target.of(flat), rtol=0, atol=1e-6)
        values: Any = target.of(images)
        drawn = target.render(values)
        assert (drawn.dtype, drawn.shape[2:]) == (torch.uint8, (channels, *patch))
        for p in range(values.shape[1]):
            torch.testing.assert_close(target.of(drawn[:, p])[:, 0], values[:, p], rtol=0, atol=1e-6)


def test_constant_colours_and_drawn_pixels_are_clamped() -> None:
    colours = torch.tensor([[[31.999], [32.0], [255.0], [256.0], [-0.1]]])
    assert ColourTarget((2, 2), 1).of_constant(colours).flatten().tolist() == [0, 1, 7, 7, 0]
    assert PixelTarget((1, 2), 1).render(torch.tensor([[[-1.5, 1.5]]])).flatten().tolist() == [0, 255]


@pytest.mark.parametrize(("bits", "value", "centre"), [(3, 0, 16), (3, 7, 240), (1, 1, 192), (7, 5, 11), (8, 200, 200)])
def test_a_bin_is_drawn_as_its_centre(bits: int, value: int, centre: int) -> None:
    drawn = ColourTarget((2, 2), 1, bits).render(torch.tensor([[[value]]]))
    assert drawn.flatten().tolist() == [centre] * 4


@pytest.mark.parametrize("target", [ColourTarget((8, 8), 3), ColourTarget((8, 8), 3, 3, 4), ColourTarget((8, 8), 8)])
def test_loss_score_and_confidence_are_means_over_a_patchs_predictions(target: ColourTarget) -> None:
    torch.manual_seed(0)
    truth = target.of(noise(target.channels, (2, 2), (8, 8)))
    guess = torch.where(torch.rand(truth.shape) < 0.5, truth, (truth + 1) % target.classes)
    one_hot = torch.nn.functional.one_hot(guess, target.classes).flatten(-2)
    output = torch.randn(2, 4, target.outputs) + 9 * one_hot
    logits, true = output.double().numpy().reshape(2, 4, target.predictions, -1), truth.numpy()[..., None]
    odds = np.exp(logits)
    loss = np.log(odds.sum(axis=-1)) - np.take_along_axis(logits, true, axis=-1)[..., 0]
    np.testing.assert_allclose(target.loss(output, truth), loss.mean(axis=-1), rtol=1e-5)
    sure = (odds.max(axis=-1) / odds.sum(axis=-1)).mean(axis=-1)
    np.testing.assert_allclose(target.confidence(output), sure, rtol=1e-5)
    assert torch.equal(target.guess(output), guess)
    np.testing.assert_allclose(target.agreement(guess, truth), (guess == truth).numpy().mean(axis=-1), rtol=1e-6)


def test_pixels_have_their_mean_squared_error_and_no_confidence() -> None:
    target = PixelTarget((4, 8), 3)
    truth = target.of(noise(3, (2, 2), (4, 8)))
    output = torch.randn(truth.shape)
    expected = ((output.double().numpy() - truth.double().numpy()) ** 2).sum(axis=-1) / (3 * 4 * 8)
    for measure in (target.loss, target.agreement):
        np.testing.assert_allclose(measure(output, truth), expected, rtol=1e-5)
    assert target.confidence(output).isnan().all()


@pytest.mark.parametrize("target", [ColourTarget((8, 8), 3), PixelTarget((8, 8), 3)], ids=["colour", "pixels"])
def test_the_loss_of_low_precision_output_is_computed_in_fp32(target: Target) -> None:
    truth: Any = target.of(noise(3, (2, 2), (8, 8)))
    output = torch.randn(2, 4, target.outputs).bfloat16()
    torch.testing.assert_close(target.loss(output, truth), target.loss(output.float(), truth), rtol=0, atol=0)


def test_targets_by_name_and_patches_that_do_not_divide_into_4x4() -> None:
    assert build_target("mean_colour", (8, 4), 3, 5) == ColourTarget((8, 4), 3, 5)
    assert build_target("colour_4x4", (8, 4), 3, 5) == ColourTarget((8, 4), 3, 5, 4)
    assert build_target("pixels", (8, 4), 3, 5) == PixelTarget((8, 4), 3)
    for patch in ((14, 14), (8, 6), (6, 8)):
        with pytest.raises(UserError, match=f"sides divisible by 4, got {patch[0]}x{patch[1]}; take mean_colour"):
            build_target("colour_4x4", patch, 3, 3)
