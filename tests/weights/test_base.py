"""Weights into models: heads, sizes, poolings, and complaints about weights that do not fit."""

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
from mpp.weights.base import Weights, build, classifier_names, create, load
from mpp.weights.numerics import Numerics
from tests.weights.models import ARGS, HYBRID, filled, images, vit

NEW = ("x", "y", "z")
OLD = ("a", "b")
SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"depths": [1, 1, 2, 1], "embed_dim": 24}

MODELS = {
    "vit": Weights("vit_base_patch16_224", ARGS, None, (32, 32), pool="token"),
    "vit with registers": Weights("vit_small_patch14_reg4_dinov2", ARGS, None, (32, 32), pool="avg"),
    "vit with parallel blocks": Weights("vit_small_patch16_18x2_224", ARGS, None, (32, 32)),
    "hybrid": Weights("vit_tiny_r_s16_p8_224", {"depth": 1}, None, (64, 64)),
    "hybrid with units": HYBRID,
    "resnet": Weights("test_resnet", {}, None, (32, 32)),
    "efficientnet": Weights("test_efficientnet", {}, None, (32, 32)),
    "mobilenet": Weights("mobilenetv3_small_050", {}, None, (32, 32)),
    "convnext": Weights("test_convnext", {}, None, (32, 32)),
    "swin": Weights("swin_tiny_patch4_window7_224", SWIN, None, (64, 64)),
    "eva": Weights("eva02_tiny_patch14_224", {"depth": 1}, None, (28, 28)),
}


@pytest.mark.parametrize("weights", MODELS.values(), ids=MODELS)
def test_a_new_head_says_nothing_and_the_old_one_can_stay_or_go(weights: Weights) -> None:
    pixels, known = images(*weights.image_hw), filled(replace(weights, classes=OLD))
    with torch.no_grad():
        logits = build(known).eval()(pixels)
        assert logits.shape == (2, 2)
        assert logits.abs().max() > 0
        new: Any = build(known, classes=NEW).eval()
        fresh = build(weights, classes=NEW).eval()
        assert torch.equal(new(pixels), torch.zeros(2, 3))
        assert torch.equal(fresh(pixels), torch.zeros(2, 3))
        features = build(known, classes=()).eval()(pixels)
        torch.testing.assert_close(features, new.forward_head(new.forward_features(pixels), pre_logits=True))


@pytest.mark.parametrize(
    ("name", "args", "hw"),
    [
        ("volo_d1_224", {}, (32, 32)),
        ("repvit_m0_9", {"embed_dim": (16, 16, 24, 24), "depth": (1, 1, 1, 1)}, (32, 32)),
    ],
)
def test_a_second_head_says_nothing_either(name: str, args: dict[str, Any], hw: tuple[int, int]) -> None:
    model: Any = build(Weights(name, args, None, hw), classes=NEW)
    pixels = images(*hw)
    assert torch.equal(model(pixels), torch.zeros(2, 3))
    (model(pixels) * torch.randn(2, 3)).sum().backward()  # and learns all the same
    heads = [parameter for key, parameter in model.named_parameters() if key.startswith(classifier_names(model))]
    assert len(heads) == 4
    assert all(parameter.grad.abs().max() > 0 for parameter in heads)


TIMM = ("test_resnet", "test_convnext", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "vit_small_patch16_dinov3")


