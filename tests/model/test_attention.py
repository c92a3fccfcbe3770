"""The attention kernels against timm's attention and against the formula."""

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

from mpp.errors import UserError
from mpp.model import attention
from mpp.model.attention import KERNELS, Attention, attention_weights, resolve_backend, time_kernels

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")

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


def pair(backend: str, settings: dict[str, Any]) -> tuple[Attention, TimmAttention]:
    """Our attention and timm's explicit one with the same random weights, in float64."""
    torch.manual_seed(0)
    theirs = TimmAttention(24, num_heads=3, **settings).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.fused_attn = False
    ours = Attention(24, num_heads=3, **settings).double().eval()
    ours.load_state_dict(theirs.state_dict())
    ours.backend = backend
    return ours, theirs


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_forward_equals_timms(backend: str, settings: dict[str, Any]) -> None:
    ours, theirs = pair(backend, settings)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_backward_equals_timms(backend: str, settings: dict[str, Any]) -> None:
    models = pair(backend, settings)
    x, towards = torch.randn(2, 2, 7, 24, dtype=torch.float64).unbind(0)
    gradients = []
    for model in models:
        at = x.clone().requires_grad_()
        (model(at) * towards).sum().backward()
        gradients.append([at.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_some_places_equal_timms_output_there(backend: str, settings: dict[str, Any]) -> None:
    models = pair(backend, settings)
    x, at = torch.randn(2, 7, 24, dtype=torch.float64), torch.tensor([[5, 0, 3], [1, 2, 6]])
    towards, results = torch.randn(2, 3, 24, dtype=torch.float64), []
    for model in models:
        tokens = x.clone().requires_grad_()
        out = model(tokens, at=at) if isinstance(model, Attention) else model(tokens)[torch.arange(2)[:, None], at]
        (out * towards).sum().backward()
        results.append([out, tokens.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def softmax_rows(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(E)) of one head, entry by entry."""
    rows = []
    for query in q:
        scores = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query))) for key in k]
        rows.append([score / sum(scores) for score in scores])
    return np.array(rows)


def test_weights_are_the_papers_formula() -> None:
    q, k = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64).unbind(0)
    expected = [softmax_rows(q[0, head].numpy(), k[0, head].numpy()) for head in range(2)]
    np.testing.assert_allclose(attention_weights(q, k)[0].numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
def test_a_kernel_is_the_weighted_mean_of_the_values(kernel: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64).unbind(0)
    expected = softmax_rows(q[0, 0].numpy(), k[0, 0].numpy()) @ v[0, 0].numpy()
    np.testing.assert_allclose(KERNELS[kernel](q, k, v, 0.0)[0, 0].numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
def test_dropout_leaves_the_output_unbiased(kernel: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6, 4, dtype=torch.float64).unbind(0)
    many = KERNELS[kernel](*(x.expand(4000, -1, -1, -1) for x in (q, k, v)), 0.5)
    error = (many.mean(dim=0) - KERNELS[kernel](q, k, v, 0.0)[0]).abs()
    assert (many.std(dim=0) > 0.05).all()
    assert (error < 5 * many.std(dim=0) / math.sqrt(4000)).all()


def test_a_mask_is_refused() -> None:
    layer, x = Attention(24, num_heads=3), torch.zeros(1, 4, 24)
    with pytest.raises(NotImplementedError, match="masked attention"):
        layer(x, attn_mask=torch.zeros(4, 4))
    with pytest.raises(NotImplementedError, match="masked attention"):
        layer(x, is_causal=True)


@pytest.mark.parametrize(
    ("name", "device", "installed", "expected"),
    [
        ("auto", CPU, True, "sdpa"),
        ("auto", MPS, True, "sdpa"),
        ("auto", CUDA, True, "xformers"),
        ("auto", CUDA, False, "sdpa"),
        ("xformers", CUDA, True, "xformers"),
        ("sdpa", CPU, False, "sdpa"),
        ("sdpa", CUDA, True, "sdpa"),
        ("explicit", CUDA, True, "explicit"),
        ("explicit", CPU, True, "explicit"),
    ],
)
def test_the_kernel_that_a_name_means(
    name: str, device: torch.device, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(attention, "_try_xformers", lambda *_: None)
    assert resolve_backend(name, device) == expected


def test_xformers_that_fails_its_trial_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(attention, "_try_xformers", lambda *_: "no kernel for float32")
    assert resolve_backend("auto", CUDA) == "sdpa"
    with pytest.raises(UserError, match="no kernel for float32; use auto or sdpa"):
        resolve_backend("xformers", CUDA)


def test_the_trial_of_xformers_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU it has no kernel, which the trial finds out by itself.
    attention._try_xformers.cache_clear()
    reason = attention._try_xformers(CPU, torch.float32, 64)
    assert reason is not None
    assert reason.startswith("xformers failed a trial on cpu in torch.float32: ")


@pytest.mark.parametrize(
    ("device", "installed", "available", "reason"),
    [
        (CPU, True, True, "no attention kernel for the device 'cpu'"),
        (MPS, True, True, "no attention kernel for the device 'mps'"),
        (CUDA, False, True, "pip install xformers"),
        (CUDA, True, False, "this torch sees no CUDA device"),
    ],
)
def test_xformers_by_name_where_it_cannot_run_says_why_and_what_to_do(
    device: torch.device, installed: bool, available: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    with pytest.raises(UserError, match="use auto or sdpa") as caught:
        resolve_backend("xformers", device)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("xformers", "sdpa", "expected"),
    [(1.0, 2.0, "xformers"), (1.0, 1.0, "xformers"), (1.0, 0.96, "xformers"), (1.0, 0.94, "sdpa")],
)
def test_auto_takes_sdpa_where_it_is_clearly_faster(
    xformers: float, sdpa: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "xformers_obstacle", lambda *_: None)
    asked: list[tuple[int, ...]] = []

    def timed(names: tuple[str, ...], shape: tuple[int, ...], *_: object) -> dict[str, float]:
        asked.append(shape)
        return dict(zip(names, (xformers, sdpa), strict=True))

    monkeypatch.setattr(attention, "time_kernels", timed)
    attention._faster.cache_clear()
    assert [resolve_backend("auto", CUDA, torch.bfloat16, 64, (8, 197, 6)) for _ in range(2)] == [expected] * 2
    assert asked == [(8, 197, 6, 64)]  # timed once
    attention._faster.cache_clear()


def test_kernels_are_timed_in_turns_forward_and_backward_and_by_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def kernel(name: str) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            assert (q.shape, dropout, torch.is_grad_enabled()) == ((2, 3, 5, 4), 0.0, True)
            done.append(name)
            out = q * k * v
            out.register_hook(lambda _: done.append(f"{name} back"))
            return out

        return run

    for name in ("a", "b"):
        monkeypatch.setitem(KERNELS, name, kernel(name))
    ticks = iter([90.0, 80.0, 70.0, 60.0, 1.0, 6.0, 3.0, 4.0, 50.0, 5.0])  # the first four do not count

    def clock(work: Callable[[], object]) -> float:
        work()
        return next(ticks)

    state = torch.get_rng_state()
    with torch.no_grad():
        took = time_kernels(("a", "b"), (2, 5, 3, 4), CPU, torch.float32, clock, repeats=3)
    assert took == {"a": 3.0, "b": 5.0}
    assert done == ["a", "a back", "b", "b back"] * 5
    assert torch.equal(torch.get_rng_state(), state)


def test_the_choice_of_kernel_adds_no_parameters() -> None:
    ours, theirs = pair("sdpa", {})
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_a_backend_belongs_to_one_layer() -> None:
    first = Attention(24, num_heads=3)
    second = copy.deepcopy(first)
    first.backend = "explicit"
    assert (second.backend, Attention.backend) == ("sdpa", "sdpa")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_times_the_kernels_on_the_device() -> None:
    if attention.xformers_obstacle(CUDA, torch.bfloat16):
        assert resolve_backend("auto", CUDA, torch.bfloat16, 64, (64, 197, 12)) == "sdpa"
    took = time_kernels(("sdpa", "explicit"), (64, 197, 12, 64), CUDA, torch.bfloat16)
    assert 0 < took["sdpa"] < took["explicit"]
    assert resolve_backend("auto", CUDA, torch.bfloat16, 64, (64, 197, 12)) in ("sdpa", "xformers")


@pytest.mark.gpu
@pytest.mark.skipif(attention.xformers_obstacle(CUDA) is not None, reason="needs CUDA and xformers")
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
