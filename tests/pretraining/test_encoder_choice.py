"""The encoder in the place of auto: by the images, their size and the device; what was set stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.data.settings import DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.dist import World
from mpp.errors import Unreachable
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.pretraining.build import resolve_init
from mpp.pretraining.encoder_choice import choose_encoder, usual_side
from mpp.pretraining.settings import PretrainConfig
from mpp.weights.base import Weights, build

AUTO = ModelConfig(name="auto", img_size="auto")


@pytest.mark.parametrize(
    ("images", "side", "cpu", "expected"),
    [
        (300, 1000, False, ("vit_tiny_patch16_224", 224, 16)),
        (30_000, 1000, False, ("vit_small_patch16_224", 224, 16)),
        (300_000, 1000, False, ("vit_base_patch16_224", 224, 16)),
        (300_000, 1000, True, ("vit_tiny_patch16_224", 128, 16)),
        (50_000, 32, False, ("vit_small_patch16_224", 32, 4)),
        (50_000, 28, True, ("vit_tiny_patch16_224", 28, 4)),
        (9_000, 64, False, ("vit_tiny_patch16_224", 64, 8)),
        (9_000, 100, False, ("vit_tiny_patch16_224", 96, 8)),
        (9_000, 1, False, ("vit_tiny_patch16_224", 1, 1)),
    ],
)
def test_it_fits_the_images(images: int, side: int, cpu: bool, expected: tuple[str, int, int]) -> None:
    model, choices = choose_encoder(AUTO, images, side, cpu)
    assert (model.name, *model.image_hw, *model.patch_size) == (expected[0], expected[1], expected[1], expected[2])
    assert [choice.name for choice in choices] == ["model.img_size", "model.patch_size", "model.name"]


def test_it_says_what_others_cost() -> None:
    _, choices = choose_encoder(AUTO, 30_000, 224, cpu=False)
    tokens = 14 * 14 + 1
    small, base = (12 * tokens * d**2 + 2 * tokens**2 * d for d in (384, 768))
    assert f"vit_base {base / small:.2g} times" in choices[-1].because


@pytest.mark.slow
def test_what_was_set_stays() -> None:
    named = ModelConfig(name="vit_large_patch14_224", img_size="auto", patch_size=(14,))
    model, _ = choose_encoder(named, 300, 100, cpu=False)
    assert (model.name, model.image_hw, model.patch_size) == ("vit_large_patch14_224", (98, 98), (14,))
    for name, own, side in (
        ("vit_base_patch32_224", (), 192),
        ("vit_small_patch14_dinov2", (), 196),
        ("vit_base_r50_s16_224", (), 192),  # a hybrid, which takes no patch size
        ("auto", (16, 8), 192),
    ):
        model, _ = choose_encoder(ModelConfig(name=name, img_size="auto", patch_size=own), 300, 200, cpu=False)
        assert (model.image_hw[0], model.patch_size) == (side, own), name
        build_encoder(model, "meta")
    uneven, _ = choose_encoder(ModelConfig(name="auto", img_size="auto", patch_size=(16, 8)), 300, 72, cpu=False)
    assert uneven.image_hw == (64, 72)
    begun = ModelConfig(name="vit_small_patch16_224", img_size=(64,), patch_size=(8,))
    assert choose_encoder(AUTO, 10**6, 224, False, begun)[0] == begun


def test_the_usual_side_is_the_median_of_those_that_can_be_read() -> None:
    images = [np.zeros((height, 50, 3), np.uint8) for height in (20, 30, 40, 90)]
    assert usual_side(ListSource(images), DecodeOptions()) == 35


def test_a_store_that_gives_no_answer_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = ListSource([np.zeros((8, 8, 3), np.uint8)] * 3), list[int]()

    def away(index: int) -> Any:
        calls.append(index)
        raise Unreachable("s3://b: no answer")

    monkeypatch.setattr(source, "image", away)
    with pytest.raises(Unreachable):
        usual_side(source, DecodeOptions())
    assert len(calls) == 1


def test_weights_in_a_file_have_their_own_architecture(tmp_path: Path) -> None:
    torch.save(
        build(Weights("vit_tiny_patch16_224", {}, None, (224, 224)), classes=()).state_dict(), tmp_path / "vit.pth"
    )
    config, weights = resolve_init(PretrainConfig(init=str(tmp_path / "vit.pth"), model=AUTO), World())
    assert weights is not None
    assert (config.model.name, config.model.embed_dim) == (weights.name, 192)
