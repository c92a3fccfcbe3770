"""The attention kernels against timm's attention and against the formula."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn
from torch.nn import functional as F

from mpp.model import attention
from mpp.model.attention import KERNELS, Attention, attention_weights

CUDA = torch.device("cuda")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qkv bias": {"qkv_bias": True},
    "qk norm": {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True},
    "head width of its own": {"attn_head_dim": 5},
    "no output bias": {"proj_bias": False},
    "dropout, not in training": {"attn_drop": 0.9, "proj_drop": 0.9},
}
per_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
per_kernel = pytest.mark.parametrize("kernel", ["sdpa", "explicit"])


@per_variant
@per_kernel
@pytest.mark.parametrize("at", [None, [[5, 0, 3], [1, 2, 6]]], ids=["all", "some"])
def test_outputs_and_gradients_equal_timms(kernel: str, settings: dict[str, Any], at: list[list[int]] | None) -> None:
    torch.manual_seed(0)
    theirs = TimmAttention(24, num_heads=3, **settings).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.fused_attn = False
    ours = Attention(24, num_heads=3, **settings).double().eval()
    ours.load_state_dict(theirs.state_dict())
    ours.backend = kernel
    x, towards = torch.randn(2, 2, 7, 24, dtype=torch.float64).unbind(0)
    indices, results = torch.tensor(at if at else [list(range(7))] * 2), []
    for model in (ours, theirs):
        tokens = x.clone().requires_grad_()
        some = {"at": indices} if at and model is ours else {}
        out = model(tokens, **some)
        out = out if some else out[torch.arange(2)[:, None], indices]
        (out * towards[:, : out.shape[1]]).sum().backward()
        results.append([out, tokens.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@per_kernel
def test_weights_and_output_are_the_papers_formula(kernel: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind(0)
    odds = np.exp(q.numpy() @ k.numpy().swapaxes(2, 3) / math.sqrt(4))
    weights = odds / odds.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(attention_weights(q, k), weights, atol=1e-14)
    np.testing.assert_allclose(KERNELS[kernel](q, k, v, 0.0), weights @ v.numpy(), atol=1e-14)


@per_variant
@pytest.mark.parametrize("asked", [None, 3, 5])
def test_xformers_gets_what_its_kernels_take(
    settings: dict[str, Any], asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules of its flash kernel (ops/fmha/flash.py and common.py, 0.0.35), with sdpa in its place."""

    def checked(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert (p, k.shape, v.shape, q.shape[::2], q.shape[3]) == (0.0, (2, 7, 3, 8), k.shape, k.shape[::2], 8)
        for x in (q, k, v):
            assert x.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in x.stride()[:-1])
        # By these strides it makes the three gradients one tensor, which must then have room for all of them.
        assert q.stride(-2) != 3 * 8 or q.shape == k.shape
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(attention, "_memory_efficient_attention", checked)
    torch.manual_seed(0)
    layer = Attention(24, num_heads=3, **settings | {"attn_head_dim": 8}).eval()
    x, results = torch.randn(2, 7, 24), []
    at = None if asked is None else torch.arange(asked).expand(2, -1)
    for layer.backend in ("xformers", "sdpa"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(layer(x, at=at))
    torch.testing.assert_close(*results, rtol=0, atol=2e-2)


def test_a_failed_trial_of_xformers_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("No operator found\n`fa2F` is not supported because:\n    query.shape[-1] % 8 != 0\n")

    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=refuse))
    reason = attention._try_xformers.__wrapped__(torch.device("cpu"), torch.bfloat16, 12)
    assert reason == "xformers failed a trial on cpu in torch.bfloat16: query.shape[-1] % 8 != 0"


@pytest.mark.gpu
@pytest.mark.skipif(attention.xformers_obstacle(CUDA, torch.bfloat16) is not None, reason="needs CUDA and xformers")
@pytest.mark.parametrize("tokens", [16, 197])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("share", [1, 2])
def test_xformers_agrees_with_sdpa_in_bf16(tokens: int, width: int, share: int) -> None:
    torch.manual_seed(0)
    q, k, v, towards = torch.randn(4, 2, 3, tokens, width, device="cuda", dtype=torch.bfloat16).unbind(0)
    q, towards = q[:, :, : tokens // share], towards[:, :, : tokens // share]  # queries of some tokens only
    results = []
    for kernel in ("xformers", "sdpa"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = KERNELS[kernel](*inputs, 0.0)
        results.append([out, *torch.autograd.grad((out * towards).sum(), inputs)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
