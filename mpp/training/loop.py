"""The training loop. It knows no model: a step gives loss and figures of a batch, the loop does the rest.

Progress is one number, images seen; learning rate, sampler position and every random draw derive from it, so a state
that was saved and loaded goes on in the same bits.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from mpp import dist
from mpp.data.sources.contents import Contents
from mpp.errors import RunError, Unreachable
from mpp.system.process import GENERATORS, handle
from mpp.training.meter import Clock, Meter
from mpp.training.optim import MovingAverage
from mpp.training.parallel import gradient_sync
from mpp.training.schedule import Schedule, is_due
from mpp.training.sharded import clip_gradients, is_sharded

EXIT_REQUEUE = 75
"""Exit status of a run that was asked to stop and saved itself: EX_TEMPFAIL, "try again"."""
_MIN_SCALE = 2.0**-20  # of the loss: where fp16 gradients overflow even at this scale, the run is lost

Step = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]
"""step(model, batch) -> loss (a scalar) and figures (each a sum and a count)."""


@dataclass
class State:
    """All that a run is, beside its config: what is saved and restored.

    Attributes:
        contents: of what it trains on, for a resume to compare.
        attention: kernel and device of attention, as `settle_kernel` gives it; a resume goes on with it.
    """

    model: nn.Module
    optimizer: Optimizer
    ema: MovingAverage | None = None
    scaler: GradScaler | None = None
    meter: Meter = field(default_factory=Meter)
    clock: Clock = field(default_factory=Clock)
    images_seen: int = 0
    contents: Contents | None = None
    attention: str = ""

    @property
    def sharded(self) -> bool:
        """Whether each rank has its share of the tensors only."""
        return is_sharded(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, without times; for all ranks to call together.

        The tensors are those of the run itself, of a sharded one this rank's shards.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meter": dist.gather(self.meter.state_dict()),
            "images_seen": self.images_seen,
            "contents": self.contents.to_dict() if self.contents else None,
            "attention": self.attention or None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, as copies: it may be a mapped file.

        Raises KeyError, ValueError or RuntimeError for a state of another model or optimiser.
        """
        self.model.load_state_dict(state["model"])
        # The moments are the run's, their options the config's: a forced resume may change those.
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for moments in self.optimizer.state.values():  # on the CPU, torch takes them as they are
            moments.update(
                {k: v.clone() for k, v in moments.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
            )
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if self.ema is not None and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:  # a moving average that the run did not have before starts at its weights
            self.ema.module.load_state_dict(state["model"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], next(self.model.parameters()).device)
        self.images_seen = state["images_seen"]
        # Checkpoints that lack it are of a time when a CPU computed by sdpa alone.
        self.attention = state.get("attention", "sdpa cpu") or ""


class Interrupted(Exception):
    """The run was asked to stop and has saved itself."""


class NonFinite(RunError):
    """A loss or gradient that is not a number, in the update of number `step`."""

    def __init__(self, step: int, what: str = "the loss is not finite") -> None:
        super().__init__(f"{what} at step {step}")
        self.step = step


Every = tuple[int, Callable[[State], None]]
"""A period in steps and what is done then, and once more after the last step."""


def fit(
    state: State,
    model: nn.Module,
    batches: Iterator[Any],
    step: Step,
    schedule: Schedule,
    every: Sequence[Every] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    save: Callable[[State], object] = lambda state: None,
    each_step: Sequence[Callable[[State], None]] = (),
) -> None:
    """Train from `state.images_seen` to the end of the schedule.

    Args:
        state: restored or fresh; changed in place.
        model: what `step` calls: `state.model` itself, compiled or wrapped for data parallelism.
        batches: this rank's micro-batches, from `state.images_seen` on.
        every: called in this order after each step that is due, and was finite.
        stop_requested: asked after each step; if any rank says yes, the state is saved and `Interrupted` raised, of
            several ranks after the next step where steps are short (see `dist.Poll`).
        each_step: called after each step, before those of `every`. On CUDA the step may still turn out not to have
            been finite, so these must neither save nor show the state.

    Raises:
        Interrupted: after a requested stop.
        Unreachable: what the batches are read from gives no answer; one process alone has saved its state.
        NonFinite: a loss or gradient that is not finite; the weights are those before that update.
    """
    guard, poll = FiniteGuard(state), dist.Poll()
    state.clock.begin(state.images_seen)
    for done in range(schedule.step(state.images_seen), schedule.total_steps):
        rate = schedule.rate(done)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        try:
            update(state, model, batches, step, schedule, guard, done + 1)
        except Unreachable:  # nothing has changed since the last step; of several ranks only all together could save
            guard.judge(done)
            if dist.rank_and_size()[1] == 1:
                save(state)
            raise
        state.images_seen += schedule.batch_size
        for function in each_step:
            function(state)
        for period, function in every:
            if is_due(done + 1, period, schedule.total_steps):
                guard.judge(done + 1)
                function(state)
        if done + 1 < schedule.total_steps and poll(stop_requested()):
            guard.judge(done + 1)
            save(state)
            raise Interrupted
    guard.judge(schedule.total_steps)


def update(
    state: State,
    model: nn.Module,
    batches: Iterator[Any],
    step: Step,
    schedule: Schedule,
    guard: "FiniteGuard",
    number: int,
) -> None:
    """Make one optimiser update from `schedule.accumulate` micro-batches."""
    state.optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    counted: list[Mapping[str, Tensor]] = []
    for micro in range(schedule.accumulate):
        began = time.perf_counter()
        batch = next(batches)
        state.clock.waited(time.perf_counter() - began)
        # Dropout draws from global generators, which a block that runs again in the backward pass sets back for itself.
        with GENERATORS, gradient_sync(model, on=micro == schedule.accumulate - 1):
            loss, figures = step(model, batch)
            # Times 1, or NaN: the gradients of a loss that is not finite may be, and must show it, on all ranks.
            share = (1 + 0 * loss.detach()) / schedule.accumulate
            loss.backward(state.scaler.scale(share) if state.scaler else share)
        del batch  # or its images would lie beside those of the next
        losses.append(loss.detach())
        counted.append(figures)
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    norm = clip_gradients(state.model, schedule.clip_norm)
    # With a scaler an infinite gradient is a matter of the scale, which is then lowered; the loss must be finite.
    guard.check(dist.sum_over_ranks(torch.stack(losses).sum()) if state.scaler else norm, number)
    for figures in counted:  # only now: an update that breaks off must leave the state as it was
        state.meter.add(figures)
    if state.scaler:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        # Counted once by all ranks together, so that an interval weighs its steps alike when their number changes.
        share = torch.ones_like(norm, dtype=torch.float64) / dist.rank_and_size()[1]
        state.meter.add({"grad_norm": torch.stack([norm.double() * share, share])})
        state.optimizer.step()
    if state.ema is not None:
        state.ema.update_parameters(state.model)


def read_figures(state: State, schedule: Schedule) -> dict[str, float]:
    """Return mean figures since the last reading, epoch, learning rate and times; for all ranks to call together."""
    seen = state.images_seen
    figures = state.meter.read()
    figures["epoch"] = seen / schedule.epoch_images
    figures["lr"] = schedule.rate(schedule.step(seen) - 1)
    return figures | state.clock.read(seen, schedule.total_steps * schedule.batch_size)


class FiniteGuard:
    """Stops the run at a value that is not finite, before the update that it would spoil.

    On CUDA a fused optimiser skips that update on the device, and the host learns of it one step later, so that nobody
    waits for the device.
    """

    def __init__(self, state: State) -> None:
        self._optimizer, self._scaler = state.optimizer, state.scaler
        self._skips = self._scaler is not None or bool(state.optimizer.defaults.get("fused"))
        self._pending: tuple[Tensor, torch.cuda.Event, int] | None = None

    def check(self, value: Tensor, number: int) -> None:
        """Check the loss or gradient norm of update `number`; raises NonFinite of it, or on CUDA of the one before."""
        if value.device.type != "cuda" or not self._skips:
            if not math.isfinite(value.item()):
                raise NonFinite(number)
            return
        finite = torch.isfinite(value)
        if self._scaler is None:
            self._optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
            self._optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.settle()
        event = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps, and leaves the core to workers
        copy = finite.to("cpu", non_blocking=True)
        event.record()
        self._pending = (copy, event, number)

    def judge(self, number: int) -> None:
        """Wait for the device until the state after update `number` may be saved and shown.

        Raises NonFinite of this update, or for a loss scale so low that no gradient is going to be finite.
        """
        self.settle()
        if self._scaler is not None and self._scaler.get_scale() < _MIN_SCALE:
            raise NonFinite(number, f"gradients overflow even at a loss scale of {self._scaler.get_scale():.0e}")

    def settle(self) -> None:
        """Wait for the verdict on the update checked last."""
        if self._pending is not None:
            finite, event, number = self._pending
            self._pending = None
            event.synchronize()
            if not finite.item():
                raise NonFinite(number)


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 and the first Ctrl-C until the step in progress is done (see `handle`)."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.restore = handle(self.SIGNALS, self._remember)
        """Puts the earlier handlers back."""

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def status(self) -> int:
        """The exit status of a process that stops for it: 130 after Ctrl-C, else 75; 0 if nothing was received."""
        return {None: 0, signal.SIGINT: 130}.get(self.received, EXIT_REQUEUE)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
