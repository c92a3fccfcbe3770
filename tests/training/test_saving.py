"""Saving beside training: on disk is the state of the moment of the save, and nobody goes before it is there."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpp.errors import RunError
from mpp.training import checkpoint
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.loop import Interrupted, NonFinite, State
from mpp.training.saving import HostCopy, Saving
from mpp.training.schedule import Schedule
from tests import runs
from tests.training import small_net

SCHEDULE = Schedule(10, 4, 1, lambda step: 0.1)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Rows:
    """A journal that notes which checkpoints there were when it was flushed."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.before: list[list[int]] = []

    def flush(self) -> None:
        self.before.append(self.checkpoints.steps())


def run(folder: Path, resumed: int | None = None, device: str = "cpu") -> tuple[State, Saving, Rows]:
    checkpoints = Checkpoints(folder, keep_last=9)
    model = nn.Linear(3, 2, device=device)
    rows = Rows(checkpoints)
    return State(model, torch.optim.Adam(model.parameters())), Saving(SCHEDULE, checkpoints, rows.flush, resumed), rows


def change(state: State, value: float) -> None:
    with torch.no_grad():
        state.model.get_parameter("weight").fill_(value)
    state.images_seen += 4


def weight(path: Path) -> float:
    return float(load_checkpoint(path)["model"]["weight"][0, 0])


class PausedWriting:
    """Writing that waits until it may."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        real = checkpoint._write

        def write(path: Path, content: Any) -> None:
            self.begun.set()
            assert self.go.wait(10)
            real(path, content)

        patch.setattr(checkpoint, "_write", write)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def test_the_state_of_the_moment_is_saved_whatever_training_does_then(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, save, rows = run(tmp_path, device=device)
    paused = PausedWriting(monkeypatch)
    with save:
        change(state, 1.0)
        save(state)
        assert paused.begun.wait(10)
        assert save.checkpoints.steps() == []
        change(state, 2.0)
        paused.go.set()
        save(state)
        change(state, 3.0)
    assert save.checkpoints.steps() == [1, 2]
    assert [weight(save.checkpoints.path(step)) for step in (1, 2)] == [1.0, 2.0]
    assert rows.before == [[], [1]]  # rows come first, and a save waits for the one before it


def test_the_buffers_are_used_again() -> None:
    copy, model = HostCopy(), nn.Linear(3, 2)
    first, second = (copy({"model": model.state_dict(), "step": step}) for step in (1, 2))
    assert (first["step"], second["step"]) == (1, 2)
    assert first["model"]["weight"].data_ptr() == second["model"]["weight"].data_ptr()
    assert first["model"]["weight"].data_ptr() != model.weight.data_ptr()
    assert torch.equal(first["model"]["weight"], model.weight)
    model = nn.Linear(5, 2)
    assert torch.equal(copy({"model": model.state_dict()})["model"]["weight"], model.weight)


@pytest.mark.parametrize("resumed", [None, 1])
def test_a_step_is_saved_once(resumed: int | None, tmp_path: Path) -> None:
    state, save, rows = run(tmp_path, resumed)
    with save:
        change(state, 1.0)
        save(state)
        save(state)
    assert len(rows.before) == (resumed is None)
    assert save.checkpoints.steps() == ([1] if resumed is None else [])


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write", write)


def fail(save: Saving, state: State) -> None:
    change(state, 1.0)
    save(state)
    deadline = time.monotonic() + 10
    while not save.failed:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("then", ["save", "end", "stop"])
def test_a_failed_write_is_raised_at_the_next_save_the_end_or_the_stop(then: str, tmp_path: Path) -> None:
    state, save, _ = run(tmp_path)

    def train() -> None:
        with save:
            fail(save, state)
            if then == "save":
                change(state, 2.0)
                save(state)
                pytest.fail("another state was saved")
            if then == "stop":
                raise Interrupted

    with pytest.raises(RunError, match=r"cannot write the checkpoint .*: No space left on device; there is no"):
        train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full")
def test_an_error_that_ends_the_run_is_not_hidden_by_a_failed_write(tmp_path: Path) -> None:
    state, save, _ = run(tmp_path)

    def train() -> None:
        with save:
            fail(save, state)
            raise NonFinite(3)

    with pytest.raises(NonFinite):
        train()


def test_an_error_waits_for_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, save, _ = run(tmp_path)
    paused = PausedWriting(monkeypatch)
    threading.Timer(0.2, paused.go.set).start()

    def train() -> None:
        with save:
            change(state, 1.0)
            save(state)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert save.checkpoints.steps() == [1]


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_resumed_state_is_its_own_whatever_becomes_of_the_file(optimiser: str, tmp_path: Path) -> None:
    before = small_net.train(small_net.build(sharded=False, optimiser=optimiser))
    path = small_net.save(before, tmp_path)
    after = small_net.build(sharded=False, optimiser=optimiser)
    content = load_checkpoint(path)
    mapped = content["model"]["head.weight"]
    after.load_state_dict(content)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert not mapped.any()  # its bytes are the file's
    after.images_seen = before.images_seen = 0
    runs.assert_same(small_net.train(after).state_dict(), small_net.train(before).state_dict())
