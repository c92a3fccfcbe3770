"""Checkpoints through crashes, full disks and foreign files."""

import errno
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mpp.errors import RunError, UserError
from mpp.training.checkpoint import Checkpoints, _exchange, load_checkpoint


def state(step: int) -> dict[str, Any]:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    return {"model": {"weights": weights}, "images_seen": 8 * step, "lr": 0.1 * step, "ema": None}


def check(path: Path | None, step: int) -> None:
    """That `path` holds exactly what was saved at `step`."""
    assert path is not None
    loaded, saved = load_checkpoint(path), state(step)
    assert torch.equal(loaded.pop("model")["weights"], saved.pop("model")["weights"])
    assert loaded == saved


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    check(Checkpoints(tmp_path / "new" / "folder").save(3, state(3)), 3)


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "missing")
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)


def test_the_latest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in (9, 100, 20):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [9, 20, 100]
    check(checkpoints.latest(), 100)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [7]),
        (2, 0, [6, 7]),
        (9, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 3, [0, 3, 6, 7]),
        (2, 3, [0, 3, 6, 7]),
        (3, 4, [0, 4, 5, 6, 7]),
        (1, 100, [0, 7]),
    ],
)
def test_the_newest_are_kept_and_every_so_many_for_good(
    keep_last: int, keep_every: int, kept: list[int], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last, keep_every)
    for step in range(8):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoints.path(step).name for step in kept]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("notes.txt", "step_1.pt", "best.pt", "step_000000001.pt.bak")]
    for path in others:
        path.write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [2]
    assert all(path.read_text() == "mine" for path in others)


class Killed(BaseException):
    """The end of the process, as far as nothing after it runs."""


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_crash_at_any_moment_of_writing_leaves_the_last_good_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, state(1))

    def die(*arguments: Any, **_: Any) -> None:
        if moment == "save":
            arguments[1].write(b"half a checkpoint")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch if moment == "save" else os, moment, die)
        with pytest.raises(Killed):
            checkpoints.save(2, state(2))
    check(checkpoints.latest(), 1)
    checkpoints.save(3, state(3))
    check(checkpoints.latest(), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000003.pt"]  # nothing is left of the half one


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a)))
    Checkpoints(tmp_path).save(1, state(1))
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


class Full(io.FileIO):
    """A file on a disk with room for 1000 bytes more."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_one(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    if earlier:
        checkpoints.save(1, state(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Full(self, mode))
        with pytest.raises(RunError) as caught:
            checkpoints.save(2, state(2))
    message = str(caught.value)
    assert "\n" not in message
    assert str(checkpoints.path(2)) in message
    assert os.strerror(errno.ENOSPC) in message
    assert (str(checkpoints.path(1)) if earlier else "there is no checkpoint yet") in message
    assert len(list(tmp_path.iterdir())) == earlier
    if earlier:
        check(checkpoints.latest(), 1)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_in_one_line(share: float, tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, state(1))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "truncated or not a checkpoint")


def refused(path: Path, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert reason in message
    assert "choose another run_dir" in message


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("epoch 3\n" * 100), "not a checkpoint"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "not a checkpoint"),
    "picture": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "not a checkpoint"),
    "missing": (lambda path: None, "not a checkpoint"),
    "folder": (lambda path: path.mkdir(), "not a checkpoint"),
    "a model's weights": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "not a checkpoint of mpp"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "not a checkpoint of mpp"),
    "another format": (lambda path: torch.save({"format": "other 1", "state": {}}, path), "not a checkpoint of mpp"),
    "no state": (lambda path: torch.save({"format": "mpp checkpoint 1"}, path), "not a checkpoint of mpp"),
}


@pytest.mark.parametrize(("write", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_in_one_line(write: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "step_000000001.pt"
    write(path)
    refused(path, reason)


@pytest.mark.parametrize("form", ["pickle", "torch", "inside a checkpoint"])
def test_code_in_a_file_never_runs(form: str, tmp_path: Path) -> None:
    path, proof = tmp_path / "step_000000001.pt", tmp_path / "it ran"
    trap = Trap(proof)
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap if form == "torch" else {"format": "mpp checkpoint 1", "state": {"model": trap}}, path)
    refused(path, "not a checkpoint")
    assert not proof.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # the trap works where it is not guarded against


def test_a_folder_that_cannot_be_replaced_is_the_earlier_one_still(tmp_path: Path) -> None:
    old, new = tmp_path / "step_000000000", tmp_path / "step_000000000.tmp"
    for path in (old, new, tmp_path / "step_000000000.old.tmp"):
        path.mkdir()
        (path / "file").write_text(path.name)
    _exchange(old, new)
    assert (old / "file").read_text() == new.name
    with pytest.raises(FileNotFoundError):
        _exchange(old, new)
    assert (old / "file").read_text() == new.name
