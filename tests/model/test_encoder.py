"""The encoder against timm's own models; tests/weights compare it with the original JAX code."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mpp.errors import UserError
from mpp.model.encoder import Encoder, build_encoder
from mpp.model.settings import ModelConfig
from mpp.weights.timm_folder import timm_state
from tests.model.encoders import CASES, TINY, build, pictures, scramble, small, tiny


def timms(config: ModelConfig) -> VisionTransformer:
    """timm's model with timm's attention and the same settings."""
    settings: dict[str, Any] = {"img_size": config.image_hw, "in_chans": config.in_chans}
    settings |= {key: getattr(config, key) for key in ("depth", "embed_dim", "num_heads") if getattr(config, key)}
    if config.patch_size:
        settings["patch_size"] = (config.patch_size[0], config.patch_size[-1])
    if config.pos_embed == "none":
        settings["pos_embed"] = "none"
    if config.act == "gelu_tanh":
        settings["act_layer"] = lambda: nn.GELU(approximate="tanh")
    return timm.create_model(config.name, num_classes=0, global_pool="avg", fc_norm=False, **settings).double().eval()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_tokens_equal_timms_by_the_seam_and_attention_maps_give_each_blocks_output(config: ModelConfig) -> None:
    encoder, theirs, images = build(config), timms(config), pictures(config)
    theirs.load_state_dict(timm_state(encoder))
    assert tuple(g * p for g, p in zip(encoder.grid, encoder.patch, strict=True)) == config.image_hw
    assert torch.equal(encoder.encode(encoder.embed(images)), encoder(images))
    # 2-D tables pass through float32 on their way out
    tolerance = 1e-6 if encoder.position is not None else 1e-11
    torch.testing.assert_close(encoder(images), theirs.forward_features(images), rtol=0, atol=tolerance)
    check_attention_maps(encoder, images)


@pytest.mark.parametrize("changes", [{}, {"pos_embed": "2d"}, {"drop_path": 0.5}])
def test_checkpointing_recomputes_the_blocks_and_changes_no_gradient(changes: dict[str, Any]) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        encoder = build(tiny(grad_checkpointing=checkpointing, **changes)).train()
        count: list[int] = []
        encoder.vit.blocks[0].attn.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)  # of stochastic depth
        encoder(pictures(TINY)).square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
        calls.append(len(count))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert calls == [1, 2]


def check_attention_maps(encoder: Encoder, images: torch.Tensor) -> None:
    """Their rows sum to 1, and with the values of each block they give the output of its attention."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    attentions = [block.attn for block in encoder.vit.blocks]
    hooks = [attn.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0], out))) for attn in attentions]
    encoder(images)
    for hook in hooks:
        hook.remove()
    tokens = encoder.grid[0] * encoder.grid[1] + encoder.num_prefix_tokens
    for attn, weights, (x, out) in zip(attentions, encoder.attention_maps(images), calls, strict=True):
        assert weights.shape == (len(images), attn.num_heads, tokens, tokens)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
        values = attn.qkv(x)[..., -attn.attn_dim :].unflatten(-1, (attn.num_heads, -1))
        mixed = torch.einsum("bhij,bjhe->bihe", weights, values).flatten(2)
        torch.testing.assert_close(attn.proj(attn.norm(mixed)), out, rtol=0, atol=1e-11)
    assert not any(attn._forward_pre_hooks for attn in attentions)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch32_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch14_reg1_tipsv2",
        "vit_so150m_patch16_reg4_map_256",
        "vit_base_patch16_rpn_224",
        "deit3_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "beit3_base_patch16_224",
    ],
)
def test_attention_maps_of_timms_own_models(name: str) -> None:
    torch.manual_seed(0)
    side = 28 if "patch14" in name else 32
    args: dict[str, Any] = {"qk_norm": True} if "small_patch32" in name else {}
    vit: Any = timm.create_model(name, img_size=side, depth=2, embed_dim=48, num_heads=3, **args)
    assert type(vit.blocks[0].attn) is TimmAttention
    scramble(vit)
    check_attention_maps(Encoder(vit.double().eval()), torch.randn(2, 3, side, side, dtype=torch.float64))


