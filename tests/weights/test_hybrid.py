"""Hybrids against timm's own, and the original stem against formulas and the authors' code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from mpp.weights.base import build
from mpp.weights.hybrid import OriginalStdConv2d, create_hybrid, use_original_stem
from mpp.weights.jax_npz import read_jax_npz

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
NAMED = [
    ((), "vit_tiny_r_s16_p8_224", 4),
    ((2, 2, 2, 2), "vit_small_r26_s32_224", 1),
    ((3, 4, 9), "vit_base_r50_s16_224", 1),
]


@pytest.mark.parametrize(("units", "name", "patch"), NAMED, ids=[name for _, name, _ in NAMED])
def test_it_is_timms_hybrid_of_these_units(units: tuple[int, ...], name: str, patch: int) -> None:
    theirs = timm.create_model(name, patch_size=patch, **SMALL).eval()
    ours = create_hybrid(units, patch_size=patch, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


def test_five_stages_have_stride_64() -> None:
    model: Any = create_hybrid((1, 1, 1, 1, 1), **(SMALL | {"img_size": 128}))
    assert model.patch_embed.grid_size == (2, 2)
    assert model.patch_embed.proj.in_channels == 4096


def by_formula(x: torch.Tensor, kernel: torch.Tensor, stride: int) -> torch.Tensor:
    """(w - mean) / (std + 1e-5), and XLA's "SAME": ceil(size / stride) outputs, the odd pad at the end."""
    flat = kernel.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, correction=0, keepdim=True) + 1e-5)
    side = kernel.shape[-1]
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), flat.reshape(kernel.shape), stride=stride)


@pytest.mark.parametrize("scale", [1e-5, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 5)])
@pytest.mark.parametrize(("side", "stride"), [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
def test_its_convolution_is_the_formula(side: int, stride: int, size: tuple[int, int], scale: float) -> None:
    torch.manual_seed(0)
    conv = OriginalStdConv2d(3, 4, side, stride, bias=False)
    conv.weight.data = scale * torch.randn_like(conv.weight)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(conv(x), by_formula(x, conv.weight, stride), rtol=1e-5, atol=1e-5)


def test_the_original_stem_keeps_parameters_and_replaces_every_convolution_and_epsilon() -> None:
    model = create_hybrid((1, 1), **SMALL)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    use_original_stem(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    stem: Any = model.patch_embed.backbone
    assert {type(m) for m in stem.modules() if isinstance(m, torch.nn.Conv2d)} == {OriginalStdConv2d}
    assert {m.eps for m in stem.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}


def test_it_trains() -> None:
    model = create_hybrid((1, 1), **SMALL)
    use_original_stem(model)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_its_maps_are_the_authors(shared: Callable[[str], Path]) -> None:
    model: Any = build(read_jax_npz(shared("fixtures/hybrid_params.npz"))).eval()
    given = np.load(shared("fixtures/hybrid_io.npz"))
    stem = model.patch_embed.backbone
    # gn_root is before its ReLU and max pool; timm's norm has the ReLU in it.
    maps: dict[str, torch.Tensor] = {}
    watched = {"gn_root": stem.stem.norm.drop, "block1": stem.stages[0], "block2": stem.stages[1]}
    for name, module in watched.items():
        # Cloned: the ReLU that comes next works in place.
        module.register_forward_hook(lambda _, __, out, name=name: maps.update({name: out.clone()}))
    with torch.no_grad():
        stem(torch.from_numpy(given["image"][:2]).permute(0, 3, 1, 2))
    for name in watched:
        expected = given[f"mid/{name}"]
        # These maps are not normalised, and reach 10.
        tolerance = 1e-5 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            maps[name].permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=tolerance, err_msg=name
        )
