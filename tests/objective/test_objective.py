"""The objective's loss, figures and baselines against loops over patches."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.masking import KINDS, Corruption, corrupt, draw_corruption, pick_patches
from mpp.objective.objective import (
    Figures,
    MaskedPatchPrediction,
    mean_colours,
    neighbour_colours,
    patch_distances,
    survey_targets,
)
from mpp.objective.target import ColourTarget, PixelTarget, Target, build_target, details

CONFIG = ModelConfig("vit_tiny_patch16_224", img_size=(24, 32), patch_size=(8,), depth=1, embed_dim=48, num_heads=3)
TARGETS: dict[str, Target] = {
    name: build_target(name, (8, 8), 3, 3) for name in ("mean_colour", "colour_4x4", "pixels")
}


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def sample(batch: int = 3) -> tuple[Tensor, Tensor, Corruption]:
    """Images of few colours, their pixels, and a corruption that has all three kinds."""
    images = 16 + 32 * torch.randint(0, 3, (batch, 3, 3, 4), generator=seeded(0))
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = (images + torch.randint(0, 9, images.shape, generator=seeded(1))).to(torch.uint8)
    picked = pick_patches(batch, (3, 4), 0.5, seeded(2))
    return images, images.float() / 127.5 - 1, draw_corruption(picked, 12, seeded(3), (0.4, 0.3, 0.3))


def build(target: Target) -> MaskedPatchPrediction:
    torch.manual_seed(0)
    model: MaskedPatchPrediction = MaskedPatchPrediction(build_encoder(CONFIG), target, Normalise((0.5,), (0.5,), 3))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def run(target: Target) -> tuple[float, Figures, Tensor, Tensor]:
    """Loss and figures, and the loss and score of each picked patch."""
    model, (images, pixels, drawn) = build(target), sample()
    loss, figures = model(images, drawn)
    with torch.no_grad():
        output = model.predict(pixels, drawn)
    truth = torch.stack([of[at] for of, at in zip(target.of(images), drawn.picked, strict=True)])
    return loss.item(), figures, target.loss(output, truth), target.agreement(target.guess(output), truth)


def test_predictions_are_the_head_on_the_tokens_of_the_picked_patches() -> None:
    model, (_, pixels, drawn) = build(TARGETS["mean_colour"]), sample()
    tokens = model.encoder.encode(corrupt(model.encoder.embed(pixels), drawn, model.mask_token))
    expected = [[model.head(tokens[b, 1 + p]) for p in drawn.picked[b].tolist()] for b in range(3)]  # 1: class token
    torch.testing.assert_close(
        model.predict(pixels, drawn), torch.stack([torch.stack(row) for row in expected]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_loss_is_the_mean_over_all_picked_patches_and_figures_are_sums_and_counts_by_kind(target: Target) -> None:
    loss, figures, losses, scores = run(target)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-6)  # the unchanged ones included
    assert {(f.shape, f.dtype, f.requires_grad) for f in figures.values()} == {((2,), torch.float64, False)}
    for name, each in (("loss", losses), (target.score_name, scores)):
        for number, kind in enumerate(KINDS):
            of_kind = sample()[2].kinds == number
            assert of_kind.any()
            expected = [each[of_kind].double().sum().item(), of_kind.sum().item()]
            assert figures[f"{name}_{kind}"].tolist() == pytest.approx(expected, rel=1e-6)
        total = torch.stack([figures[f"{name}_{kind}"] for kind in KINDS]).sum(dim=0)
        torch.testing.assert_close(total, figures[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_trivial_baselines_are_scored_on_the_picked_patches(target: Target) -> None:
    model, (images, _, drawn) = build(target), sample()
    model.frequent.copy_(survey_targets(target, images).frequent)
    _, figures = model(images, drawn)
    colours = mean_colours(images, (8, 8))
    neighbours = target.of_constant(by_brute_force(colours, drawn.picked, (3, 4), (8, 8)))
    frequent, near = 0.0, 0.0
    for b, j in itertools.product(range(3), range(6)):
        truth = target.of(images)[b, drawn.picked[b, j]]
        frequent += target.agreement(model.frequent[None, None], truth[None, None]).item()
        near += target.agreement(neighbours[b, j][None, None], truth[None, None]).item()
    name = target.score_name
    assert figures[f"{name}_baseline_frequent"].tolist() == pytest.approx([frequent, 18], rel=1e-5)
    assert figures[f"{name}_baseline_neighbours"].tolist() == pytest.approx([near, 18], rel=1e-5)


def by_brute_force(colours: Tensor, picked: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The mean colour of the uncorrupted patches nearest in pixels, all ties alike; mid-grey where there are none."""

    def centre(p: int) -> tuple[float, float]:
        return (p // grid[1] + 0.5) * patch[0], (p % grid[1] + 0.5) * patch[1]

    result = torch.empty(*picked.shape, colours.shape[-1])
    for b, row in enumerate(picked.tolist()):
        visible = [p for p in range(grid[0] * grid[1]) if p not in row]
        for j, own in enumerate(row):
            distance = {p: math.dist(centre(p), centre(own)) for p in visible}
            nearest = [p for p in visible if math.isclose(distance[p], min(distance.values()))]
            result[b, j] = colours[b, nearest].double().mean(dim=0) if nearest else 127.5
    return result


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("grid", "patch"), [((4, 5), (8, 8)), ((4, 5), (4, 12)), ((5, 2), (3, 2)), ((1, 6), (8, 8))])
@pytest.mark.parametrize("channels", [1, 3])
def test_neighbours_equal_brute_force(
    grid: tuple[int, int], patch: tuple[int, int], ratio: float, channels: int
) -> None:
    colours = 255 * torch.rand(4, grid[0] * grid[1], channels, generator=seeded(0))
    picked = pick_patches(4, grid, ratio, seeded(1))
    ours = neighbour_colours(colours, picked, patch_distances(grid, patch))
    torch.testing.assert_close(ours, by_brute_force(colours, picked, grid, patch), rtol=1e-5, atol=1e-3)


