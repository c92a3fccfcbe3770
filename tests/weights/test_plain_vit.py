"""What Hugging Face's ViT cannot represent is refused, with the reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mpp.errors import UserError
from mpp.weights.base import Weights, build
from mpp.weights.huggingface import write_hf_folder
from mpp.weights.plain_vit import activation, extras

ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


def weights(pool: str = "token", name: str = "vit_base_patch16_224", **args: Any) -> Weights:
    fresh = Weights(name, ARGS | args, None, (32, 32), pool=pool, origin="a test")
    return replace(fresh, state=build(fresh).state_dict())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no class token": ({"pool": "avg", "class_token": False}, "no class token"),
    "registers": ({"reg_tokens": 2}, "register tokens"),
    "no position for the class": ({"no_embed_class": True}, "class token has no position embedding"),
    "no positions": ({"pos_embed": "none"}, "no table of position embeddings"),
    "qk-norm": ({"qk_norm": True}, "normalises queries and keys"),
    "layer scale": ({"init_values": 0.1}, "layer scale"),
    "norm before the blocks": ({"pre_norm": True}, "patch embedding has no bias"),
    "further norms": ({"scale_mlp_norm": True}, "further norms"),
    "no bias": ({"proj_bias": False}, "projections have no bias"),
    "another activation": ({"act_layer": "quick_gelu"}, "its activation is QuickGELU"),
    "dino's registers": ({"name": "vit_small_patch14_reg4_dinov2"}, "register tokens"),
    "parallel blocks": ({"name": "vit_small_patch16_18x2_224"}, "its blocks are ParallelThingsBlock"),
    "pooled by attention": ({"pool": "map"}, "pools by attention"),
    "hybrid": ({"name": "vit_tiny_r_s16_p8_224", "patch_size": 1}, "it is a hybrid"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_their_vit_has_not_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a test cannot be written .*{reason}") as caught:
        write_hf_folder(weights(**settings), tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_vit_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    with pytest.raises(UserError, match="it is a ResNet"):
        write_hf_folder(Weights("resnet18", {}, state, (32, 32)), tmp_path / "hf")


def test_the_last_norm_after_the_pooling_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_base_patch16_224", img_size=32, global_pool="avg", num_classes=0, **ARGS)
    with pytest.raises(UserError, match="last norm"):
        write_hf_folder(Weights("vit_base_patch16_224", ARGS, model.state_dict(), (32, 32)), tmp_path / "hf")


@pytest.mark.parametrize("args", [{}, {"act_layer": "gelu_tanh"}, {"qkv_bias": False}, {"drop_path_rate": 0.1}])
def test_the_papers_encoder_has_nothing_extra(args: dict[str, Any]) -> None:
    assert extras(timm.create_model("vit_base_patch16_224", img_size=32, **ARGS, **args)) is None


def test_activations_have_timms_names() -> None:
    for name in ("gelu", "gelu_tanh"):
        assert activation(timm.layers.create_act_layer(name)) == name
    assert activation(torch.nn.GELU()) == "gelu"
    assert activation(torch.nn.GELU("tanh")) == "gelu_tanh"
    assert activation(torch.nn.ReLU()) is None
