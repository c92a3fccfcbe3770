"""What other libraries' steps are timed with."""

import re
import types
from dataclasses import replace

import pytest
import torch
from benchmarks import peers
from benchmarks.step_sides import timm_model
from torch import nn

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


@pytest.mark.slow
@pytest.mark.parametrize("title", list(peers.PEERS))
def test_the_libraries_themselves_make_steps(title: str) -> None:
    pytest.importorskip("vit_pytorch" if title.startswith("vit-pytorch") else "transformers")
    side = peers.PEERS[title](replace(SETTING, precision="bf16"))
    assert side.setting.precision == ("fp32" if "defaults" in title else "bf16")
    before = [parameter.clone() for parameter in side.model.parameters()]
    side.run()
    changed = [not torch.equal(old, new) for old, new in zip(before, side.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    # A block has as many weights as timm's, but for the biases of queries, keys and values in vit-pytorch.
    deeper = replace(SETTING, model=replace(TINY, depth=3))
    of_block = weights(peers.PEERS[title](deeper).model) - weights(side.model)
    assert of_block == pytest.approx(weights(timm_model(deeper.model)) - weights(timm_model(TINY)), abs=3 * 48)


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
