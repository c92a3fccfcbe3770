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
from mpp.training.saving import Saving
from mpp.training.schedule import Schedule
from tests import runs
from tests.training import small_net

SCHEDULE = Schedule(10, 4, 1, lambda step: 0.1)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(folder: Path, device: str = "cpu", saved_step: int | None = None) -> tuple[State, Saving, list[list[int]]]:
    """A state, its saving, and for each flush of rows the checkpoints that there were."""
    checkpoints, flushes = Checkpoints(folder, keep_last=9), []
    model = nn.Linear(3, 2, device=device)
    save = Saving(SCHEDULE, checkpoints, lambda: flushes.append(checkpoints.steps()), saved_step)
    return State(model, torch.optim.Adam(model.parameters())), save, flushes


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
    state, save, flushes = run(tmp_path, device, saved_step=0)
    paused = PausedWriting(monkeypatch)
    with save:
        save(state)  # of a step that is saved already
        change(state, 1.0)
        save(state)
        assert paused.begun.wait(10)
        assert save.checkpoints.steps() == []
        change(state, 2.0)
        paused.go.set()
        save(state)
        save(state)
        change(state, 3.0)
    assert save.checkpoints.steps() == [1, 2]
    assert [weight(save.checkpoints.path(step)) for step in (1, 2)] == [1.0, 2.0]
    assert flushes == [[], [1]]  # rows come first, and a save waits for the one before it


def full(path: Path, content: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("then", ["save", "end", "stop", "error"])
def test_a_failed_write_is_raised_at_the_next_save_the_end_or_the_stop_but_hides_no_error(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_write", full)
    state, save, _ = run(tmp_path)

    def train() -> None:
        with save:
            change(state, 1.0)
            save(state)
            deadline = time.monotonic() + 10
            while not save.failed:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            if then == "save":
                change(state, 2.0)
                save(state)
                pytest.fail("another state was saved")
            if then in ("stop", "error"):
                raise Interrupted if then == "stop" else NonFinite(3)

    text = (
        "step 3"
        if then == "error"
        else r"cannot write the checkpoint .*: No space left on device; there is no checkpoint yet"
    )
    with pytest.raises(NonFinite if then == "error" else RunError, match=text):
        train()
    assert list(tmp_path.iterdir()) == []


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
