"""How long training stops to save a large model, beside writing it at once: figures, no limits (see them by -s)."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpp.config import parse
from mpp.parts import build_model
from mpp.recipes import PretrainConfig
from mpp.train.checkpoint import Checkpoints, load_checkpoint
from mpp.train.loop import Schedule, State
from mpp.train.saving import Saving


class Silent:
    def say(self, text: str) -> None: ...
    def flush(self) -> None: ...


@pytest.fixture
def all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_training_stops_for_the_copy_alone(tmp_path: Path) -> None:
    """ViT-L/16, from the second save on with Adam's moments (3.6 GB): prints the seconds of each save."""
    words = ["--model.name", "vit_large_patch16_224", "--model.img_size", "224", "--data.source", "demo"]
    model = build_model(parse(PretrainConfig, [*words, "--run_dir", str(tmp_path)], "", "", {}), "cpu")
    state = State(model, torch.optim.Adam(model.parameters(), fused=True))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    stopped, written = [], []
    with Saving(Schedule(9, 1, 1, lambda step: 0.0), checkpoints, Silent(), None) as save:
        for _ in range(4):
            began = time.perf_counter()
            save(state)
            stopped.append(time.perf_counter() - began)
            save.wait()
            written.append(time.perf_counter() - began)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.images_seen += 1
    began = time.perf_counter()
    path = checkpoints.save(4, state.state_dict())
    at_once = time.perf_counter() - began
    print(f"\n{path.stat().st_size / 1e9:.2f} GB: written at once {at_once:.1f} s")
    print(
        f"training stops {', '.join(f'{s:.2f}' for s in stopped)} s, on disk {', '.join(f'{s:.1f}' for s in written)} s"
    )
    torch.testing.assert_close(load_checkpoint(path)["model"], dict(model.state_dict()))