def test_mean_colours_are_the_patches_means() -> None:
    images = sample()[0]
    expected = [
        images[:, :, r : r + 8, c : c + 8].double().mean(dim=(2, 3)) for r in (0, 8, 16) for c in (0, 8, 16, 24)
    ]
    torch.testing.assert_close(mean_colours(images, (8, 8)).double(), torch.stack(expected, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [ColourTarget((8, 8), 3), ColourTarget((8, 8), 3, 3, 4), ColourTarget((8, 8), 3, 5)])
def test_the_survey_counts_and_the_frequent_class_equal_bincount(target: ColourTarget) -> None:
    images = sample(20)[0]
    survey, classes = survey_targets(target, images), target.of(images).flatten(0, 1).numpy()
    assert survey.counts is not None
    assert survey.images == 20
    np.testing.assert_array_equal(survey.counts, np.bincount(classes.flatten(), minlength=target.classes))
    expected = [np.bincount(slot, minlength=target.classes).argmax() for slot in classes.T]
    np.testing.assert_array_equal(survey.frequent, expected)
    share = survey.counts.numpy() / survey.counts.sum().item()
    assert survey.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p)))
    assert survey.largest_share == pytest.approx(share.max())


def test_the_frequent_patch_of_pixels_is_the_mean_patch() -> None:
    images = sample(5)[0]
    survey = survey_targets(PixelTarget((8, 8), 3), images)
    expected = images.double().view(5, 3, 3, 8, 4, 8).mean(dim=(0, 2, 4)).flatten() / 127.5 - 1
    torch.testing.assert_close(survey.frequent.double(), expected, rtol=0, atol=1e-6)
    assert (survey.counts, survey.warning) == (None, "")


@pytest.mark.parametrize(
    ("images", "collapsed"),
    [
        (torch.full((4, 3, 32, 32), 7), True),
        (torch.randint(0, 32, (4, 3, 32, 32), generator=seeded(0)), True),
        (torch.randint(0, 256, (4, 3, 1, 1), generator=seeded(0)).expand(-1, -1, 32, 32), False),
        (torch.randint(0, 256, (4, 3, 32, 32), generator=seeded(0)), False),
    ],
    ids=["constant", "wrongly scaled", "four colours", "noise"],
)
def test_a_survey_collapses_where_there_is_one_class_only(images: Tensor, collapsed: bool) -> None:
    survey = survey_targets(ColourTarget((8, 8), 3), images.to(torch.uint8))
    assert survey.warning.startswith("almost all targets are the same class") == collapsed
    assert f"{survey.largest_share:.1%}" in survey.describe()


def test_training_moves_encoder_head_and_mask_token() -> None:
    model, (images, _, drawn) = build(TARGETS["mean_colour"]), sample()
    model(images, drawn)[0].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_second_head_adds_its_weighted_mean_squared_error() -> None:
    images, pixels, drawn = sample()
    torch.manual_seed(0)
    model: MaskedPatchPrediction = MaskedPatchPrediction(
        build_encoder(CONFIG), TARGETS["mean_colour"], Normalise((0.5,), (0.5,), 3), 0, 0.3
    )
    assert model.detail_head is not None
    torch.nn.init.normal_(model.detail_head.weight, std=0.5)
    loss, figures = model(images, drawn)
    tokens = model.encoder.encode(corrupt(model.encoder.embed(pixels), drawn, model.mask_token), at=drawn.picked)
    truth = torch.stack([of[at] for of, at in zip(details(images, (8, 8)), drawn.picked, strict=True)])
    squared = (model.detail_head(tokens) - truth).square()
    assert figures["loss_detail"][0] / figures["loss_detail"][1] == pytest.approx(squared.mean().item(), rel=1e-5)
    colour = figures["loss"][0] / figures["loss"][1]
    assert loss.item() == pytest.approx(colour.item() + 0.3 * squared.mean().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.detail_head.parameters())
