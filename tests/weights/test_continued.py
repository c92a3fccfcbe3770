"""The encoder that goes on from weights computes what their own model does, and what it cannot is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.data.settings import DataConfig
from mpp.errors import UserError
from mpp.model.attention import Block
from mpp.model.encoder import Encoder, build_encoder
from mpp.model.settings import ModelConfig
from mpp.weights.base import Weights, build, create
from mpp.weights.continued import build_continued, complete_configs, load_encoder
from mpp.weights.numerics import Numerics
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import encoder_weights
from tests.weights.models import images

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)

TINY = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def random_weights(name: str = TINY, **args: Any) -> Weights:
    """Weights of timm's own model of that name for 32 x 32 pixels, none of them at its first value."""
    args = SMALL | args
    model: Any = timm.create_model(name, **args, img_size=32, num_classes=5)
    draw = torch.Generator().manual_seed(1)
    state = {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in model.state_dict().items()}
    args = {key: value for key, value in args.items() if key not in ("global_pool", "fc_norm")}
    return Weights(name, args, state, (32, 32), pool=model.global_pool, classes=tuple("abcde"))


def going_on(weights: Weights, model: ModelConfig = ModelConfig()) -> tuple[Encoder, ModelConfig, tuple[str, ...]]:  # noqa: B008
    config, _, init_args = complete_configs("there", weights, model, DataConfig())
    encoder = build_continued(config, init_args) if init_args else build_encoder(config)
    load_encoder(encoder, weights)
    return encoder.eval(), config, init_args


@torch.no_grad()
def assert_same_tokens(encoder: Encoder, original: Any, pixels: torch.Tensor, atol: float = 1e-5) -> None:
    expected = original.eval().forward_features(pixels)
    torch.testing.assert_close(encoder.encode(encoder.embed(pixels)), expected, rtol=0, atol=atol)


CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "plain": (TINY, {}, ()),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, ()),
    "norm before the blocks, quick GELU": ("vit_base_patch16_clip_quickgelu_224", {}, ()),
    "pooled by attention": ("vit_base_patch16_siglip_224", {}, ()),
    "normalised queries": (TINY, {"qk_norm": True, "mlp_ratio": 3.0}, ("qk_norm=true", "mlp_ratio=3.0")),
    # timm refuses to read a class token that is not there, and puts the last norm after other poolings.
    "no class token": (TINY, {"class_token": False, "global_pool": "avg", "fc_norm": False}, ("class_token=false",)),
    "another activation": (TINY, {"act_layer": "relu"}, ('act_layer="relu"',)),
    "tanh GELU": (TINY, {"act_layer": "gelu_tanh"}, ()),
    "no positions": (TINY, {"pos_embed": "none"}, ()),
    "DeiT": ("deit_tiny_patch16_224", {}, ()),
    "DeiT III": ("deit3_small_patch16_224", {}, ("no_embed_class=true", "init_values=1e-06")),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_timm_s_model_with_the_same_weights(case: str) -> None:
    name, args, init_args = CASES[case]
    weights = random_weights(name, **args)
    original = timm.create_model(name, **SMALL, **args, img_size=32, num_classes=5)
    original.load_state_dict(weights.state or {})
    encoder, config, texts = going_on(weights)
    assert_same_tokens(encoder, original, images())
    assert texts == init_args
    assert (config.embed_dim, config.depth, config.num_heads, config.img_size) == (48, 2, 3, (32,))
    assert all(type(block) is Block for block in encoder.vit.blocks)
    # And so is what is written of it.
    again = encoder_weights(encoder, config, (0.5,), (0.5,), DataConfig().decode_options(3), "again", texts)
    assert_same_tokens(encoder, build(again), images())


