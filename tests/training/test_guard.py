"""A loss or gradient that is not finite stops the run before anything is spoilt, saved or shown by it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mpp.errors import Unreachable
from mpp.training import loop
from mpp.training.loop import FiniteGuard, NonFinite, State, fit
from mpp.training.schedule import Schedule
from tests.training.test_loop import BATCH, TOTAL, Batch, batches, examples, fresh, rate, step, through_a_file


def spoiled(value: float, at: int, micro: int, accumulate: int) -> Callable[[nn.Module, Batch], Any]:
    """The step, with a loss of `value` in one micro-batch of update `at`."""
    count = iter(range(10**6))

    def run(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = step(model, batch)
        return (loss * value if next(count) == (at - 1) * accumulate + micro else loss), figures

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    value: float, micro: int, scaled: bool
) -> None:
    state = fresh(ema=0.7, scaler=GradScaler("cpu", init_scale=8.0) if scaled else None)
    before: list[Any] = []
    schedule = Schedule(TOTAL, BATCH, 3, rate)
    every = [(1, lambda state: before.append(through_a_file(state)))]
    with pytest.raises(NonFinite, match="not finite at step 4") as caught:
        fit(state, state.model, batches(accumulate=3), spoiled(value, 4, micro, 3), schedule, every)
    assert caught.value.step == 4
    assert state.images_seen == 3 * BATCH
    for part in ("model", "ema", "meter"):
        torch.testing.assert_close(state.state_dict()[part], before[-1][part], rtol=0, atol=0)
    torch.testing.assert_close(state.optimizer.state_dict()["state"], before[-1]["optimizer"]["state"], rtol=0, atol=0)


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

    more: dict[str, Any] = {
        "each step": {"every": [(1, see)]},
        "some steps": {"every": [(4, see)]},
        "the end": {"every": [(0, see)]},
        "a request to stop": {"stop_requested": lambda: state.images_seen == failed * BATCH},
        "no answer": {},
    }[way]
    schedule, failing = Schedule(TOTAL, BATCH, 1, rate), spoiled(math.nan, failed, 0, 1)
    with pytest.raises(NonFinite, match=f"not finite at step {failed}$"):
        fit(state, state.model, read(), failing, schedule, save=see, **more)
    assert max(seen) < failed
    assert way != "each step" or seen == list(range(failed))
