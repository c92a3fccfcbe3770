"""The loop against a hand-written one, and itself when it is stopped and resumed anywhere."""

import io
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mpp.training.loop import Interrupted, State, StopSignal, fit
from mpp.training.optim import build_ema, build_optimizer, parameter_groups
from mpp.training.schedule import Schedule
from mpp.training.settings import OptimConfig

TOTAL, BATCH = 8, 12
Batch = tuple[Tensor, Tensor]


def rate(step: int) -> float:
    return 0.05 * (1 - step / TOTAL)


def fresh(ema: float = 0.0, dtype: torch.dtype = torch.float32, scaler: GradScaler | None = None) -> State:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    optimizer = build_optimizer(parameter_groups(model, 0.1), OptimConfig("adamw"))
    return State(model, optimizer, build_ema(model, ema), scaler)


def examples(seen: int, dtype: torch.dtype = torch.float32) -> Batch:
    """The global batch that starts at `seen` images."""
    generator = Generator().manual_seed(seen)
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(BATCH, 3, generator=generator, dtype=torch.float64).to(dtype)


def batches(seen: int = 0, accumulate: int = 1, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
    """Endless micro-batches from `seen` images on."""
    while True:
        x, y = examples(seen, dtype)
        yield from zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)
        seen += BATCH


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    error = (model(batch[0]) - batch[1]).square().mean(dim=1)
    return error.mean(), {
        "loss": torch.stack([error.detach().double().sum(), torch.tensor(float(len(error))).double()])
    }


def train(state: State, accumulate: int = 1, clip: float = 0.0, **more: Any) -> State:
    dtype = next(state.model.parameters()).dtype
    schedule = Schedule(TOTAL, BATCH, accumulate, rate, clip)
    fit(state, state.model, batches(state.images_seen, accumulate, dtype), step, schedule, **more)
    return state


def weights(state: State) -> list[Tensor]:
    return [p.detach().clone() for p in state.model.parameters()]


def by_hand(clip: float, steps: int = TOTAL) -> tuple[list[Tensor], list[float], list[float]]:
    """Weights, losses and gradient norms of the same training, written out with torch."""
    state, losses, norms = fresh(), [], []
    for number in range(steps):
        x, y = examples(number * BATCH)
        loss = nn.functional.mse_loss(state.model(x), y)
        gradients = torch.autograd.grad(loss, list(state.model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for p, g in zip(state.model.parameters(), gradients, strict=True):
            p.grad = g * min(1.0, clip / norm) if clip else g
        for group in state.optimizer.param_groups:
            group["lr"] = rate(number)
        state.optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return weights(state), losses, norms


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e3])
def test_fit_equals_a_hand_written_loop(clip: float) -> None:
    state = train(fresh(), clip=clip)
    expected, losses, norms = by_hand(clip)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if clip else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights(state), expected, **tolerance)
    figures = {"loss": sum(losses) / TOTAL, "grad_norm": sum(norms) / TOTAL}  # norms before clipping
    assert state.meter.read() == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_accumulation_equals_the_whole_batch(accumulate: int) -> None:
    whole, parts = (train(fresh(dtype=torch.float64), n, clip=0.1) for n in (1, accumulate))
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-12)
    assert parts.meter.read() == pytest.approx(whole.meter.read())


def test_trainings_in_two_threads_draw_what_each_draws_alone() -> None:
    def draws(state: State, seed: int) -> list[float]:
        drawn: list[float] = []

        def drops(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            torch.manual_seed(seed)
            time.sleep(0.001)  # another thread would seed now
            drawn.append(float(torch.rand(())))
            return step(model, batch)

        fit(state, state.model, batches(), drops, Schedule(TOTAL, BATCH, 1, rate))
        return drawn

    alone = [draws(fresh(), seed) for seed in (1, 2)]
    states = [fresh(), fresh()]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(draws, states, (1, 2))) == alone


def through_a_file(state: State) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def interrupted_after(steps: int, **settings: Any) -> dict[str, Any]:
    """The state saved by a run that was asked to stop after so many steps."""
    state, saved = fresh(**settings), []
    if steps == 0:
        return through_a_file(state)
    with pytest.raises(Interrupted):
        train(
            state,
            stop_requested=lambda: state.images_seen == steps * BATCH,
            save=lambda state: saved.append(through_a_file(state)),
        )
    assert len(saved) == 1
    return saved[0]


@pytest.mark.parametrize("steps", range(TOTAL))
def test_a_run_resumed_after_any_step_ends_in_the_same_bits(steps: int) -> None:
    whole, resumed = train(fresh(ema=0.7)), fresh(ema=0.7)
    resumed.load_state_dict(interrupted_after(steps, ema=0.7))
    assert resumed.images_seen == steps * BATCH
    train(resumed)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.meter.read() == whole.meter.read()


def test_an_average_that_the_saved_run_did_not_have_starts_at_its_weights() -> None:
    state = fresh(ema=0.7)
    state.load_state_dict(interrupted_after(3))
    assert state.ema is not None
    torch.testing.assert_close(state.ema.module.state_dict(), state.model.state_dict(), rtol=0, atol=0)


def test_functions_are_called_in_order_at_due_steps_and_at_the_end() -> None:
    calls: list[tuple[str, int]] = []

    def note(name: str) -> Callable[[State], None]:
        return lambda state: calls.append((name, state.images_seen // BATCH))

    state = fresh()  # asked to stop during its last step, it just ends
    stop = {"stop_requested": lambda: state.images_seen == TOTAL * BATCH, "save": note("save")}
    train(state, every=[(3, note("a")), (0, note("end")), (7, note("b"))], **stop)
    assert calls == [("a", 3), ("a", 6), ("b", 7), ("a", 8), ("end", 8), ("b", 8)]


def test_a_signal_stops_the_loop_after_its_step_and_its_functions(stop: StopSignal) -> None:
    state, calls = fresh(), []

    def killed(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if state.images_seen == BATCH:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, batch)

    every = [(1, lambda state: calls.append(("every", state.images_seen // BATCH)))]
    save = lambda state: calls.append(("save", state.images_seen // BATCH))  # noqa: E731
    with pytest.raises(Interrupted):
        fit(state, state.model, batches(), killed, Schedule(TOTAL, BATCH, 1, rate), every, stop, save)
    assert calls == [("every", 1), ("every", 2), ("save", 2)]
    torch.testing.assert_close(weights(state), by_hand(0.0, steps=2)[0], rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_images_that_were_learnt_from_are_let_go_of(accumulate: int) -> None:
    state, given = fresh(), []

    def read() -> Iterator[Batch]:
        while True:
            assert [batch for batch in given if batch() is not None] == []
            batch = [part[: BATCH // accumulate].clone() for part in examples(0)]
            given.append(weakref.ref(batch[0]))
            yield batch.pop(0), batch.pop()

    fit(state, state.model, read(), step, Schedule(3, BATCH, accumulate, rate))
    assert len(given) == 3 * accumulate


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    stop = StopSignal()
    yield stop
    stop.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_a_second_ctrl_c_does_not_wait(number: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    stop = StopSignal()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop.received == number
    with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else nullcontext():
        os.kill(os.getpid(), number)
    assert stop()
    stop.restore()
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before
