"""Hybrids against timm's own, the original stem against formulas and the authors' code, and init_args."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from mpp.errors import UserError
from mpp.weights.base import build
from mpp.weights.numerics import Numerics, OriginalStdConv2d, create_hybrid, read_init_args, write_init_args
from tests.weights.models import HYBRID

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
R50 = "vit_base_r50_s16_224"


@pytest.mark.slow
@pytest.mark.parametrize(("units", "name"), [((2, 2, 2, 2), "vit_small_r26_s32_224"), ((3, 4, 9), R50)])
def test_it_is_timms_hybrid_of_these_units(units: tuple[int, ...], name: str) -> None:
    theirs = timm.create_model(name, **SMALL).eval()
    ours = create_hybrid(R50, units, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-5, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 5)])
@pytest.mark.parametrize(("side", "stride"), [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
def test_its_convolution_is_the_formula(side: int, stride: int, size: tuple[int, int], scale: float) -> None:
    """(w - mean) / (std + 1e-5), and XLA's "SAME": ceil(size / stride) outputs, the odd pad at the end."""
    torch.manual_seed(0)
    conv = OriginalStdConv2d(3, 4, side, stride, bias=False)
    conv.weight.data = scale * torch.randn_like(conv.weight)
    x = torch.randn(2, 3, *size)
    flat = conv.weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, correction=0, keepdim=True) + 1e-5)
    pads = []
    for length in (x.shape[3], x.shape[2]):
        total = max((-(-length // stride) - 1) * stride + side - length, 0)
        pads += [total // 2, total - total // 2]
    expected = F.conv2d(F.pad(x, pads), flat.reshape(conv.weight.shape), stride=stride)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_the_original_stem_replaces_every_convolution_and_epsilon() -> None:
    stem: Any = build(replace(HYBRID, image_hw=(64, 64))).patch_embed.backbone
    assert {type(m) for m in stem.modules() if isinstance(m, torch.nn.Conv2d)} == {OriginalStdConv2d}
    assert {m.eps for m in stem.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}


def test_init_args_are_read_as_they_were_written() -> None:
    args, numerics = {"mlp_ratio": 8 / 3, "class_token": False}, Numerics(1e-12, True, (2, 1))
    assert read_init_args(write_init_args(args, numerics)) == (args, numerics)
    assert (write_init_args({}, Numerics()), read_init_args(())) == ((), ({}, Numerics()))
    for wrong in ("mlp_ratio", "mlp_ratio=a"):
        with pytest.raises(UserError, match=r"init_args: .* is not a name, = and a JSON value"):
            read_init_args([wrong])