@pytest.mark.parametrize("name", TIMM)
def test_timms_own_weights_give_timms_logits(name: str) -> None:
    is_vit = name.startswith("vit")
    args: dict[str, Any] = {"depth": 1} if is_vit else {}
    size = {"img_size": 64, "global_pool": "token"} if is_vit else {}
    theirs = timm.create_model(name, num_classes=2, **size, **args).eval()
    weights = Weights(name, args, theirs.state_dict(), (64, 64), pool="token" if is_vit else "avg", classes=OLD)
    with torch.no_grad():
        ours = build(weights, attention="explicit").eval()(images(64, 64))
        torch.testing.assert_close(ours, theirs(images(64, 64)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("representation", "width"), [(16, 16), (0, 24)])
def test_a_head_with_a_hidden_layer(representation: int, width: int) -> None:
    model: Any = build(vit(), classes=NEW, representation=representation)
    assert model.head.pre_logits.out_features == width
    assert torch.equal(model(images()), torch.zeros(2, 3))
    model.head.fc.weight.data.normal_()
    saved = replace(vit(), representation=width, classes=NEW, state=model.state_dict())
    again: Any = build(saved).eval()
    pooled = again.forward_head(again.forward_features(images()), pre_logits=True)
    hidden = torch.tanh(pooled @ model.head.pre_logits.weight.T + model.head.pre_logits.bias)
    torch.testing.assert_close(again(images()), hidden @ model.head.fc.weight.T)
    assert isinstance(build(saved, classes=OLD).head, nn.Linear)


@pytest.mark.parametrize("settings", [{}, {"no_embed_class": True}, {"reg_tokens": 2}, {"class_token": False}])
@pytest.mark.parametrize("size", [(48, 40), (16, 64)])  # the second with as many patches
def test_another_size_resamples_the_positions(settings: dict[str, Any], size: tuple[int, int]) -> None:
    weights: Any = vit(pool="avg", **settings)
    model: Any = build(weights, image_hw=size)
    table, new = weights.state["pos_embed"], (size[0] // 8, size[1] // 8)
    prefix = table.shape[1] - 16
    assert torch.equal(model.pos_embed[:, :prefix], table[:, :prefix])
    assert torch.equal(model.pos_embed[:, prefix:], resample_table(table[:, prefix:], (4, 4), new))
    assert not torch.equal(model.pos_embed[:, :16], table[:, :16])
    assert model(torch.randn(1, 3, *size)).shape == (1, 2)


@pytest.mark.parametrize("size", [(30, 30), (29, 32), (25, 27), (33, 33), (64, 24), (100, 100)])
def test_a_hybrid_resamples_only_if_the_grid_changes(size: tuple[int, int]) -> None:
    weights: Any = filled(HYBRID)
    model: Any = build(weights, image_hw=size)
    grid = (-(-size[0] // 8), -(-size[1] // 8))
    table = weights.state["pos_embed"]
    expected = table[:, 1:] if grid == (4, 4) else resample_table(table[:, 1:], (4, 4), grid)
    assert torch.equal(model.pos_embed[:, 1:], expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("own", ["token", "avg"])
def test_the_pooling_changes_and_the_tokens_stay(own: str) -> None:
    weights = vit(pool=own)
    with torch.no_grad():
        tokens = build(weights, classes=()).eval().forward_features(images())  # pyright: ignore[reportCallIssue]
        patches = tokens[:, 1:]
        for pool, pooled in {"token": tokens[:, 0], "avg": patches.mean(1), "max": patches.amax(1)}.items():
            torch.testing.assert_close(build(weights, classes=(), pool=pool).eval()(images()), pooled)


def test_a_norm_after_the_pooling_stays_with_its_pooling() -> None:
    theirs = timm.create_model("vit_base_patch16_224", img_size=32, global_pool="avg", num_classes=2, **ARGS).eval()
    weights = Weights("vit_base_patch16_224", ARGS, theirs.state_dict(), (32, 32), classes=OLD)
    torch.testing.assert_close(build(weights).eval()(images()), theirs(images()))
    with pytest.raises(UserError, match="last norm after pooling by avg"):
        build(weights, pool="token")


VIT = replace(MODELS["vit"], classes=OLD)
TOKENLESS = replace(VIT, args=ARGS | {"class_token": False}, pool="avg")
REFUSED: dict[str, tuple[Weights, dict[str, Any], str]] = {
    "a hidden layer": (
        MODELS["resnet"],
        {"classes": NEW, "representation": 8},
        "test_resnet is not a ViT and takes",
    ),
    "another pooling": (
        MODELS["resnet"],
        {"pool": "token"},
        "test_resnet is not a ViT: it pools by avg and",
    ),
    "no class token": (TOKENLESS, {"pool": "token"}, r"timm cannot build .*class token"),
    "other positions": (replace(vit(), image_hw=(40, 32)), {}, "a test: 16 position embeddings are not the 5 x 4 of"),
    "another number of classes": (replace(vit(), classes=NEW), {}, r"head\.weight \(2, 24\) for \(3, 24\)"),
    "no name": (Weights("resnet19", {}, None, (32, 32)), {}, r"has no model 'resnet19'; near it: .*resnet1"),
    "no kernel": (VIT, {"attention": "xformers"}, "xformers cannot run here"),
    "heads": (replace(VIT, args=ARGS | {"num_heads": 5}), {}, "timm cannot build 'vit_base_patch16_224'"),
    "an argument": (replace(VIT, args=ARGS | {"wheels": 4}), {}, "timm cannot build .* with .*wheels"),
    "an activation": (replace(VIT, args=ARGS | {"act_layer": "x"}), {}, "timm cannot build .* with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_in_a_line(case: str, caplog: pytest.LogCaptureFixture) -> None:
    weights, settings, reason = REFUSED[case]
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(UserError, match=reason) as caught:
        build(weights, **settings)
    assert "\n" not in str(caught.value)


def test_missing_unexpected_and_bent_weights_are_listed() -> None:
    weights = vit()
    state = dict(weights.state or {})
    del state["norm.weight"], state["norm.bias"]
    state |= {"surprise": torch.zeros(1), "cls_token": torch.zeros(1, 1, 5)}
    with pytest.raises(UserError) as caught:
        build(replace(weights, state=state))
    assert str(caught.value) == (
        "a test: the weights do not fit VisionTransformer (2 missing: norm.weight, norm.bias; 1 unexpected: surprise; "
        "1 of another shape: cls_token (1, 1, 5) for (1, 1, 24))"
    )
    with pytest.raises(UserError, match=r"missing: ([\w.]+, ){5}\.\.\."):  # a long list is cut
        load(create(weights, num_classes=2), {}, "a test", head=True)


def test_numerics_kernel_and_stochastic_depth_are_set() -> None:
    for plain, eps in ((False, 1e-3), (True, 1e-6)):
        model = create(replace(VIT, numerics=Numerics(norm_eps=1e-3)), plain=plain)
        assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {eps}
        assert any(isinstance(module, Attention) for module in model.modules()) != plain
    for backend in ("sdpa", "explicit"):
        model: Any = build(VIT, attention=backend, drop_path=0.3)
        assert {block.attn.backend for block in model.blocks} == {backend}
        assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


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
    weights, pixels = filled(Weights(name, args, None, own, classes=OLD)), images(*size)
    theirs: Any = build(weights)
    settings = {}
    if name.startswith("swin"):
        settings["window_size"] = [stage.blocks[0].window_size for stage in create(weights, image_hw=size).layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm interpolates
        theirs.set_input_size(img_size=size, **settings)
    model = build(weights, image_hw=size)
    moved = replace(weights, state=model.state_dict(), image_hw=size)  # as after an export
    with torch.no_grad():
        expected = theirs.eval()(pixels)
        torch.testing.assert_close(model.eval()(pixels), expected)
        torch.testing.assert_close(build(moved).eval()(pixels), expected)


@pytest.mark.slow
def test_a_model_of_one_size_alone_is_refused_at_another() -> None:
    weights = filled(Weights("mixer_s32_224", {}, None, (64, 64), classes=OLD))
    with pytest.raises(UserError, match="is for images of 64 x 64 pixels, and timm cannot make mixer_s32_224 take 96"):
        build(weights, image_hw=(96, 64))
    state = {name: value for name, value in (weights.state or {}).items() if name != "norm.weight"}
    with pytest.raises(UserError, match=r"1 missing: norm\.weight"):  # that it is another model's comes first
        build(replace(weights, state=state), image_hw=(96, 64))
