"""Some tokens only, before the head or a decoder: the same numbers and gradients as among all tokens, for less."""

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpp.model.attention import Block, take
from mpp.model.encoder import Decoder, Encoder, build_encoder
from mpp.model.settings import ModelConfig
from tests.model.encoders import CASES, TINY, build, choose, pictures, scramble, small, tiny

MORE = {
    "one block": tiny(depth=1),
    "stochastic depth": tiny(depth=3, drop_path=0.5),
    "checkpointing": tiny(grad_checkpointing=True, drop_path=0.5),
    "checkpointing, parallel blocks": small("vit_giant_patch14_reg4_dinov2", img_size=(28,), grad_checkpointing=True),
    "qk norm": small("vit_so150m2_patch16_reg1_gap_256"),
}


def results(encoder: Encoder, images: Tensor, at: Tensor, *, among_all: bool) -> list[Tensor | None]:
    """The tokens at these patches, and the gradients of the patch tokens and of all weights."""
    encoder.zero_grad()
    tokens = encoder.embed(images).detach().requires_grad_()
    torch.manual_seed(3)  # of stochastic depth
    out = take(encoder.encode(tokens), at + encoder.num_prefix_tokens) if among_all else encoder.encode(tokens, at=at)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    (out * towards).sum().backward()
    return [out.detach(), tokens.grad, *(p.grad for p in encoder.parameters())]


