"""What other libraries' steps are timed with."""

import re
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks import peers
from benchmarks.step_sides import timm_model
from torch import Tensor, nn

from mpp.errors import install
from tests.benchmarks.tiny import SETTING, TINY


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for make in peers.PEERS.values():
        with pytest.raises(peers.Missing, match=re.escape(f"is not installed: {install('bench')}")):
            make(SETTING)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: types)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "1.16.1")
    with pytest.raises(
        peers.Missing, match=r"MPP of vit-pytorch 1\.16\.1 may crash: pip install vit-pytorch==1\.15\.7"
    ):
        peers.vit_pytorch(SETTING)


def test_vit_pytorch_has_our_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that notes what it is asked for; the real one is an extra."""
    asked: dict[str, dict[str, Any]] = {}

    class ViT(nn.Module):
        def __init__(self, **told: Any) -> None:
            super().__init__()
            asked["vit"] = told
            self.transformer = nn.Linear(1, 1)

    class MPP(nn.Module):
        def __init__(self, transformer: nn.Module, **told: Any) -> None:
            super().__init__()
            asked["mpp"] = told
            self.transformer = transformer

        def forward(self, images: Tensor) -> Tensor:
            asked["images"] = {"shape": tuple(images.shape), "low": images.min() >= 0, "high": images.max() <= 1}
            return self.transformer.transformer(images.mean().view(1, 1)).sum()

    for name, content in (("vit_pytorch", {"ViT": ViT}), ("vit_pytorch.mpp", {"MPP": MPP})):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: types)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: peers.VIT_PYTORCH)
    peers.vit_pytorch(SETTING).run()
    sizes = {"dim": 48, "depth": 2, "heads": 3, "dim_head": 16, "mlp_dim": 192, "image_size": 32, "patch_size": 8}
    assert asked["vit"] == {**sizes, "num_classes": 1000, "channels": 3}
    assert asked["images"] == {"shape": (2, 3, 32, 32), "low": True, "high": True}
    side = peers.vit_pytorch_default(replace(SETTING, precision="bf16", compile="on"))
    assert (side.setting.precision, side.compiled) == ("fp32", False)
    assert type(side.optimizer) is torch.optim.Adam
    assert not side.optimizer.defaults["fused"]


@pytest.mark.slow
@pytest.mark.parametrize("title", list(peers.PEERS))
def test_the_libraries_themselves_make_steps(title: str) -> None:
    pytest.importorskip("vit_pytorch" if title.startswith("vit-pytorch") else "transformers")
    side = peers.PEERS[title](SETTING)
    before = [parameter.clone() for parameter in side.model.parameters()]
    side.run()
    changed = [not torch.equal(old, new) for old, new in zip(before, side.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    # A block has as many weights as timm's, but for the biases of queries, keys and values in vit-pytorch.
    deeper = replace(SETTING, model=replace(TINY, depth=3))
    of_block = _weights(peers.PEERS[title](deeper).model) - _weights(side.model)
    assert of_block == pytest.approx(_weights(timm_model(deeper.model)) - _weights(timm_model(TINY)), abs=3 * 48)


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
