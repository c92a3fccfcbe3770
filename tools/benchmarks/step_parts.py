"""Where the time of one of our training steps goes, by part, and what memory a step takes.

The product's own functions and modules are marked during one profiled, uncompiled step. An operation belongs to the
part that it runs in; one of the backward pass to that of the forward operation with its autograd sequence number.
"""

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile, record_function  # torch.profiler takes seconds to start
from torch.autograd.profiler_util import EventList, FunctionEvent

import mpp.objective.objective
import mpp.pretraining.step
import mpp.training.loop
from mpp.objective.objective import MaskedPatchPrediction
from mpp.training.timing import MEASURING, synchronise

PARTS: tuple[str, ...] = ("corruption", "normalisation", "patch embedding", "attention", "MLP", "norms")
PARTS += ("head and loss", "figures", "clipping", "optimiser", "rest")
"""figures: accuracies and baselines of the log; rest: residual sums, position embeddings, the host's own work."""
_MARK = "mpp part: "
_BACKWARD = "autograd::engine::evaluate_function: "


def time_by_part(run: Callable[[], object], model: MaskedPatchPrediction, device: torch.device) -> dict[str, float]:
    """Seconds of one call of `run`, a training step of `model`, by `PARTS`; uncompiled.

    On the CPU they sum to the step's time. On CUDA they are the kernels' times, and the device's idle time between them
    is in none of them.
    """
    with MEASURING, marked(model), torch.compiler.set_stance("force_eager"):
        run()  # the eager form may not have run before
        events = _profiled(run, device).function_events
    assert events is not None
    return _by_part(events, device.type == "cuda")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that `run` holds at any time above what was held before it, as torch's allocators count it."""
    gc.collect()  # what lies about of earlier work would be freed meanwhile, and lower the peak
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    done: Any = _profiled(run, device, memory=True)
    changes = [event for event in done.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def _profiled(run: Callable[[], object], device: torch.device, memory: bool = False) -> profile:
    where = device.type if device.type == "cuda" else None
    done = profile(use_device=where, profile_memory=memory)
    # A process has one profiler, whose library says that it starts and stops, whatever its log level.
    sys.stderr.flush()
    stderr = os.dup(2)
    with MEASURING, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with done:
                with record_function(f"{_MARK}rest"):
                    run()
                synchronise(device)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    return done


@contextlib.contextmanager
def marked(model: MaskedPatchPrediction) -> Iterator[None]:
    """The parts of `model`'s training step show in a profile while this is open."""
    vit: Any = model.encoder.vit
    places: list[tuple[Any, str, str]] = [
        (mpp.pretraining.step, "draw", "corruption"),
        (mpp.objective.objective, "corrupt", "corruption"),
        (model.normalise, "forward", "normalisation"),
        (vit.patch_embed, "forward", "patch embedding"),
        (model.head, "forward", "head and loss"),
        (type(model.target), "of", "head and loss"),
        (type(model.target), "loss", "head and loss"),
        (type(model), "_figures", "figures"),
        (mpp.training.loop, "clip_gradients", "clipping"),
    ]
    inside = {id(module) for block in vit.blocks for part in (block.attn, block.mlp) for module in part.modules()}
    places += [(block.attn, "forward", "attention") for block in vit.blocks]
    places += [(block.mlp, "forward", "MLP") for block in vit.blocks]
    norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm) and id(module) not in inside]
    places += [(module, "forward", "norms") for module in norms]
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(_marked(owner, name, part))
        yield


@contextlib.contextmanager
def _marked(owner: Any, name: str, part: str) -> Iterator[None]:
    """Calls of one function are in `part`."""
    function, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{_MARK}{part}"):
            return function(*args, **kwargs)

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, function) if own else delattr(owner, name)


def _by_part(events: EventList, cuda: bool) -> dict[str, float]:
    """Seconds of all operations by part: of their kernels on CUDA, else their own time on the CPU."""
    found = sorted(
        (e for e in events if e.device_type.name == "CPU" and not e.is_async), key=lambda e: e.time_range.start
    )
    forward: dict[int, str] = {}
    for event in found:
        # Of several operations with one number the last made the node: the number then goes up.
        if event.sequence_nr >= 0 and _backward(event) is None:
            forward[event.sequence_nr] = _part(event) or "rest"
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in found:
        node = _backward(event)
        part = _part(event, node)
        if node is not None and part is None:
            part = forward.get(node.sequence_nr)
        if cuda:
            taken = 0.0 if event.is_user_annotation else sum(kernel.duration for kernel in event.kernels)
        else:
            taken = event.self_cpu_time_total if part or node is not None else 0.0
        seconds[part or "rest"] += taken / 1e6
    return seconds


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent


def _backward(event: FunctionEvent) -> FunctionEvent | None:
    """The node of the backward pass that an operation is of."""
    return next((at for at in _ancestors(event) if at.name.startswith(_BACKWARD)), None)


def _part(event: FunctionEvent, below: FunctionEvent | None = None) -> str | None:
    """The innermost marked part that an operation runs in, looking up to `below`."""
    for at in _ancestors(event):
        if at is below:
            return None
        if at.name.startswith(_MARK):
            return at.name.removeprefix(_MARK)
        if at.name.startswith("Optimizer.step#"):
            return "optimiser"
    return None