def test_one_blocks_attention_is_computed_at_a_time() -> None:
    encoder, ran = build(TINY), []
    for number, block in enumerate(encoder.vit.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    maps = encoder.attention_maps(pictures(TINY))
    for number in range(2):
        next(maps)
        assert ran == [*range(number + 1)]


def test_attention_of_another_kind_is_refused_before_anything_runs() -> None:
    kinds = {"vit_base_patch16_xp_224": "ParallelScalingBlock", "vit_dwee_patch16_reg1_gap_256": "DiffAttention"}
    for name, kind in kinds.items():
        vit: Any = timm.create_model(name, img_size=32, depth=1, embed_dim=48, num_heads=3)
        with pytest.raises(UserError, match=f"cannot be shown: its blocks have a {kind}"):
            Encoder(vit).attention_maps(torch.zeros(1, 3, 32, 32))


def test_on_meta_nothing_is_allocated_and_all_shapes_are_the_same() -> None:
    meta, real = build_encoder(tiny(pos_embed="2d"), "meta"), build_encoder(tiny(pos_embed="2d"))
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    assert [t.shape for t in meta.state_dict().values()] == [t.shape for t in real.state_dict().values()]


HYBRID = ModelConfig("vit_tiny_r_s16_p8_224", img_size=(80,), depth=1)
REFUSED = {
    "unknown name": (ModelConfig("vit_bse_patch16_224"), ["'vit_bse_patch16_224'", "vit_base_patch16_224"]),
    "unlike any name": (ModelConfig("qqqq"), ["'qqqq'", "near it: none"]),
    "a name of weights": (ModelConfig("vit_tiny_patch16_224.augreg"), ["names weights; take vit_tiny_patch16_224"]),
    "not a ViT": (ModelConfig("resnet18"), ["'resnet18' is not a VisionTransformer", "vit_base_patch16_224"]),
    "relative positions": (ModelConfig("vit_relpos_small_patch16_224"), ["'vit_relpos_small_patch16_224'"]),
    "windowed attention": (ModelConfig("samvit_base_patch16"), ["'samvit_base_patch16'"]),
    "attention inside the block": (small("vit_base_patch16_xp_224"), ["xp_224' has blocks with an attention of its"]),
    "two attentions a block": (small("vit_small_patch16_18x2_224"), ["'vit_small_patch16_18x2_224'"]),
    "differential attention": (small("vit_dwee_patch16_reg1_gap_256"), ["'vit_dwee_patch16_reg1_gap_256'"]),
    "image between patches": (tiny(img_size=(36,)), ["36", "patch size 8", "32 or 40"]),
    "width between patches": (tiny(img_size=(32, 30)), ["30", "patch size 8", "24 or 32"]),
    "image smaller than a patch": (tiny(img_size=(6,)), ["6", "patch size 8", "take 8"]),
    "image between the patches of a hybrid": (HYBRID, ["80", "patch size 32", "64 or 96"]),
    "patch size of a hybrid": (replace(HYBRID, patch_size=(8,)), ["patch_size does not apply to the hybrid 'vit_tiny"]),
    "heads that do not divide the width": (tiny(num_heads=5), ["'num_heads': 5", "divisible"]),
    "width for sincos2d": (tiny(embed_dim=42, pos_embed="sincos2d"), ["sincos2d", "42"]),
    "xformers on the CPU": (tiny(attention="xformers"), ["'cpu'", "use auto or sdpa"]),
}


@pytest.mark.parametrize(("config", "parts"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_setting_and_a_way_out(config: ModelConfig, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_encoder(config)
    assert not [part for part in parts if part not in str(caught.value)], caught.value
