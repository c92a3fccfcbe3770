"""What the sections show of a small model, against the measures and the images themselves."""

import dataclasses

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
from mpp.report.inspection import Images, InspectionContext, inspect, untrained
from mpp.report.page import Block, Gallery, Page, Picture, Section, Sheet, Table
from mpp.report.predictions import ReconstructionStep, reconstruction_section, target_section
from mpp.weights.timm_folder import encoder_weights

MODEL = ModelConfig("vit_tiny_patch16_224", (24, 32), (8,), depth=2, embed_dim=48, num_heads=3)
CONFIG = dataclasses.replace(PretrainConfig(), model=MODEL)
GRID = (3, 4)


@pytest.fixture(scope="module")
def context() -> InspectionContext:
    torch.manual_seed(0)
    weights = encoder_weights(build_encoder(MODEL), MODEL, (0.5,), (0.5,), CONFIG.data.decode_options(3), "small")
    pixels = torch.randint(0, 256, (12, 3, 24, 32), dtype=torch.uint8)
    images = Images(pixels, np.arange(12) % 3, ("ants", "bees", "cats"), "12 images")
    model, twin = inspect(weights, "cpu"), inspect(untrained(weights), "cpu")
    return InspectionContext("pretrained", model, twin, images, images, 3, (1, 2))


@pytest.fixture(scope="module")
def objective() -> MaskedPatchPrediction:
    torch.manual_seed(1)
    return MaskedPatchPrediction(
        build_encoder(MODEL), build_target("mean_colour", (8, 8), 3, 3), Normalise((0.5,), (0.5,), 3)
    ).eval()


def pictures(blocks: tuple[Block, ...]) -> list[Picture]:
    return [picture for block in blocks for picture in all_pictures(block)]


def only(section: Section, kind: type) -> list:
    nested = [b for block in section.blocks for b in (block.pictures if isinstance(block, Gallery) else (block,))]
    return [block for block in nested if isinstance(block, kind)]


SECTIONS = (filter_section, position_section, distance_section, rollout_section, heads_section)
SECTIONS = (*SECTIONS, patch_section, image_section)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda f: f.__name__)
def test_the_untrained_twin_stands_beside_the_model(section, context: InspectionContext) -> None:
    made = section(context)
    words = str(made) + " ".join(p.alt + p.caption for p in pictures(made.blocks))
    words += " ".join(str((sheet.columns, sheet.titles)) for sheet in only(made, Sheet))
    charts = [p.image for p in pictures(made.blocks) if isinstance(p.image, str)]
    assert "pretrained" in words + "".join(charts)
    assert "random initialisation" in words + "".join(charts)
    alone = section(dataclasses.replace(context, twin=None))
    assert len(pictures(alone.blocks)) <= len(pictures(made.blocks))
    assert "random initialisation" not in "".join(p.alt + p.caption for p in pictures(alone.blocks))
    assert made.reading.endswith(".")
    render(Page("page", "", (made,)))


def test_the_dots_are_the_measured_distances(context: InspectionContext) -> None:
    measured = attention_statistics(context.model, context.images.pixels)
    (distance, entropy) = pictures(distance_section(context).blocks)
    assert f"would be {measured.uniform_distance:.1f} pixels" in distance.caption
    assert f"{measured.distance[0].min():.1f} to {measured.distance[0].max():.1f} pixels in the first" in distance.alt
    assert f"largest possible is {np.log(13):.2f}" in entropy.alt
    assert isinstance(distance.image, str)


def test_filters_and_positions_are_tiles(context: InspectionContext) -> None:
    filters = pictures(filter_section(context).blocks)[0].image
    assert isinstance(filters, np.ndarray)
    assert filters.shape == (4 * 8 + 3, 7 * 8 + 6, 4)  # four rows of seven, with gaps of one pixel
    positions = pictures(position_section(context).blocks)[0].image
    assert isinstance(positions, np.ndarray)
    tile = 3 * 3
    assert positions.shape[0] == GRID[0] * (tile + 3) - 3
    bright = (253, 231, 37)  # the end of viridis: similarity 1, of a patch to itself
    assert tuple(positions[(tile + 3) + 3 + 1, 2 * (12 + 3) + 2 * 3 + 1, :3]) == bright


