"""Weights into models: heads, sizes, poolings, and complaints about what does not fit."""

import logging
import warnings
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mpp.errors import UserError
from mpp.model.attention import Attention
from mpp.model.positions import resample_table
from mpp.weights.base import Numerics, Weights, build, create, is_vit, load
from mpp.weights.heads import TanhHead, classifier_names

ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
NEW = ("x", "y", "z")
OLD = ("a", "b")


def filled(weights: Weights) -> Weights:
    """With no weight at its initial value."""
    torch.manual_seed(0)
    state = build(weights).state_dict()
    noisy = {name: x + 0.02 * torch.randn_like(x) if x.is_floating_point() else x for name, x in state.items()}
    return replace(weights, state=noisy, origin="a test")


def vit(**settings: Any) -> Weights:
    pool, args = settings.pop("pool", "token"), ARGS | settings
    return filled(Weights("vit_base_patch16_224", args, None, (32, 32), pool=pool, classes=OLD))


MODELS = {
    "vit": Weights("vit_base_patch16_224", ARGS, None, (32, 32), pool="token"),
    "vit with registers": Weights("vit_small_patch14_reg4_dinov2", ARGS, None, (32, 32), pool="avg"),
    "vit with parallel blocks": Weights("vit_small_patch16_18x2_224", ARGS, None, (32, 32)),
    "hybrid": Weights("vit_tiny_r_s16_p8_224", {"depth": 1}, None, (64, 64)),
    "hybrid with units": Weights(
        "vit_base_r50_s16_224",
        ARGS | {"patch_size": 1},
        None,
        (32, 32),
        numerics=Numerics(original_stem=True, stem_units=(1, 1)),
    ),
    "resnet": Weights("resnet18", {}, None, (32, 32)),
    "efficientnet": Weights("efficientnet_b0", {}, None, (32, 32)),
    "mobilenet": Weights("mobilenetv3_small_050", {}, None, (32, 32)),
    "convnext": Weights("convnext_atto", {}, None, (32, 32)),
    "swin": Weights("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1]}, None, (64, 64)),
    "eva": Weights("eva02_tiny_patch14_224", {"depth": 1}, None, (28, 28)),
}


@pytest.mark.parametrize("weights", MODELS.values(), ids=MODELS)
def test_a_new_head_says_nothing_and_the_old_one_can_stay_or_go(weights: Weights) -> None:
    images = torch.randn(2, 3, *weights.image_hw)
    known = filled(replace(weights, classes=OLD))
    with torch.no_grad():
        kept = build(known).eval()(images)
        assert kept.shape == (2, 2)
        assert kept.abs().max() > 0
        new: Any = build(known, classes=NEW).eval()
        assert torch.equal(new(images), torch.zeros(2, 3))
        bare: Any = build(known, classes=()).eval()
        features = bare(images)
        assert features.shape == (2, new.head_hidden_size)
        torch.testing.assert_close(features, new.forward_head(new.forward_features(images), pre_logits=True))
        fresh = build(weights, classes=NEW).eval()
        assert torch.equal(fresh(images), torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_timms_own_weights_give_timms_logits(name: str) -> None:
    hw = (64, 64)
    settings: dict[str, Any] = {"depth": 1} if name.startswith("vit") else {}
    size = {"img_size": hw} if name.startswith("vit") else {}
    theirs = timm.create_model(name, num_classes=2, **size, **settings).eval()
    pool = "token" if name.startswith("vit") else "avg"
    weights = Weights(name, settings, theirs.state_dict(), hw, pool=pool, classes=OLD)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(build(weights, attention="explicit").eval()(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("representation", "width"), [(16, 16), (0, 24)])
def test_a_head_with_a_hidden_layer(representation: int, width: int) -> None:
    model: Any = build(vit(), classes=NEW, representation=representation)
    assert isinstance(model.head, TanhHead)
    assert model.head.pre_logits.out_features == width
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), torch.zeros(2, 3))
    kept = replace(vit(), representation=representation, classes=NEW, state=model.state_dict())
    model.head.fc.weight.data.normal_()
    again: Any = build(kept, attention="sdpa").eval()
    torch.testing.assert_close(again(images), model.eval()(images))
    expected = again.forward_head(again.forward_features(images), pre_logits=True)
    expected = torch.tanh(expected @ again.head.pre_logits.weight.T + again.head.pre_logits.bias)
    torch.testing.assert_close(
        again.head.representation(again.forward_head(again.forward_features(images), True)), expected
    )
    assert isinstance(build(kept, classes=OLD).head, nn.Linear)


def test_a_hidden_layer_needs_a_vit() -> None:
    with pytest.raises(UserError, match="resnet18 is not a ViT and takes no hidden layer"):
        build(MODELS["resnet"], classes=NEW, representation=8)


@pytest.mark.parametrize("settings", [{}, {"no_embed_class": True}, {"reg_tokens": 2}, {"class_token": False}])
@pytest.mark.parametrize("size", [(48, 40), (16, 64)])
def test_another_size_resamples_the_positions(settings: dict[str, Any], size: tuple[int, int]) -> None:
    weights = vit(pool="avg", **settings)
    model: Any = build(weights, image_hw=size)
    table, new = weights.state["pos_embed"], (size[0] // 8, size[1] // 8)  # pyright: ignore[reportOptionalSubscript]
    prefix = table.shape[1] - 16
    assert torch.equal(model.pos_embed[:, :prefix], table[:, :prefix])
    assert torch.equal(model.pos_embed[:, prefix:], resample_table(table[:, prefix:], (4, 4), new))
    assert model(torch.randn(1, 3, *size)).shape == (1, 2)


def test_the_same_number_of_patches_in_another_shape_is_resampled() -> None:
    weights = vit()
    model: Any = build(weights, image_hw=(16, 64))
    assert not torch.equal(model.pos_embed, weights.state["pos_embed"])  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("size", [(30, 30), (29, 32), (25, 27)])
def test_a_hybrid_keeps_its_table_where_the_grid_stays(size: tuple[int, int]) -> None:
    weights = filled(MODELS["hybrid with units"])
    model: Any = build(weights, image_hw=size)
    assert torch.equal(model.pos_embed, weights.state["pos_embed"])  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("size", [(33, 33), (64, 24), (100, 100)])
def test_a_hybrid_resamples_where_the_grid_changes(size: tuple[int, int]) -> None:
    weights = filled(MODELS["hybrid with units"])
    model: Any = build(weights, image_hw=size)
    grid = (-(-size[0] // 8), -(-size[1] // 8))
    table = weights.state["pos_embed"]  # pyright: ignore[reportOptionalSubscript]
    assert torch.equal(model.pos_embed[:, 1:], resample_table(table[:, 1:], (4, 4), grid))


def test_a_table_that_is_not_of_that_size_is_refused() -> None:
    with pytest.raises(UserError, match="a test: 16 position embeddings are not the 5 x 4 of its patches"):
        build(replace(vit(), image_hw=(40, 32)))


@pytest.mark.parametrize(("own", "asked"), [("token", "avg"), ("avg", "token"), ("avg", "max"), ("token", "max")])
def test_the_pooling_changes_and_the_tokens_stay(own: str, asked: str) -> None:
    weights, images = vit(pool=own), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before: Any = build(weights, classes=()).eval()
        after: Any = build(weights, classes=(), pool=asked).eval()
        tokens = before.forward_features(images)
        patches = tokens[:, 1:]
        expected = {"token": tokens[:, 0], "avg": patches.mean(1), "max": patches.amax(1)}[asked]
        torch.testing.assert_close(after(images), expected)


def test_a_norm_after_the_pooling_stays_with_its_pooling() -> None:
    theirs = timm.create_model("vit_base_patch16_224", img_size=32, global_pool="avg", num_classes=2, **ARGS).eval()
    weights = Weights("vit_base_patch16_224", ARGS, theirs.state_dict(), (32, 32), classes=OLD)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(build(weights).eval()(images), theirs(images))
    with pytest.raises(UserError, match="last norm after pooling by avg"):
        build(weights, pool="token")


def test_a_class_token_that_is_not_there_cannot_be_read() -> None:
    with pytest.raises(UserError, match=r"timm cannot build .*class token"):
        build(vit(pool="avg", class_token=False), pool="token")


def test_what_is_no_vit_keeps_its_pooling() -> None:
    with pytest.raises(UserError, match="resnet18 is not a ViT: it pools by avg and cannot by token"):
        build(MODELS["resnet"], pool="token")


def test_missing_unexpected_and_bent_weights_are_listed() -> None:
    weights = vit()
    state = dict(weights.state or {})
    del state["norm.weight"], state["norm.bias"]
    state |= {"surprise": torch.zeros(1), "cls_token": torch.zeros(1, 1, 5)}
    with pytest.raises(UserError) as caught:
        build(replace(weights, state=state))
    text = str(caught.value)
    assert text.startswith("a test: the weights do not fit VisionTransformer")
    assert "2 missing: norm.weight, norm.bias" in text
    assert "1 unexpected: surprise" in text
    assert "1 of another shape: cls_token (1, 1, 5) for (1, 1, 24)" in text


def test_a_long_list_is_cut() -> None:
    model = create(vit(), num_classes=2)
    with pytest.raises(UserError, match=r"missing: ([\w.]+, ){5}\.\.\."):
        load(model, {}, "a test", head=True)


def test_a_head_of_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"head\.weight \(2, 24\) for \(3, 24\)"):
        build(replace(vit(), classes=NEW))


def test_an_unknown_name_gets_names_near_it() -> None:
    with pytest.raises(UserError, match=r"has no model 'resnet19'; near it: .*resnet1"):
        build(Weights("resnet19", {}, None, (32, 32)))


@pytest.mark.parametrize("args", [{"num_heads": 5}, {"wheels": 4}, {"act_layer": "nothing"}])
def test_arguments_that_timm_refuses_become_a_line(args: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(UserError, match="timm cannot build 'vit_base_patch16_224' with") as caught:
        build(replace(vit(), state=None, args=ARGS | args))
    assert "\n" not in str(caught.value)


def test_the_numerics_are_those_of_the_original() -> None:
    model = create(replace(vit(), numerics=Numerics(norm_eps=1e-3)))
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-3}
    plain = create(replace(vit(), numerics=Numerics(norm_eps=1e-3)), plain=True)
    assert {module.eps for module in plain.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert not any(isinstance(module, Attention) for module in plain.modules())


def test_the_kernel_of_attention_is_chosen() -> None:
    for backend in ("sdpa", "explicit"):
        model: Any = build(vit(), attention=backend)
        assert {block.attn.backend for block in model.blocks} == {backend}
    with pytest.raises(UserError, match="xformers cannot run here"):
        build(vit(), attention="xformers")


def test_stochastic_depth_and_mode() -> None:
    model: Any = build(vit(), drop_path=0.3)
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.training
    assert all(module.training for module in build(filled(MODELS["hybrid with units"]), image_hw=(64, 64)).modules())


def test_fresh_weights_come_from_the_global_generator() -> None:
    torch.manual_seed(3)
    first = build(MODELS["vit"]).state_dict()
    torch.manual_seed(3)
    second = build(MODELS["vit"]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_hybrids_are_vits_and_resnets_are_not() -> None:
    assert is_vit("vit_base_r50_s16_224")
    assert is_vit("vit_tiny_patch16_224")
    assert not is_vit("resnet18")


SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"depths": [1, 1, 2, 1], "embed_dim": 24}


@pytest.mark.parametrize(
    ("name", "args", "own", "size"),
    [
        ("eva02_tiny_patch14_224", {"depth": 1}, (28, 28), (56, 42)),
        ("beit_base_patch16_224", SMALL, (32, 32), (64, 48)),
        ("swin_tiny_patch4_window7_224", SWIN, (64, 64), (128, 96)),
        ("swin_tiny_patch4_window7_224", SWIN, (128, 128), (64, 64)),
    ],
)
def test_what_is_no_vit_is_resampled_by_timm(
    name: str, args: dict[str, Any], own: tuple[int, int], size: tuple[int, int]
) -> None:
    weights = filled(Weights(name, args, None, own, classes=OLD))
    images = torch.randn(2, 3, *size)
    theirs: Any = build(weights)
    if name.startswith("swin"):
        windows = [stage.blocks[0].window_size for stage in create(weights, image_hw=size).layers]
        settings = {"window_size": windows}
    else:
        settings = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm interpolates
        theirs.set_input_size(img_size=size, **settings)
    model = build(weights, image_hw=size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), theirs.eval()(images))
    # What it has become is built and loaded by its new size alone, as after an export.
    moved = replace(weights, state=model.state_dict(), image_hw=size)
    with torch.no_grad():
        torch.testing.assert_close(build(moved).eval()(images), model(images))
    new = build(weights, image_hw=size, classes=NEW)
    assert torch.equal(new(images), torch.zeros(2, 3))


def test_a_model_of_one_size_alone_is_refused_at_another() -> None:
    weights = filled(Weights("mixer_s32_224", {}, None, (64, 64), classes=OLD))
    with pytest.raises(UserError) as caught:
        build(weights, image_hw=(96, 64))
    assert str(caught.value) == (
        "a test is for images of 64 x 64 pixels, and timm cannot make mixer_s32_224 take 96 x 64: "
        "leave out --img-size (in fine-tuning --model.img-size)"
    )
    state = {name: value for name, value in (weights.state or {}).items() if name != "norm.weight"}
    with pytest.raises(UserError, match=r"1 missing: norm\.weight"):  # that it is another model's comes first
        build(replace(weights, state=state), image_hw=(96, 64))


@pytest.mark.parametrize(("name", "hw"), [("volo_d1_224", (64, 64)), ("repvit_m0_9", (32, 32))])
def test_a_second_head_says_nothing_either(name: str, hw: tuple[int, int]) -> None:
    model: Any = build(Weights(name, {}, None, hw), classes=NEW)
    images = torch.randn(2, 3, *hw)
    assert torch.equal(model(images), torch.zeros(2, 3))
    (model(images) * torch.randn(2, 3)).sum().backward()  # and learns all the same
    heads = [parameter for key, parameter in model.named_parameters() if key.startswith(classifier_names(model))]
    assert len(heads) == 4
    assert all(parameter.grad.abs().max() > 0 for parameter in heads)
