"""Losses and gradients that are not finite, without and with a loss scaler: nothing of them is kept, saved or shown."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, AdamW

from mpp.errors import Unreachable
from mpp.training import loop
from mpp.training.loop import FiniteGuard, NonFinite, State, fit
from mpp.training.optim import build_ema, build_optimizer, parameter_groups
from mpp.training.schedule import Schedule
from mpp.training.settings import OptimConfig
from mpp.training.sharded import clip_gradients
from tests.training.test_loop import (
    BATCH,
    TOTAL,
    Batch,
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
SCHEDULE = Schedule(STEPS, BATCH, 1, lambda _: rate(0) / 1000)
Spoil = Callable[[Tensor], Tensor]
SPOILS: dict[str, Spoil] = {
    "NaN": lambda loss: loss * math.nan,
    "infinite": lambda loss: loss * math.inf,
    "infinite, of finite gradients": lambda loss: loss + math.inf,
}


def spoiled(spoil: Spoil, at: int, accumulate: int = 1, micro: int = 0) -> Callable[[nn.Module, Batch], Any]:
    """The step, with a loss that is spoilt in one micro-batch of update `at`."""
    count = iter(range(10**6))

    def run(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = step(model, batch)
        return (spoil(loss) if next(count) == (at - 1) * accumulate + micro else loss), figures

    return run


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
@pytest.mark.parametrize(("accumulate", "micro"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    spoil: Spoil, accumulate: int, micro: int, scaled: bool
) -> None:
    state = fresh(ema=0.7, scaler=GradScaler("cpu", init_scale=8.0) if scaled else None)
    before: list[Any] = []
    schedule = Schedule(TOTAL, BATCH, accumulate, rate)
    every = [(1, lambda state: before.append(through_a_file(state)))]
    with pytest.raises(NonFinite, match="not finite at step 4") as caught:
        fit(state, state.model, batches(accumulate=accumulate), spoiled(spoil, 4, accumulate, micro), schedule, every)
    assert caught.value.step == 4
    assert state.images_seen == 3 * BATCH
    for part in ("model", "ema", "meter"):
        torch.testing.assert_close(state.state_dict()[part], before[-1][part], rtol=0, atol=0)
    torch.testing.assert_close(state.optimizer.state_dict()["state"], before[-1]["optimizer"]["state"], rtol=0, atol=0)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert not any(g.isfinite().any() for g in gradients)  # so that a fused kernel skips the update by itself


class LateGuard(FiniteGuard):
    """Says of an update whether it was finite when the next one is looked at, as on CUDA."""

    late: tuple[bool, int] | None = None

    def check(self, value: Tensor, number: int) -> None:
        finite = bool(value.isfinite())
        self._optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.found_inf = torch.tensor(float(not finite))  # pyright: ignore[reportAttributeAccessIssue]
        self.settle()
        self.late = finite, number

    def settle(self) -> None:
        late, self.late = self.late, None
        if late is not None and not late[0]:
            raise NonFinite(late[1])


@pytest.mark.parametrize("failed", [1, 4, TOTAL])
@pytest.mark.parametrize("way", ["each step", "some steps", "the end", "a request to stop", "no answer"])
def test_nothing_sees_a_state_before_it_is_known_to_be_finite(
    way: str, failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FiniteGuard", LateGuard)
    state, seen = fresh(ema=0.7), [0]

    def see(state: State) -> None:
        seen.append(state.images_seen // BATCH)
        assert all(value.isfinite().all() for value in state.model.state_dict().values())

    def read() -> Iterator[Batch]:
        for number in range(TOTAL):
            if way == "no answer" and number == failed:
                raise Unreachable("gone")
            yield examples(number * BATCH)

    periods = {"each step": 1, "some steps": 4, "the end": 0}
    more: dict[str, Any] = {"every": [(periods[way], see)]} if way in periods else {}
    if way == "a request to stop":
        more = {"stop_requested": lambda: state.images_seen == failed * BATCH}
    schedule, failing = Schedule(TOTAL, BATCH, 1, rate), spoiled(SPOILS["NaN"], failed)
    with pytest.raises(NonFinite, match=f"not finite at step {failed}$"):
        fit(state, state.model, read(), failing, schedule, save=see, **more)
    assert max(seen) < failed
    assert way != "each step" or seen == list(range(failed))


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
    groups, own = parameter_groups(model, 0.1), {"momentum": 0.9} if name == "sgd" else {}
    if fused:
        optimizer = build_optimizer(groups, OptimConfig(name))
    else:
        optimizer = KINDS[name](groups, lr=0.0, fused=False, foreach=False, **own)
    return State(model, optimizer, build_ema(model, DECAY), GradScaler("cpu", init_scale=TOO_LARGE, growth_interval=3))


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
        torch.testing.assert_close([*state.ema.module.parameters()] if state.ema else [], averages[done - 1])
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


def test_updates_that_all_overflow_end_the_run() -> None:
    """Each halves the scale, and skips: without an end the run would go on to its last step, and learn nothing."""
    state, saved = fresh(scaler=GradScaler("cpu", init_scale=2.0**-17)), []
    initial = weights(state)
    for p in state.model.parameters():
        p.register_hook(lambda gradient: gradient * math.inf)
    every = [(1, lambda state: saved.append(state.images_seen // BATCH))]
    with pytest.raises(NonFinite, match="gradients overflow even at a loss scale of 5e-07 at step 4"):
        fit(state, state.model, batches(), step, SCHEDULE, every)
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