def test_each_drawn_image_has_a_row(context: InspectionContext) -> None:
    for section in (rollout_section(context), patch_section(context)):
        sheets = only(section, Sheet)
        assert sum(len(sheet.rows) for sheet in sheets) == context.shown
        assert all(len(row) == 3 for sheet in sheets for row in sheet.rows)
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


def steps_of(objective: MaskedPatchPrediction, images: torch.Tensor) -> list[ReconstructionStep]:
    corruption = corruption_at(CONFIG, GRID, torch.device("cpu"), 0, len(images))
    pixels = images.float() / 127.5 - 1
    found = []
    for step in (0, 10, 20):
        nn.init.normal_(objective.head.weight)
        found.append(ReconstructionStep(step, draw_tiles(reconstruct(objective, images, pixels, corruption))))
    return found


def test_the_slider_moves_only_what_changes(context: InspectionContext, objective: MaskedPatchPrediction) -> None:
    images = context.images.pixels[:2]
    steps = steps_of(objective, images)
    (sheet,) = only(reconstruction_section(steps, CONFIG), Sheet)
    assert sheet.stops == ("step 0", "step 10", "step 20")
    kinds = [isinstance(cell, tuple) for cell in sheet.rows[0]]
    still = [all((m.tiles.pixels[0, i] == steps[0].tiles.pixels[0, i]).all() for m in steps) for i in range(6)]
    assert kinds == [not each for each in still]
    assert still[:4] == [True, True, False, True]  # original, corrupted input, predicted, true
    middle = sheet.rows[1][sheet.columns.index("predicted")][1]
    assert middle.alt == "Image 2: predicted at step 10."
    np.testing.assert_array_equal(middle.image, steps[1].tiles.pixels[1, sheet.columns.index("predicted")])
    (alone,) = only(reconstruction_section(steps[-1:], CONFIG), Sheet)
    assert alone.stops == ()


def test_targets_are_counted_and_drawn(context: InspectionContext, objective: MaskedPatchPrediction) -> None:
    nn.init.zeros_(objective.head.weight)
    nn.init.zeros_(objective.head.bias)
    images = torch.full((6, 3, 24, 32), 200, dtype=torch.uint8)  # all of class 6, 6, 6
    objective.head.bias.data[64 * 6 + 8 * 6 + 6] = 1  # which is what is always predicted
    section = target_section(CONFIG, objective, images, 2)
    (table,) = only(section, Table)
    assert table.rows == (("#d0d0d0", "100.00%", "100.0%"),)
    confusion = next(p for p in pictures(section.blocks) if p.name == "confusion")
    assert isinstance(confusion.image, np.ndarray)
    assert (confusion.image[:, :8, :3] == 208).all()  # the square
    assert (confusion.image[:, 16:, :3] == 208).all()  # and its bar
    assert "100.0% are predicted right" in confusion.alt
    (sheet,) = only(section, Sheet)
    assert sheet.columns == ("image", "mean colour (this run's)", "4x4 colours", "pixels")
    four = picture_of_targets(build_target("colour_4x4", (8, 8), 3, 3), images[:1])[0].permute(1, 2, 0).numpy()
    times = len(sheet.rows[0][2].image) // 24
    np.testing.assert_array_equal(sheet.rows[0][2].image[::times, ::times], four)


def test_patches_that_have_no_four_cells(objective: MaskedPatchPrediction) -> None:
    model = ModelConfig("vit_tiny_patch16_224", (18, 18), (6,), depth=1, embed_dim=48, num_heads=3)
    config = dataclasses.replace(CONFIG, model=model, objective=ObjectiveConfig(target="pixels"))
    pixels = MaskedPatchPrediction(
        build_encoder(model), build_target("pixels", (6, 6), 3, 3), Normalise((0.5,), (0.5,), 3)
    ).eval()
    section = target_section(config, pixels, torch.randint(0, 256, (4, 3, 18, 18), dtype=torch.uint8), 2)
    (sheet,) = only(section, Sheet)
    assert sheet.columns == ("image", "mean colour", "pixels (this run's)")
