"""Models opened to be inspected, against timm's own, and arrays as pictures, pixel by pixel."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mpp.errors import UserError
from mpp.report.inspection import enlarged, framed, heat, inspect, lit
from mpp.weights.base import Weights, build
from mpp.weights.numerics import Numerics

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def filled(name: str, hw: tuple[int, int], pool: str, classes: Any = ("a", "b"), units: Any = None, **args: Any):
    """With no weight at its initial value, and with a head if there are classes."""
    args |= {"embed_dim": 24, "depth": 2, "num_heads": 3}
    weights = Weights(name, args, None, hw, 3, MEAN, STD, pool, numerics=Numerics(stem_units=units))
    torch.manual_seed(0)
    state = build(replace(weights, classes=classes)).state_dict()
    noisy = {key: x + 0.05 * torch.randn_like(x) if x.is_floating_point() else x for key, x in state.items()}
    return replace(weights, state=noisy, classes=classes)


WEIGHTS = {
    "class token": filled("vit_base_patch16_224", (16, 24), "token", patch_size=8),
    "mean": filled("vit_base_patch16_224", (16, 24), "avg", patch_size=8),
    "mean, then the norm": filled("vit_base_patch16_224", (16, 24), "avg", (), patch_size=8, fc_norm=True),
    "registers": filled("vit_small_patch14_reg4_dinov2", (28, 14), "avg"),
    "deit 3, which timm keeps elsewhere": filled("deit3_small_patch16_224", (32, 32), "avg"),
    "distilled": filled("deit_tiny_distilled_patch16_224", (32, 32), "avg"),
    "hybrid": filled("vit_base_r50_s16_224", (16, 24), "token", units=(1, 1), patch_size=1),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_it_gives_timms_tokens_and_features_and_an_untrained_twin(weights: Weights) -> None:
    inspected = inspect(weights, "cpu")
    images = torch.randint(0, 256, (3, 3, *weights.image_hw), dtype=torch.uint8)
    model: Any = build(weights, classes=()).eval()
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(inspected.pixels(images), pixels)
    features = inspected.features(images)
    with torch.no_grad():
        tokens = model.fc_norm(model.forward_features(pixels)[:, model.num_prefix_tokens :])
        torch.testing.assert_close(inspected.tokens(images), tokens)
        if weights.name != "deit_tiny_distilled_patch16_224":  # timm pools it with the distillation token
            torch.testing.assert_close(features, model(pixels))
    assert features.untyped_storage().nbytes() == features.nbytes  # else it keeps all tokens
    own, fresh = (dict(inspect(w, "cpu").encoder.named_parameters()) for w in (weights, weights.untrained()))
    assert {name: p.shape for name, p in own.items()} == {name: p.shape for name, p in fresh.items()}
    assert not any(torch.equal(own[name], fresh[name]) for name in own)


def test_the_representation_is_what_timm_pools() -> None:
    pools = {name: inspect(weights, "cpu").pool for name, weights in WEIGHTS.items()}
    token = {"class token", "deit 3, which timm keeps elsewhere", "distilled", "hybrid"}
    assert pools == {name: "token" if name in token else "mean" for name in WEIGHTS}


def test_the_seed_decides_fresh_weights_and_the_callers_stream_stays() -> None:
    twin = WEIGHTS["mean"].untrained()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tables: list[Any] = [inspect(twin, "cpu", seed=seed).encoder.vit.pos_embed for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_patches_tile_the_size_that_is_inspected_but_the_stem_of_a_hybrid_pads() -> None:
    encoder = inspect(WEIGHTS["mean"], "cpu", image_hw=(47, 18)).encoder
    assert (encoder.image_hw, encoder.patch) == ((40, 16), (8, 8))
    model: Any = build(WEIGHTS["mean"], image_hw=(47, 18))
    assert torch.equal(encoder.vit.pos_embed, model.pos_embed)
    encoder = inspect(WEIGHTS["hybrid"], "cpu", image_hw=(30, 17)).encoder
    assert (encoder.image_hw, encoder.grid) == ((30, 17), (4, 3))


def test_what_is_no_vit_is_refused() -> None:
    with pytest.raises(UserError, match=r"^test_resnet is timm's ResNet, and only its VisionTransformer.*$"):
        inspect(Weights("test_resnet", {}, None, (32, 32)), "cpu")


def test_light_follows_the_share_of_each_patch_and_a_frame_lies_around_one() -> None:
    image = np.full((12, 16, 3), 200, np.uint8)
    np.testing.assert_array_equal(lit(image, np.full((2, 2), 0.25)), image)
    shown = lit(image, np.array([[1.0, 0.0], [0.0, 0.0]]), dark=0.1)
    assert [shown[at][0] for at in ((0, 0), (-1, -1), (0, -1), (-1, 0))] == [200, 20, 20, 20]
    expected = image.copy()
    expected[2:10, 6:14] = 255  # white around black
    expected[3:9, 7:13] = 0
    expected[4:8, 8:12] = 200
    np.testing.assert_array_equal(framed(image, 1, 2, (4, 4)), expected)
    assert (framed(image, 0, 0, (4, 4))[:4, :4] == 200).all()


def test_small_images_are_enlarged_by_whole_numbers_and_heat_is_viridis() -> None:
    image = np.random.default_rng(0).integers(0, 256, (56, 57, 3), dtype=np.uint8)
    np.testing.assert_array_equal(enlarged(image), np.kron(image, np.ones((2, 2, 1), np.uint8)))
    colours = heat(np.array([-3.0, -1.0, 0.0, 1.0, 9.0]), -1.0).tolist()
    low, middle, high = [68, 1, 84], [33, 145, 140], [253, 231, 37]
    assert colours == [low, low, middle, high, high]