def assert_the_same(encoder: Encoder, config: ModelConfig) -> None:
    images, at = pictures(config), choose(encoder)
    full, short = (results(encoder, images, at, among_all=which) for which in (True, False))
    for ours, expected in zip(short, full, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("config", [*CASES.values(), *MORE.values()], ids=[*CASES, *MORE])
def test_some_tokens_and_all_gradients_equal_those_among_all(config: ModelConfig) -> None:
    assert_the_same(build(config).train(), config)


VARIANTS: dict[str, dict[str, Any]] = {
    "layer scale": {"init_values": 0.3},
    "norms within": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_plain_block(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **given: create(*names, **{**given, **settings}))
    encoder = build(TINY).train()
    assert type(encoder.vit.blocks[-1]) is Block
    assert_the_same(encoder, TINY)


def test_tokens_come_back_in_the_order_asked_for_and_as_often() -> None:
    encoder = build(TINY)
    tokens, at = encoder.embed(pictures(TINY)), torch.tensor([[7, 2, 2], [0, 15, 3]])
    expected = torch.stack([encoder.encode(tokens)[b, 1 + at[b]] for b in range(2)])  # 1: the class token
    torch.testing.assert_close(encoder.encode(tokens, at=at), expected, rtol=0, atol=1e-12)


def test_of_the_other_tokens_the_last_block_computes_keys_and_values_only() -> None:
    encoder = build(tiny(attention="explicit"))  # whose products the counter knows
    tokens, d, n, k = encoder.embed(pictures(TINY)), 48, 17, 4
    flops = []
    for at in (None, choose(encoder, k)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder.encode(tokens, at=at)
        flops.append(counter.get_total_flops())
    of_each = 2 * (10 * d * d + 2 * n * d)  # query, projection, MLP; scores and their weighted mean
    assert flops[0] - flops[1] == 2 * (n - k) * of_each


COMPILED = """
import sys
import torch
from torch._dynamo.utils import counters
from mpp.model.settings import ModelConfig
from mpp.model.encoder import build_encoder

sizes = dict(img_size=(32,), patch_size=(8,), depth=5, embed_dim=48, num_heads=3)
encoder, results = build_encoder(ModelConfig("vit_tiny_patch16_224", **sizes)), []
tokens, at = torch.randn(2, 16, 48), torch.tensor([[3, 1], [0, 15]])
for compiled in (False, True):
    for block in encoder.vit.blocks if compiled else ():  # as FSDP does
        block.compile(backend="aot_eager")
    encoder.zero_grad()
    out = encoder.encode(tokens, at=at)
    out.square().sum().backward()
    results.append([out, *(p.grad for p in encoder.vit.blocks.parameters())])
torch.testing.assert_close(*results, rtol=0, atol=1e-5)
sys.exit(counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
def test_compiled_blocks_share_a_graph_and_compute_the_same() -> None:
    # A process of its own: the type checks of these tests cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr  # a graph of the last block, and one of all others


MASKED = {
    "plain": TINY,
    "registers, class without position": CASES["registers, class without position"],
    "stochastic depth": tiny(drop_path=0.5),
    "checkpointing": tiny(grad_checkpointing=True),
}


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("mask_block", [0, 2, 3])
def test_patches_that_enter_later_and_the_decoder_against_one_image_at_a_time(case: str, mask_block: int) -> None:
    """The visible tokens are picked out by hand; with `mask_block` 3 the encoder does not know the others at all."""
    encoder = build(ModelConfig(**{**vars(MASKED[case]), "depth": 3}))
    decoder = Decoder(encoder, 2).to(torch.float64).train()  # in training, too, for it drops nothing
    scramble(decoder)
    images, at = torch.randn(2, 3, *encoder.image_hw).double(), choose(encoder)
    tokens = encoder.embed(images)
    everything = encoder.encode(tokens, at=at, mask_block=mask_block, return_all=True)
    decoded = decoder(everything, at)
    inputs: list[Tensor] = []
    hook = encoder.vit.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    encoder.encode(tokens)
    hook.remove()
    for image, x in enumerate(inputs[0]):
        indices = at[image] + encoder.num_prefix_tokens
        visible = [i for i in range(len(x)) if i not in indices.tolist()]
        alone = x[visible][None]
        for block in encoder.vit.blocks[:mask_block]:
            alone = block(alone)
        whole = x.clone()[None]
        whole[0, visible] = alone[0] if mask_block < 3 else encoder.vit.norm(alone)[0]
        for block in encoder.vit.blocks[mask_block:]:
            whole = block(whole)
        whole = whole if mask_block == 3 else encoder.vit.norm(whole)
        torch.testing.assert_close(everything[image], whole[0], rtol=0, atol=1e-10)
        if mask_block < 3:
            some = encoder.encode(tokens, at=at, mask_block=mask_block)
            torch.testing.assert_close(some[image], whole[0, indices], rtol=0, atol=1e-10)
        for block in decoder.blocks:
            whole = block(whole)
        torch.testing.assert_close(decoded[image], decoder.norm(whole)[0, indices], rtol=0, atol=1e-10)
    decoded.square().sum().backward()
    assert not [name for part in (encoder, decoder) for name, p in part.named_parameters() if p.grad is None]


def test_block_numbers_that_do_not_exist_are_refused() -> None:
    encoder = build(tiny(depth=3))
    tokens, at = torch.randn(2, encoder.grid[0] * encoder.grid[1], encoder.embed_dim).double(), choose(encoder)
    for mask_block, return_all in ((3, False), (4, True)):
        with pytest.raises(ValueError, match=f"mask_block {mask_block}: of 3 blocks the last must run"):
            encoder.encode(tokens, at=at, mask_block=mask_block, return_all=return_all)


def test_the_decoders_weights_are_new_and_drawn_as_timm_draws_them() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig("vit_tiny_patch16_224", img_size=(32,), depth=3, drop_path=0.3))
    decoder = Decoder(encoder, 2)
    layer = decoder.blocks[1].mlp.fc1
    assert not torch.equal(layer.weight, encoder.vit.blocks[2].mlp.fc1.weight)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not layer.bias.any()
    for part, rates in ((decoder, [0, 0, 0, 0]), (encoder, [0.15, 0.15, 0.3, 0.3])):
        assert [m.drop_prob for m in part.modules() if isinstance(m, DropPath)] == pytest.approx(rates)
    meta = Decoder(build_encoder(TINY, "meta"), 1)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
