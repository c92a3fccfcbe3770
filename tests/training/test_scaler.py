"""Training under a loss scaler, as fp16 needs it: from a first update that overflows to recovery, and resumed."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from mpp.training.loop import NonFinite, State, fit
from mpp.training.optim import build_ema, build_optimizer, parameter_groups
from mpp.training.schedule import Schedule
from mpp.training.settings import OptimConfig
from mpp.training.sharded import clip_gradients
from tests.training.test_loop import (
    BATCH,
    batches,
    examples,
    fresh,
    rate,
    step,
    through_a_file,
    train,
    weights,
)

KINDS: dict[str, Any] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
STEPS, TOO_LARGE, DECAY = 12, 2.0**121, 0.7


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Memory that is allocated and not yet written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def overflowing(name: str, fused: bool) -> State:
    """A state whose first updates overflow, and, since the scale soon grows again, later ones, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    groups = parameter_groups(model, 0.1)
    optimizer = build_optimizer(groups, OptimConfig(name)) if fused else _plain(name, groups)
    assert optimizer.defaults["fused"] == fused
    return State(model, optimizer, build_ema(model, DECAY), GradScaler("cpu", init_scale=TOO_LARGE, growth_interval=3))


def _plain(name: str, groups: list[dict[str, object]]) -> Optimizer:
    own = {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999), "eps": 1e-8}
    return KINDS[name](groups, lr=0.0, fused=False, foreach=False, **own)


def steep(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss, figures = step(model, batch)
    return 1000 * loss, figures


def written_out(name: str) -> tuple[list[list[Tensor]], list[list[Tensor]], list[bool]]:
    """The same training without scaler and fused kernels: weights and averages after each step, and what is skipped."""
    state = overflowing(name, fused=False)
    scale, since, average = TOO_LARGE, 0, None
    after, averages, skipped = [], [], []
    for number in range(STEPS):
        x, y = examples(number * BATCH)
        loss = 1000 * (state.model(x) - y).square().mean(dim=1).mean()
        gradients = torch.autograd.grad(loss * scale, list(state.model.parameters()))
        skipped.append(not all(g.isfinite().all() for g in gradients))
        if skipped[-1]:
            scale, since = scale / 2, 0
        else:
            for p, g in zip(state.model.parameters(), gradients, strict=True):
                p.grad = g / scale
            for group in state.optimizer.param_groups:
                group["lr"] = rate(0) / 1000
            state.optimizer.step()
            scale, since = (scale * 2, 0) if since == 2 else (scale, since + 1)
        now = weights(state)
        average = [DECAY * a + (1 - DECAY) * w for a, w in zip(average, now, strict=True)] if average else now
        after.append(now)
        averages.append(average)
    return after, averages, skipped


def averaged(state: State) -> list[Tensor]:
    assert state.ema is not None
    return [p.detach().clone() for p in state.ema.module.parameters()]


SCHEDULE = Schedule(STEPS, BATCH, 1, lambda _: rate(0) / 1000)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_overflows_leave_no_trace_in_weights_moments_and_average(name: str, fused: bool) -> None:
    after, averages, skipped = written_out(name)
    assert skipped[:2] == [True, True]
    assert True in skipped[skipped.index(False) :]
    state, saved = overflowing(name, fused), []

    def compare(state: State) -> None:
        done = state.images_seen // BATCH
        torch.testing.assert_close(weights(state), after[done - 1])
        torch.testing.assert_close(averaged(state), averages[done - 1])
        for moments in state.optimizer.state.values():
            assert all(value.isfinite().all() for value in moments.values())
            assert moments.get("step", done - sum(skipped[:done])) == done - sum(skipped[:done])
        saved.append(through_a_file(state))

    fit(state, state.model, batches(), steep, SCHEDULE, [(1, compare)])
    assert len(saved) == STEPS
    for before in (saved[0], saved[skipped.index(False)]):  # the first update was skipped; the first was made
        resumed = overflowing(name, fused)
        resumed.load_state_dict(before)
        fit(resumed, resumed.model, batches(resumed.images_seen), steep, SCHEDULE)
        torch.testing.assert_close(resumed.state_dict(), state.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("name", KINDS)
def test_an_update_that_the_guard_lets_the_kernel_skip_leaves_moments_that_are_none(name: str) -> None:
    """As on CUDA without a scaler, where the guard itself sets `found_inf`."""
    state: Any = overflowing(name, fused=True)
    before = weights(state)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    for p in state.model.parameters():
        p.grad = torch.full_like(p, math.nan)
    state.optimizer.grad_scale, state.optimizer.found_inf = None, torch.ones(())
    state.optimizer.step()
    torch.testing.assert_close(weights(state), before, rtol=0, atol=0)
    moments = [value for one in state.optimizer.state.values() for value in one.values()]
    assert moments
    assert not any(value.any() for value in moments)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_loss_that_is_not_finite_is_not_stepped_on_even_if_its_gradients_are(scaled: bool) -> None:
    """In fp16 the logit of the right class may overflow: its loss is infinite, the gradients are not."""
    state = fresh(scaler=GradScaler("cpu", init_scale=8.0) if scaled else None)

    def infinite(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = step(model, batch)
        return loss + (math.inf if state.images_seen == BATCH else 0.0), figures

    every = [(1, lambda state: kept.append(weights(state)))]
    kept: list[list[Tensor]] = []
    with pytest.raises(NonFinite, match="not finite at step 2"):
        fit(state, state.model, batches(), infinite, SCHEDULE, every)
    torch.testing.assert_close(weights(state), kept[-1], rtol=0, atol=0)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert not any(g.isfinite().any() for g in gradients)  # so that a fused kernel skips the update by itself


def test_updates_that_all_overflow_end_the_run() -> None:
    """Each halves the scale, and skips: without an end the run would go on to its last step, and learn nothing."""

    class Steepest(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0] * math.inf

    def overflows(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = step(model, batch)
        return Steepest.apply(loss), figures

    state, saved = fresh(scaler=GradScaler("cpu", init_scale=2.0**-17)), []
    initial = weights(state)
    every = [(1, lambda state: saved.append(state.images_seen // BATCH))]
    with pytest.raises(NonFinite, match="gradients overflow even at a loss scale of 5e-07 at step 4"):
        fit(state, state.model, batches(), overflows, SCHEDULE, every)
    assert saved == [1, 2, 3]
    torch.testing.assert_close(weights(state), initial, rtol=0, atol=0)


def test_gradients_whose_norm_overflows_stay_as_they_are_without_clipping() -> None:
    model = nn.Linear(2, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e30)
    assert clip_gradients(model, 0.0) == math.inf
    assert all((p.grad == 1e30).all() for p in model.parameters() if p.grad is not None)


def test_scaling_by_a_power_of_two_changes_no_bits() -> None:
    scaled = train(fresh(scaler=GradScaler("cpu", init_scale=1024.0)), clip=0.1)
    torch.testing.assert_close(weights(scaled), weights(train(fresh(), clip=0.1)), rtol=0, atol=0)
