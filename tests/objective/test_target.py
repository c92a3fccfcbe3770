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


def noise(channels: int, grid: tuple[int, int], patch: tuple[int, int], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    # Every patch has its own range of colours, so that its mean is not always mid-grey.
    low = torch.randint(0, 256, (batch, channels, *grid), generator=generator).repeat_interleave(patch[0], 2)
    low = low.repeat_interleave(patch[1], 3)
    return (low + (256 - low) * torch.rand(size, generator=generator)).floor().clamp(0, 255).to(torch.uint8)


def patches_of(images: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> list[list[np.ndarray]]:
    """The patches (channels, height, width) of each image, rows first."""
    (rows, columns), (height, width) = grid, patch
    return [
        [
            image[:, r * height : (r + 1) * height, c * width : (c + 1) * width]
            for r in range(rows)
            for c in range(columns)
        ]
        for image in images.numpy()
    ]


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


@pytest.mark.parametrize(("channels", "grid", "patch"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("cells", [1, 4])
def test_classes_are_the_definition(
    channels: int, grid: tuple[int, int], patch: tuple[int, int], bits: int, cells: int
) -> None:
    images = noise(channels, grid, patch)
    expected = [[colour_classes(p, bits, cells) for p in row] for row in patches_of(images, grid, patch)]
    assert ColourTarget(patch, channels, bits, cells).of(images).tolist() == expected


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([31] * 4, 0),
        ([32, 32, 32, 31], 0),  # mean 31.75
        ([32] * 4, 1),
        ([33, 31, 32, 32], 1),
        ([223, 224, 224, 224], 6),
        ([224] * 4, 7),
        ([255] * 4, 7),
        ([0] * 4, 0),
    ],
)
def test_a_bin_begins_at_its_edge(pixels: list[int], expected: int) -> None:
    image = torch.tensor(pixels, dtype=torch.uint8).view(1, 1, 2, 2)
    assert ColourTarget((2, 2), 1).of(image).item() == expected


@pytest.mark.parametrize("side", [16, 224, 1024])
def test_one_pixel_below_the_edge_is_below_however_large_the_patch(side: int) -> None:
    image = torch.full((1, 1, side, side), 32, dtype=torch.uint8)
    image[0, 0, -1, -1] = 31
    assert ColourTarget((side, side), 1).of(image).item() == 0


@pytest.mark.parametrize(("mean", "expected"), [(31.999, 0), (32.0, 1), (255.0, 7), (256.0, 7), (0.0, 0), (-0.1, 0)])
def test_a_constant_colour_is_binned_by_32(mean: float, expected: int) -> None:
    assert ColourTarget((2, 2), 1).of_constant(torch.tensor([[[mean]]])).item() == expected


def test_all_512_classes_are_reached_each_as_64r_8g_b() -> None:
    r, g, b = (torch.tensor(x) for x in zip(*itertools.product(range(8), repeat=3), strict=True))
    images = (32 * torch.stack([r, g, b], dim=1) + 13).to(torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)
    assert ColourTarget((4, 4), 3).of(images).flatten().tolist() == (64 * r + 8 * g + b).tolist() == list(range(512))


@pytest.mark.parametrize(
    ("channels", "bits", "cells", "joint", "classes", "predictions"),
    [
        (3, 3, 1, True, 512, 1),
        (3, 3, 4, True, 512, 16),
        (1, 8, 1, True, 256, 1),
        (3, 4, 1, True, 4096, 1),
        (4, 3, 1, True, 4096, 1),
        (3, 5, 1, False, 32, 3),
        (5, 3, 1, False, 8, 5),
        (8, 3, 4, False, 8, 128),
        (12, 1, 1, True, 4096, 1),
        (13, 1, 1, False, 2, 13),
    ],
)
def test_channels_are_joined_up_to_4096_classes(
    channels: int, bits: int, cells: int, joint: bool, classes: int, predictions: int
) -> None:
    target = ColourTarget((8, 8), channels, bits, cells)
    assert (target.joint, target.classes, target.predictions) == (joint, classes, predictions)
    assert target.outputs == classes * predictions


@pytest.mark.parametrize(("channels", "grid", "patch"), SHAPES.values(), ids=SHAPES)
def test_pixels_are_the_patches_from_minus_1_to_1_channels_first(
    channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    images = noise(channels, grid, patch)
    expected = [[p.flatten() / 255 * 2 - 1 for p in row] for row in patches_of(images, grid, patch)]
    np.testing.assert_allclose(PixelTarget(patch, channels).of(images).numpy(), expected, atol=1e-6)


def targets(channels: int, patch: tuple[int, int]) -> list[Target]:
    """All targets of a shape, with colours in 1 to 8 bits."""
    colours = [ColourTarget(patch, channels, bits, cells) for bits in range(1, 9) for cells in (1, 4)]
    return [*colours, PixelTarget(patch, channels)]


@pytest.mark.parametrize(("channels", "grid", "patch"), SHAPES.values(), ids=SHAPES)
def test_a_constant_colour_has_the_targets_of_a_constant_image(
    channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    colours = torch.randint(0, 256, (5, 1, channels), generator=torch.Generator().manual_seed(1))
    images = colours[:, 0, :, None, None].expand(-1, -1, grid[0] * patch[0], grid[1] * patch[1]).to(torch.uint8)
    for target in targets(channels, patch):
        constant = target.of_constant(colours.float()).expand(-1, grid[0] * grid[1], -1)
        torch.testing.assert_close(constant, target.of(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("channels", "grid", "patch"), SHAPES.values(), ids=SHAPES)
def test_a_rendered_target_has_that_target(channels: int, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    images = noise(channels, grid, patch)
    for target in targets(channels, patch):
        classes: Any = target.of(images)
        drawn = target.render(classes)
        assert drawn.dtype == torch.uint8
        assert drawn.shape[2:] == (channels, *patch)
        for p in range(classes.shape[1]):
            torch.testing.assert_close(target.of(drawn[:, p])[:, 0], classes[:, p], rtol=0, atol=1e-6)


def test_rendered_pixels_are_the_images_own_and_clamped() -> None:
    for channels in (1, 3, 8):
        images, target = noise(channels, (1, 1), (8, 8)), PixelTarget((8, 8), channels)
        assert torch.equal(target.render(target.of(images))[:, 0], images)
    drawn = PixelTarget((1, 2), 1).render(torch.tensor([[[-1.5, 1.5]]]))
    assert drawn.flatten().tolist() == [0, 255]


@pytest.mark.parametrize(("bits", "value", "centre"), [(3, 0, 16), (3, 7, 240), (1, 1, 192), (7, 5, 11), (8, 200, 200)])
def test_a_bin_is_rendered_as_its_centre(bits: int, value: int, centre: int) -> None:
    drawn = ColourTarget((2, 2), 1, bits).render(torch.tensor([[[value]]]))
    assert drawn.flatten().tolist() == [centre] * 4


@pytest.mark.parametrize("target", targets(3, (8, 8)), ids=str)
def test_the_guess_of_a_sure_model_is_right(target: Target) -> None:
    truth: Any = target.of(noise(3, (2, 2), (8, 8)))
    output = truth if isinstance(target, PixelTarget) else one_hot(truth, target.classes)
    assert torch.equal(target.guess(output), truth)


def one_hot(classes: Tensor, number: int) -> Tensor:
    return torch.nn.functional.one_hot(classes, number).float().flatten(-2)


@pytest.mark.parametrize("target", [ColourTarget((8, 8), 3), ColourTarget((8, 8), 3, 3, 4), ColourTarget((8, 8), 8)])
def test_the_colour_loss_is_the_mean_cross_entropy_of_a_patchs_predictions(target: ColourTarget) -> None:
    truth = target.of(noise(target.channels, (2, 2), (8, 8)))
    output = 3 * torch.randn(2, 4, target.outputs)
    expected = np.zeros((2, 4))
    for b, p, i in itertools.product(range(2), range(4), range(target.predictions)):
        logits = output[b, p].double().numpy()[i * target.classes : (i + 1) * target.classes]
        expected[b, p] += (np.log(np.exp(logits).sum()) - logits[truth[b, p, i]]) / target.predictions
    np.testing.assert_allclose(target.loss(output, truth), expected, rtol=1e-5)


@pytest.mark.parametrize("target", [ColourTarget((8, 8), 3), ColourTarget((8, 8), 3, 3, 4), ColourTarget((8, 8), 8)])
def test_accuracy_is_the_share_of_a_patchs_predictions_that_are_right(target: ColourTarget) -> None:
    truth = target.of(noise(target.channels, (2, 2), (8, 8)))
    guess = torch.where(torch.rand(truth.shape) < 0.5, truth, (truth + 1) % target.classes)
    expected = [
        [np.mean([g == t for g, t in zip(*pair, strict=True)]) for pair in zip(*row, strict=True)]
        for row in zip(guess.tolist(), truth.tolist(), strict=True)
    ]
    output = one_hot(guess, target.classes)
    np.testing.assert_allclose(target.agreement(target.guess(output), truth), expected, rtol=1e-6)


def test_the_pixel_loss_is_the_mean_squared_error() -> None:
    target = PixelTarget((4, 8), 3)
    truth = target.of(noise(3, (2, 2), (4, 8)))
    output = torch.randn(truth.shape)
    expected = ((output.double().numpy() - truth.double().numpy()) ** 2).sum(axis=-1) / (3 * 4 * 8)
    for measure in (target.loss, target.agreement):
        np.testing.assert_allclose(measure(output, truth), expected, rtol=1e-5)


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


@pytest.mark.parametrize(("channels", "bits", "cells"), [(3, 3, 1), (3, 3, 4), (8, 3, 1)])
def test_confidence_is_the_mean_probability_of_the_predicted_classes(channels: int, bits: int, cells: int) -> None:
    target = ColourTarget((8, 8), channels, bits, cells)
    output = 3 * torch.randn(2, 5, target.outputs, generator=torch.Generator().manual_seed(0))
    logits = output.double().numpy().reshape(2, 5, target.predictions, target.classes)
    odds = np.exp(logits)
    expected = (odds.max(axis=-1) / odds.sum(axis=-1)).mean(axis=-1)
    np.testing.assert_allclose(target.confidence(output).numpy(), expected, rtol=1e-5)


def test_pixels_have_no_confidence() -> None:
    assert PixelTarget((2, 2), 3).confidence(torch.zeros(2, 5, 12)).isnan().tolist() == [[True] * 5] * 2


@pytest.mark.parametrize(("channels", "grid", "patch"), SHAPES.values(), ids=SHAPES)
def test_details_are_the_patches_less_their_mean_over_their_deviation(
    channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    images = noise(channels, grid, patch)
    flat = np.array([[values.flatten() / 127.5 for values in image] for image in patches_of(images, grid, patch)])
    centred = flat - flat.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(flat.var(axis=-1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(details(images, patch).numpy(), expected, atol=1e-5)


def test_a_flat_patch_has_no_details() -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    images[..., 0, 0] = 201
    assert details(images, (8, 8)).max() < 1  # by its deviation alone, that grey level in one pixel would be 8
    assert details(images[..., 1:5, 1:5], (4, 4)).abs().max() < 1e-4
