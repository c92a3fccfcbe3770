"""What the sections show of a small model, against the measures and the images themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.reconstruction import draw_tiles, picture_of_targets, reconstruct
from mpp.objective.settings import ObjectiveConfig
from mpp.objective.target import build_target
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import corruption_at
from mpp.report.attention import attention_statistics, distance_section, heads_section, rollout_section
from mpp.report.features import image_section, patch_section
from mpp.report.filters import filter_section, position_section
from mpp.report.html import all_pictures, render
from mpp.report.inspection import Images, InspectionContext, inspect
from mpp.report.page import Page, Picture, Section, Sheet, Table
from mpp.report.predictions import ReconstructionStep, reconstruction_section, target_section
from mpp.weights.timm_folder import encoder_weights
from tests.report.run_folders import pretrained, sections

MODEL = ModelConfig("vit_tiny_patch16_224", (24, 32), (8,), depth=2, embed_dim=48, num_heads=3)
CONFIG = dataclasses.replace(PretrainConfig(), model=MODEL)
GRID = (3, 4)


@pytest.fixture(scope="module")
def context() -> InspectionContext:
    torch.manual_seed(0)
    weights = encoder_weights(build_encoder(MODEL), MODEL, (0.5,), (0.5,), CONFIG.data.decode_options(3), "small")
    pixels = torch.randint(0, 256, (12, 3, 24, 32), dtype=torch.uint8)
    images = Images(pixels, np.arange(12) % 3, ("ants", "bees", "cats"), "12 images")
    model, twin = inspect(weights, "cpu"), inspect(weights.untrained(), "cpu")
    return InspectionContext("pretrained", model, twin, images, images, 3, (1, 2))


def predicting(model: ModelConfig, target: str) -> MaskedPatchPrediction:
    torch.manual_seed(1)
    encoder, (size, *_) = build_encoder(model), model.patch_size
    return MaskedPatchPrediction(encoder, build_target(target, (size, size), 3, 3), Normalise((0.5,), (0.5,), 3)).eval()


@pytest.fixture(scope="module")
def objective() -> MaskedPatchPrediction:
    return predicting(MODEL, "mean_colour")


def only(section: Section, kind: type) -> list[Any]:
    return [block for block in section.blocks if isinstance(block, kind)]


def pictures(section: Section) -> list[Picture]:
    return [picture for block in section.blocks for picture in all_pictures(block)]


SECTIONS = (filter_section, position_section, distance_section, rollout_section, heads_section)
SECTIONS = (*SECTIONS, patch_section, image_section)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda f: f.__name__)
def test_the_untrained_twin_stands_beside_the_model(section: Any, context: InspectionContext) -> None:
    both = render(Page("page", "", (section(context),)))
    assert "pretrained" in both
    assert "random initialisation" in both
    alone = render(Page("page", "", (section(dataclasses.replace(context, twin=None)),)))
    assert "random initialisation" not in alone


def test_the_dots_are_the_measured_distances(context: InspectionContext) -> None:
    measured = attention_statistics(context.model, context.images.pixels)
    (distance, entropy) = pictures(distance_section(context))
    assert f"would be {measured.uniform_distance:.1f} pixels" in distance.caption
    assert f"{measured.distance[0].min():.1f} to {measured.distance[0].max():.1f} pixels in the first" in distance.alt
    assert f"largest possible is {np.log(13):.2f}" in entropy.alt


def test_filters_and_positions_are_tiles(context: InspectionContext) -> None:
    filters: Any = pictures(filter_section(context))[0].image
    assert filters.shape == (4 * 8 + 3, 7 * 8 + 6, 4)  # four rows of seven, with gaps of one pixel
    positions: Any = pictures(position_section(context))[0].image
    tile = 3 * 3
    assert positions.shape[0] == GRID[0] * (tile + 3) - 3
    bright = (253, 231, 37)  # the end of viridis: similarity 1, of a patch to itself
    assert tuple(positions[(tile + 3) + 3 + 1, 2 * (12 + 3) + 2 * 3 + 1, :3]) == bright


def test_each_drawn_image_has_a_row(context: InspectionContext) -> None:
    for section in (rollout_section(context), patch_section(context)):
        found = only(section, Sheet)
        assert [len(row) for sheet in found for row in sheet.rows] == [3] * context.shown
    (heads,) = only(heads_section(context), Sheet)
    assert heads.stops == ("image 1", "image 2", "image 3")
    assert heads.rows[0][1][0].image.shape == (2 * (3 + 1) - 1, 3 * (4 + 1) - 1, 4)  # layers by heads of 3 x 4 patches


def test_neighbours_are_images_with_their_classes(context: InspectionContext) -> None:
    (sheet,) = only(image_section(context), Sheet)
    assert sheet.titles[:2] == ("pretrained", "random initialisation")
    first = sheet.rows[0]
    assert first[0].caption == "ants"
    np.testing.assert_array_equal(first[0].image, context.images.pixels[0].permute(1, 2, 0).numpy())
    features = dict(context.features)["pretrained"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = np.argsort(-(unit @ unit[0]))[1]
    np.testing.assert_array_equal(first[1].image, context.images.pixels[nearest].permute(1, 2, 0).numpy())
    assert first[1].caption == ("ants", "bees", "cats")[nearest % 3]


def test_the_slider_moves_only_what_changes(context: InspectionContext, objective: MaskedPatchPrediction) -> None:
    images, steps = context.images.pixels[:2], []
    corruption = corruption_at(CONFIG, GRID, torch.device("cpu"), 0, 2)
    for step in (0, 10, 20):
        nn.init.normal_(objective.head.weight)
        drawn = draw_tiles(reconstruct(objective, images, images.float() / 127.5 - 1, corruption))
        steps.append(ReconstructionStep(step, drawn))
    (sheet,) = only(reconstruction_section(steps, CONFIG), Sheet)
    assert sheet.stops == ("step 0", "step 10", "step 20")
    still = [all((m.tiles.pixels[0, i] == steps[0].tiles.pixels[0, i]).all() for m in steps) for i in range(6)]
    assert [not isinstance(cell, tuple) for cell in sheet.rows[0]] == still
    assert still[:4] == [True, True, False, True]  # original, corrupted input, predicted, true
    middle = sheet.rows[1][sheet.columns.index("predicted")][1]
    assert middle.alt == "Image 2: predicted at step 10."
    np.testing.assert_array_equal(middle.image, steps[1].tiles.pixels[1, sheet.columns.index("predicted")])
    assert only(reconstruction_section(steps[-1:], CONFIG), Sheet)[0].stops == ()


def test_targets_are_counted_and_drawn(context: InspectionContext, objective: MaskedPatchPrediction) -> None:
    nn.init.zeros_(objective.head.weight)
    nn.init.zeros_(objective.head.bias)
    images = torch.full((6, 3, 24, 32), 200, dtype=torch.uint8)  # all of class 6, 6, 6
    objective.head.bias.data[64 * 6 + 8 * 6 + 6] = 1  # which is what is always predicted
    section = target_section(CONFIG, objective, images, 2)
    (table,) = only(section, Table)
    assert table.rows == (("#d0d0d0", "100.00%", "100.0%"),)
    confusion: Any = next(p for p in pictures(section) if p.name == "confusion")
    assert (confusion.image[:, :8, :3] == 208).all()  # the square
    assert (confusion.image[:, 16:, :3] == 208).all()  # and its bar
    assert "100.0% are predicted right" in confusion.alt
    (sheet,) = only(section, Sheet)
    assert sheet.columns == ("image", "mean colour (this run's)", "4x4 colours", "pixels")
    four = picture_of_targets(build_target("colour_4x4", (8, 8), 3, 3), images[:1])[0].permute(1, 2, 0).numpy()
    times = len(sheet.rows[0][2].image) // 24
    np.testing.assert_array_equal(sheet.rows[0][2].image[::times, ::times], four)


def test_patches_that_have_no_four_cells() -> None:
    model = ModelConfig("vit_tiny_patch16_224", (18, 18), (6,), depth=1, embed_dim=48, num_heads=3)
    config = dataclasses.replace(CONFIG, model=model, objective=ObjectiveConfig(target="pixels"))
    section = target_section(config, predicting(model, "pixels"), torch.zeros(4, 3, 18, 18, dtype=torch.uint8), 2)
    assert only(section, Sheet)[0].columns == ("image", "mean colour", "pixels (this run's)")


@pytest.mark.slow
def test_the_charts_of_a_run_are_drawn(tmp_path: Path) -> None:
    drawn = [picture for section in sections(pretrained(tmp_path / "run")) for picture in pictures(section)]
    assert len(drawn) == 6
    assert all(">images seen<" in str(picture.image) for picture in drawn)
