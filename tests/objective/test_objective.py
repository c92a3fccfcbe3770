"""The objective's loss, figures and baselines against loops over patches."""

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.masking import KINDS, Corruption, corrupt, draw_corruption, pick_patches
from mpp.objective.objective import MaskedPatchPrediction, neighbour_colours, patch_distances, survey_targets
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


def build(target: Target, detail: float = 0.0) -> MaskedPatchPrediction:
    torch.manual_seed(0)
    model = MaskedPatchPrediction(build_encoder(CONFIG), target, Normalise((0.5,), (0.5,), 3), detail=detail)
    for head in filter(None, (model.head, model.detail_head)):
        torch.nn.init.normal_(head.weight, std=0.5)
    return model


def at_picked(values: Tensor, drawn: Corruption) -> Tensor:
    return torch.stack([of[at] for of, at in zip(values, drawn.picked, strict=True)])


def test_predictions_are_the_head_on_the_tokens_of_the_picked_patches() -> None:
    model, (_, pixels, drawn) = build(TARGETS["mean_colour"]), sample()
    tokens = model.encoder.encode(corrupt(model.encoder.embed(pixels), drawn, model.mask_token))
    expected = model.head(at_picked(tokens[:, 1:], drawn))  # without the class token
    torch.testing.assert_close(model.predict(pixels, drawn), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_loss_scores_and_baselines_are_those_of_the_picked_patches(target: Target) -> None:
    model, (images, pixels, drawn), name = build(target), sample(), target.score_name
    model.frequent.copy_(survey_targets(target, images).frequent)
    loss, figures = model(images, drawn)
    assert {(f.shape, f.dtype, f.requires_grad) for f in figures.values()} == {((2,), torch.float64, False)}
    with torch.no_grad():
        output = model.predict(pixels, drawn)
    truth = at_picked(target.of(images), drawn)
    colours = images.float().view(3, 3, 3, 8, 4, 8).mean(dim=(3, 5)).flatten(2).mT
    neighbours = target.of_constant(by_brute_force(colours, drawn.picked, (3, 4), (8, 8)))
    by_patch = {
        "loss": target.loss(output, truth),
        name: target.agreement(target.guess(output), truth),
        f"{name}_baseline_frequent": target.agreement(model.frequent.expand_as(truth), truth),
        f"{name}_baseline_neighbours": target.agreement(neighbours, truth),
    }
    assert loss.item() == pytest.approx(by_patch["loss"].mean().item(), rel=1e-6)  # the unchanged ones included
    for number, kind in enumerate(KINDS):
        of_kind = (drawn.kinds == number).float()
        assert of_kind.any()
        for measure in ("loss", name):
            expected = [(by_patch[measure] * of_kind).sum().item(), of_kind.sum().item()]
            assert figures.pop(f"{measure}_{kind}").tolist() == pytest.approx(expected, rel=1e-5)
    assert figures.keys() == by_patch.keys()
    for measure, values in by_patch.items():
        assert figures[measure].tolist() == pytest.approx([values.sum().item(), 18], rel=1e-5), measure


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


@pytest.mark.parametrize("target", [ColourTarget((8, 8), 3), ColourTarget((8, 8), 3, 3, 4), ColourTarget((8, 8), 3, 5)])
def test_the_survey_counts_and_the_frequent_class_equal_bincount(target: ColourTarget) -> None:
    images = sample(20)[0]
    survey, classes = survey_targets(target, images), target.of(images).flatten(0, 1).numpy()
    assert survey.counts is not None
    np.testing.assert_array_equal(survey.counts, np.bincount(classes.flatten(), minlength=target.classes))
    expected = [np.bincount(slot, minlength=target.classes).argmax() for slot in classes.T]
    np.testing.assert_array_equal(survey.frequent, expected)
    share = survey.counts.numpy() / survey.counts.sum().item()
    assert survey.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p)))
    assert f"in 20 images, effectively {survey.perplexity:.1f};" in survey.describe()
    assert f"the most frequent is {share.max():.1%} of the patches" in survey.describe()


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
def test_a_survey_warns_where_there_is_one_class_only(images: Tensor, collapsed: bool) -> None:
    survey = survey_targets(ColourTarget((8, 8), 3), images.to(torch.uint8))
    assert survey.warning.startswith("almost all targets are the same class") == collapsed


def test_a_second_head_adds_its_weighted_mean_squared_error_and_everything_is_trained() -> None:
    images, pixels, drawn = sample()
    model = build(TARGETS["mean_colour"], detail=0.3)
    assert model.detail_head is not None
    loss, figures = model(images, drawn)
    tokens = model.encoder.encode(corrupt(model.encoder.embed(pixels), drawn, model.mask_token), at=drawn.picked)
    squared = (model.detail_head(tokens) - at_picked(details(images, (8, 8)), drawn)).square().mean().item()
    colour, detail = (float(figures[name][0] / figures[name][1]) for name in ("loss", "loss_detail"))
    assert detail == pytest.approx(squared, rel=1e-5)
    assert loss.item() == pytest.approx(colour + 0.3 * squared, rel=1e-5)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
