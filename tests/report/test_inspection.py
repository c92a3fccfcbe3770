"""Models opened to be inspected, against timm's own, and arrays as pictures, pixel by pixel."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib import colormaps
from torch import Tensor

from mpp.errors import UserError
from mpp.report.inspection import enlarged, framed, heat, inspect, lit, tiled, untrained
from mpp.weights.base import Weights, build
from mpp.weights.numerics import Numerics

ARGS: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def filled(
    name: str, image_hw: tuple[int, int], pool: str, units: tuple[int, ...] | None = None, **args: Any
) -> Weights:
    """With no weight at its initial value, and with a head."""
    weights = Weights(name, ARGS | args, None, image_hw, 3, MEAN, STD, pool, numerics=Numerics(stem_units=units))
    torch.manual_seed(0)
    state = build(replace(weights, classes=("a", "b"))).state_dict()
    noisy = {key: x + 0.05 * torch.randn_like(x) if x.is_floating_point() else x for key, x in state.items()}
    return replace(weights, state=noisy, classes=("a", "b"))


WEIGHTS = {
    "class token": filled("vit_base_patch16_224", (16, 24), "token", patch_size=8),
    "mean": filled("vit_base_patch16_224", (16, 24), "avg", patch_size=8),
    "registers": filled("vit_small_patch14_reg4_dinov2", (28, 14), "avg"),
    "deit 3, which timm keeps elsewhere": filled("deit3_small_patch16_224", (32, 32), "avg"),
    "distilled": filled("deit_tiny_distilled_patch16_224", (32, 32), "avg"),
    "hybrid": filled("vit_base_r50_s16_224", (16, 24), "token", (1, 1), patch_size=1),
}


def normalised_after_pooling() -> Weights:
    """As timm has its models that pool by the mean."""
    args: dict[str, Any] = ARGS | {"patch_size": 8}
    vit = timm.create_model("vit_base_patch16_224", img_size=(16, 24), global_pool="avg", num_classes=0, **args)
    state = {key: x + 0.05 * torch.randn_like(x) for key, x in vit.state_dict().items()}
    assert "fc_norm.weight" in state
    return Weights("vit_base_patch16_224", args, state, (16, 24), 3, MEAN, STD)


def pictures(weights: Weights, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *weights.image_hw), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("weights", [*WEIGHTS.values(), normalised_after_pooling()], ids=[*WEIGHTS, "norm last"])
def test_it_gives_timms_tokens_and_features(weights: Weights) -> None:
    inspected, images = inspect(weights, "cpu"), pictures(weights)
    model: Any = build(weights, classes=()).eval()
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(inspected.pixels(images), pixels)
    with torch.no_grad():
        tokens = model.fc_norm(model.forward_features(pixels)[:, model.num_prefix_tokens :])
        torch.testing.assert_close(inspected.tokens(images), tokens)
        if weights.name != "deit_tiny_distilled_patch16_224":  # timm pools it with the distillation token
            torch.testing.assert_close(inspected.features(images), model(pixels))
    features = inspected.features(images)
    assert features.untyped_storage().nbytes() == features.nbytes  # else it keeps all tokens
    assert not inspected.encoder.training
    assert inspected.encoder.image_hw == weights.image_hw


def test_the_representation_is_what_timm_pools() -> None:
    pools = {name: inspect(weights, "cpu").pool for name, weights in WEIGHTS.items()}
    token = {"class token", "deit 3, which timm keeps elsewhere", "distilled", "hybrid"}
    assert pools == {name: "token" if name in token else "mean" for name in WEIGHTS}


def test_the_seed_decides_fresh_weights_and_the_callers_stream_stays() -> None:
    twin = untrained(WEIGHTS["mean"])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tables = [inspect(twin, "cpu", seed=seed).encoder.vit.pos_embed for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_untrained_twin_is_the_same_architecture_with_other_weights(weights: Weights) -> None:
    first, second = (inspect(w, "cpu").encoder for w in (weights, untrained(weights)))
    own, fresh = dict(first.named_parameters()), dict(second.named_parameters())
    assert {name: p.shape for name, p in own.items()} == {name: p.shape for name, p in fresh.items()}
    assert not any(torch.equal(own[name], fresh[name]) for name in own)


def test_patches_tile_the_size_that_is_looked_at() -> None:
    weights = WEIGHTS["mean"]
    encoder = inspect(weights, "cpu", image_hw=(47, 18)).encoder
    assert encoder.image_hw == (40, 16)
    assert encoder.patch == (8, 8)
    model: Any = build(weights, image_hw=(47, 18))
    assert torch.equal(encoder.vit.pos_embed, model.pos_embed)


def test_the_size_of_a_hybrid_stays_since_its_stem_pads() -> None:
    encoder = inspect(WEIGHTS["hybrid"], "cpu", image_hw=(30, 17)).encoder
    assert encoder.image_hw == (30, 17)
    assert encoder.grid == (4, 3)


def test_what_is_no_vit_is_refused() -> None:
    with pytest.raises(UserError, match=r"resnet18 is timm's ResNet, and only its VisionTransformer") as caught:
        inspect(Weights("resnet18", {}, None, (32, 32)), "cpu")
    assert "\n" not in str(caught.value)


def test_heat_is_viridis_between_its_ends() -> None:
    ends = [np.round(255 * np.array(colormaps["viridis"](x)[:3])) for x in (0.0, 0.5, 1.0)]
    colours = heat(np.array([-3.0, -1.0, 0.0, 1.0, 9.0]), -1.0)
    np.testing.assert_array_equal(colours, [ends[i] for i in (0, 0, 1, 2, 2)])


def test_tiles_lie_in_rows_with_transparent_gaps() -> None:
    tiles = np.stack([np.full((2, 3, 3), 10 * (i + 1), np.uint8) for i in range(3)])
    sheet = tiled(tiles, 2, gap=1)
    expected = np.zeros((5, 7), np.uint8)
    expected[:2, :3], expected[:2, 4:], expected[3:, :3] = 10, 20, 30
    np.testing.assert_array_equal(sheet[..., 0], expected)
    np.testing.assert_array_equal(sheet[..., 3], np.where(expected > 0, 255, 0))


def test_light_follows_the_share_of_each_patch() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    np.testing.assert_array_equal(lit(image, np.full((2, 2), 0.25)), image)
    shown = lit(image, np.array([[1.0, 0.0], [0.0, 0.0]]), dark=0.1)
    assert [shown[at][0] for at in ((0, 0), (7, 7), (0, 7), (7, 0))] == [200, 20, 20, 20]


def test_a_frame_lies_around_its_patch() -> None:
    image = np.full((12, 16, 3), 100, np.uint8)
    shown = framed(image, 1, 2, (4, 4))
    assert (shown[4:8, 8:12] == 100).all()
    assert (shown[3, 8:12] == 0).all()  # black next to the patch, white around that
    assert (shown[2, 6:14] == 255).all()
    assert (shown[:2] == 100).all()
    assert (image == 100).all()
    corner = framed(image, 0, 0, (4, 4))
    assert (corner[:4, :4] == 100).all()
    assert (corner[4, :4] == 0).all()


@pytest.mark.parametrize(("size", "times"), [((8, 8), 14), ((112, 60), 1), ((56, 57), 2), ((300, 200), 1)])
def test_small_images_are_enlarged_by_a_whole_number(size: tuple[int, int], times: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(enlarged(image), np.kron(image, np.ones((times, times, 1), np.uint8)))
