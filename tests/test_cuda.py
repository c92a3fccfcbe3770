"""What only a CUDA device can show: the fused optimiser's guard, the kernels and precisions end to end."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpp.cli import pretrain
from mpp.model.attention import xformers_obstacle
from mpp.training.loop import NonFinite, State, fit
from mpp.training.optim import build_optimizer, parameter_groups
from mpp.training.parallel import DTYPES
from mpp.training.schedule import Schedule
from mpp.training.settings import OptimConfig
from tests import runs

CUDA = torch.device("cuda", 0)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WAYS = [*itertools.product(("bf16", "fp16"), ("auto", "xformers", "sdpa", "explicit"), ("off", "on"))]
SLOW = [way for way in WAYS if way[2] == "on" and way[:2] != ("bf16", "auto")]  # compiling takes long


@pytest.mark.parametrize(
    ("precision", "attention", "compiled"),
    [pytest.param(*way, marks=[pytest.mark.slow] if way in SLOW else []) for way in WAYS],
)
def test_a_run_learns_and_resumes(precision: str, attention: str, compiled: str, tmp_path: Path) -> None:
    obstacle = compiled == "on" and runs.compile_obstacle()
    obstacle = obstacle or (attention == "xformers" and xformers_obstacle(CUDA, DTYPES[precision], width=16))
    if obstacle:
        pytest.skip(obstacle)
    changed = {"train__device": "cuda", "train__precision": precision, "train__compile": compiled}
    changed |= {"model__attention": attention, "data__workers": "2"}
    source = runs.write_images(tmp_path / "images")
    for length in ("30 steps", "60 steps"):
        words = runs.command(source, tmp_path / "run", "--resume", "force", train__length=length, **changed)
        if compiled == "on":  # in a process of its own: the type checks of these tests cannot be compiled
            runs.finish(words)
        else:
            assert pretrain(words[1:]) == 0
    losses = [row["loss"] for row in runs.figures(tmp_path / "run") if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("failed", [1, 4])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_its_step_is_not_saved(name: str, failed: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3, device="cuda")
    state = State(model, build_optimizer(parameter_groups(model, 0.0), OptimConfig(name)))
    saved: list[int] = []
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = [initial]

    def step(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch).square().mean(), {}

    def batches() -> Iterator[Tensor]:
        for number in range(8):
            yield torch.full((4, 5), math.nan if number == failed - 1 else 1.0, device="cuda")

    def note(state: State) -> None:
        seen.append({name: value.clone() for name, value in state.model.state_dict().items()})

    every = [(1, lambda state: saved.append(state.images_seen // 4))]
    with pytest.raises(NonFinite, match=f"not finite at step {failed}"):
        fit(state, model, batches(), step, Schedule(8, 4, 1, lambda _: 0.1), every, each_step=[note])
    assert saved == list(range(1, failed))
    assert all(value.isfinite().all() for weights in seen for value in weights.values())
    assert all(value.isfinite().all() for moments in state.optimizer.state.values() for value in moments.values())
    torch.testing.assert_close(seen[failed], seen[failed - 1], rtol=0, atol=0)