def test_another_size_resamples_the_positions_and_a_file_s_epsilon_is_kept() -> None:
    weights = replace(random_weights(), numerics=Numerics(norm_eps=1e-3))
    encoder, config, texts = going_on(weights, ModelConfig(img_size=(48, 64)))
    assert (config.img_size, texts) == ((48, 64), ("norm_eps=0.001",))
    assert_same_tokens(encoder, build(weights, classes=(), image_hw=(48, 64)), images(48, 64))


def test_a_norm_after_the_pooling_becomes_that_of_each_token() -> None:
    weights = random_weights(global_pool="avg")
    assert "norm.weight" not in (weights.state or {})
    original: Any = build(weights, classes=())
    original.norm = original.fc_norm
    assert_same_tokens(going_on(weights)[0], original, images())


@pytest.mark.parametrize("name", ["vit_token", "vit_token_rep", "vit_gap", "hybrid", "hybrid_stem_only"])
def test_the_original_code_s_numbers(name: str, shared: Callable[[str], Path]) -> None:
    weights = open_weights(str(shared(f"fixtures/{name}_params.npz")))
    io = np.load(shared(f"fixtures/{name}_io.npz"))
    pixels = torch.from_numpy(io["image"]).permute(0, 3, 1, 2)
    encoder, config, texts = going_on(weights)
    assert config.act == "gelu_tanh"
    assert_same_tokens(encoder, build(weights, classes=()), pixels, atol=1e-6)
    assert ("original_stem=true" in texts) == name.startswith("hybrid")
    # The head of the weights on the tokens gives the logits that the original code gave.
    head: Any = build(weights).get_submodule("head")
    with torch.no_grad():
        tokens = encoder(pixels)
        pooled = tokens.mean(dim=1) if weights.pool == "avg" else tokens[:, 0]
        torch.testing.assert_close(head(pooled), torch.from_numpy(io["logits"]), rtol=0, atol=1e-5)


def test_settings_that_are_given_win_and_may_repeat_those_of_the_weights() -> None:
    weights = replace(random_weights(), mean=(0.1, 0.2, 0.3), value_range=(0.0, 9.0))
    given = ModelConfig(TINY, patch_size=(8, 8), depth=2, drop_path=0.1)
    config, data, _ = complete_configs("there", weights, given, DataConfig(std=(0.7,), hflip=0.25))
    assert (config.patch_size, config.depth, config.drop_path) == ((8,), 2, 0.1)
    assert (data.mean, data.std, data.value_range, data.hflip) == ((0.1, 0.2, 0.3), (0.7,), (0.0, 9.0), 0.25)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "depth": ("", {"depth": 3}, "model.depth 3 contradicts --init there, which has 2; leave it out"),
    "channels": ("", {"in_chans": 1}, "model.in_chans 1 contradicts --init there, which has 3"),
    "positions": ("", {"pos_embed": "2d"}, "model.pos_embed 2d contradicts"),
    "name": ("", {"name": "vit_small_patch16_224"}, "which has vit_tiny_patch16_224"),
    "size": ("", {"img_size": (42,)}, "model.img_size 42 is not a multiple of the patch size 8; take 40 or 48"),
    "swin": ("swin_tiny_patch4_window7_224", {}, "not a VisionTransformer, which masked patch prediction needs"),
    "sam": ("samvit_base_patch16_224", {}, "timm cannot build 'samvit_base_patch16_224'"),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, "'deit_tiny_distilled_patch16_224', not a VisionTransformer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_and_settings_that_are_refused(case: str) -> None:
    name, settings, reason = WRONG[case]
    weights = replace(open_weights(f"random:timm:{name}"), state={}) if name else random_weights()
    with pytest.raises(UserError) as error:
        complete_configs("there", weights, ModelConfig(**settings), DataConfig())
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_allocated_on_meta() -> None:
    encoder = build_continued(ModelConfig(TINY), ("mlp_ratio=2.0",), "meta")
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    plain = create(Weights(TINY, {"mlp_ratio": 2.0}, None, (224, 224)))
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in plain.parameters())
