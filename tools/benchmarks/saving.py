"""python tools/bench.py saving: for how long training stops to save itself, beside writing the same state at once.

By the product's own `Saving`: a copy to host memory, which training waits for, and a thread that writes it.
"""

import tempfile
from pathlib import Path

import torch
from torch.optim import Adam

from benchmarks.settings import SavingBench
from mpp.dist import World
from mpp.errors import RunError
from mpp.model.settings import ModelConfig
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig
from mpp.training.checkpoint import Checkpoints
from mpp.training.loop import State
from mpp.training.parallel import choose_device
from mpp.training.saving import Saving
from mpp.training.schedule import Schedule
from mpp.training.timing import hardware, seconds_a_call, spread, timed


def saving(config: SavingBench) -> int:
    """Measures and prints seconds; returns the exit code.

    Raises:
        UserError: a model or device that is not there.
        RunError: no room to write.
    """
    device = choose_device(config.device, World(), "device")
    state = _state(config.model, device)
    print(hardware())
    try:
        with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
            stops, behind, at_once, size = _measure(state, Path(folder), config.repeats, device)
    except OSError as error:
        raise RunError(f"cannot write to {config.folder or tempfile.gettempdir()}: {error.strerror}") from error
    print(
        f"{config.model} with Adam's moments, {size / 1e9:.2f} GB, from {device}; median (least to most) of "
        f"{config.repeats}, in turns\n"
    )
    print(f"  training stops, first save of all    {stops[0]:.3g} s, which takes its memory from the system")
    print(f"  training stops, later                {spread(stops[1:], ' s')}")
    print(f"  until it is on disk                  {spread(behind[1:], ' s')}")
    print(f"  written at once                      {spread(at_once[1:], ' s')}")
    return 0


def _state(name: str, device: torch.device) -> State:
    """A run's state after its first step."""
    model = build_model(PretrainConfig(model=ModelConfig(name)), device)
    state = State(model, Adam(model.parameters(), fused=True))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state


def _measure(
    state: State, folder: Path, repeats: int, device: torch.device
) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of the first and the later stops, until each is on disk, of writing at once; bytes of a checkpoint."""
    whole, beside = Checkpoints(folder / "at_once", keep_last=1), Checkpoints(folder / "beside", keep_last=1)
    schedule = Schedule(2 + repeats, 1, 1, lambda step: 0.0)
    stops: list[float] = []
    behind: list[float] = []
    at_once: list[float] = []
    with Saving(schedule, beside, lambda: None, None) as save:
        for step in range(1, 2 + repeats):
            state.images_seen = step
            stops.append(seconds_a_call(lambda: save(state), device))
            behind.append(stops[-1] + timed(save.wait)[1])
            at_once.append(timed(lambda step=step: whole.save(step, state.state_dict()))[1])
    return stops, behind, at_once, beside.path(1 + repeats).stat().st_size
