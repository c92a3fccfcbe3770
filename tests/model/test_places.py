"""Tokens at some places only: the same numbers and gradients as among all tokens, for less."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpp.model.attention import take, use_kernel
from mpp.model.block import Block
from mpp.model.encoder import Encoder, build_encoder
from mpp.model.settings import ModelConfig
from tests.model.test_encoder import CASES, TINY, build, pictures, scramble, small

MORE = {
    "one block": dataclasses.replace(TINY, depth=1),
    "stochastic depth": dataclasses.replace(TINY, depth=3, drop_path=0.5),
    "checkpointing": dataclasses.replace(TINY, grad_checkpointing=True, drop_path=0.5),
    "checkpointing, parallel blocks": small("vit_giant_patch14_reg4_dinov2", img_size=(28,), grad_checkpointing=True),
    "qk norm": small("vit_so150m2_patch16_reg1_gap_256"),
}


def choose(encoder: Encoder, k: int = 5) -> Tensor:
    """k places of each of two images, in no order."""
    patches = encoder.grid[0] * encoder.grid[1]
    generator = torch.Generator().manual_seed(4)
    return torch.rand(2, patches, generator=generator).argsort(dim=1)[:, : min(k, patches)]


def results(encoder: Encoder, images: Tensor, at: Tensor, *, among_all: bool) -> list[Tensor | None]:
    """The tokens at these places, and the gradients of the patch tokens and of all weights."""
    encoder.zero_grad()
    tokens = encoder.embed(images).detach().requires_grad_()
    torch.manual_seed(3)  # of stochastic depth
    out = take(encoder.encode(tokens), at + encoder.num_prefix_tokens) if among_all else encoder.encode(tokens, at=at)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    (out * towards).sum().backward()
    return [out.detach(), tokens.grad, *(p.grad for p in encoder.parameters())]


def assert_the_same(encoder: Encoder, config: ModelConfig, tolerance: float = 1e-11) -> None:
    images, at = pictures(config).to(next(encoder.parameters())), choose(encoder)
    full, short = (results(encoder, images, at, among_all=which) for which in (True, False))
    for ours, expected in zip(short, full, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("config", [*CASES.values(), *MORE.values()], ids=[*CASES, *MORE])
def test_some_tokens_and_all_gradients_equal_those_among_all(config: ModelConfig) -> None:
    assert_the_same(build(config).train(), config)


VARIANTS: dict[str, dict[str, Any]] = {
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "attention norm, mlp norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_plain_block(settings: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **given: create(*names, **{**given, **settings}))
    encoder = build(TINY).train()
    use_kernel(encoder, backend)
    assert type(encoder.vit.blocks[-1]) is Block
    assert_the_same(encoder, TINY)


@pytest.mark.parametrize("case", ["plain", "registers, class without position"])
def test_in_fp32_it_is_the_same_to_rounding(case: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(CASES[case]).train()
    scramble(encoder)
    assert_the_same(encoder, CASES[case], tolerance=1e-5)


def test_tokens_come_back_in_the_order_asked_for_and_as_often() -> None:
    encoder, images = build(TINY), pictures(TINY)
    tokens = encoder.embed(images)
    at = torch.tensor([[7, 2, 2], [0, 15, 3]])
    expected = torch.stack([encoder.encode(tokens)[b, 1 + at[b]] for b in range(2)])  # 1: the class token
    torch.testing.assert_close(encoder.encode(tokens, at=at), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("case", "expected"), [("plain", "Block"), ("norm after the branches", "ResPostBlock")])
def test_only_timms_plain_blocks_are_replaced(case: str, expected: str) -> None:
    encoder = build_encoder(CASES[case], "meta")
    assert {type(block).__name__ for block in encoder.vit.blocks} == {expected}
    assert (type(encoder.vit.blocks[0]) is Block) == (case == "plain")


def test_of_the_other_tokens_the_last_block_computes_keys_and_values_only() -> None:
    encoder = build(dataclasses.replace(TINY, attention="explicit"))  # whose products the counter knows
    tokens, d, n, k = encoder.embed(pictures(TINY)), 48, 17, 4
    at = choose(encoder, k)
    flops = []
    for places in (None, at):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder.encode(tokens, at=places)
        flops.append(counter.get_total_flops())
    of_each = 2 * (10 * d * d + 2 * n * d)  # query, projection, MLP; scores and their weighted mean
    assert flops[0] - flops[1] == 2 * (n - k) * of_each


COMPILED = """
import functools, sys
import torch
from torch._dynamo.utils import counters
from mpp.model.settings import ModelConfig
from mpp.model.encoder import build_encoder

torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
sizes = dict(img_size=(32,), patch_size=(8,), depth=5, embed_dim=48, num_heads=3)
encoder, results = build_encoder(ModelConfig("vit_tiny_patch16_224", **sizes)), []
tokens, at = torch.randn(2, 16, 48), torch.tensor([[3, 1], [0, 15]])
for compiled in (False, True):
    if compiled:
        for block in encoder.vit.blocks:  # as FSDP does
            block.compile()
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


ENTERING = {name: CASES[name] for name in ("plain", "registers, class without position")}


@pytest.mark.parametrize("config", [*ENTERING.values(), MORE["checkpointing"]], ids=[*ENTERING, "checkpointing"])
def test_patches_that_enter_later_are_unknown_to_the_blocks_before(config: ModelConfig) -> None:
    """Against one image at a time, whose visible tokens are picked out by hand."""
    config = dataclasses.replace(config, depth=3, drop_path=0.0)
    encoder = build(config)
    tokens, at = encoder.embed(pictures(config)), choose(encoder)
    found = encoder.encode(tokens, at=at, entering=2)
    inputs: list[Tensor] = []
    hook = encoder.vit.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    encoder.encode(tokens)
    hook.remove()
    for image, entered in enumerate(inputs[0]):
        late = {encoder.num_prefix_tokens + int(place) for place in at[image]}
        early = [place for place in range(len(entered)) if place not in late]
        x = entered[early][None]
        for block in encoder.vit.blocks[:2]:
            x = block(x)
        whole = entered.clone()[None]
        whole[0, early] = x[0]
        whole = encoder.vit.norm(encoder.vit.blocks[2](whole))
        torch.testing.assert_close(found[image], whole[0, at[image] + encoder.num_prefix_tokens], rtol=0, atol=1e-11)


def test_patches_that_enter_later_have_the_same_gradients_in_any_order() -> None:
    config = dataclasses.replace(TINY, depth=3)
    encoder = build(config).train()
    images, at = pictures(config).to(next(encoder.parameters())), choose(encoder)
    gradients = []
    for order in (torch.arange(at.shape[1]), torch.arange(at.shape[1]).flip(0)):
        encoder.zero_grad()
        out = encoder.encode(encoder.embed(images), at=at[:, order], entering=1)
        (out * torch.linspace(-1, 1, out.shape[-1])[None, None]).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 * max(1.0, expected.abs().max().item()))
