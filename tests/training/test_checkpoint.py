"""Checkpoints, whole and sharded, through crashes, full disks and foreign files; they load everywhere, run no code."""

import errno
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mpp.errors import RunError, UserError
from mpp.training import shard_files
from mpp.training.checkpoint import Checkpoints, _replace, load_checkpoint
from mpp.training.saving import Saving
from mpp.training.tensor_tree import like_these
from tests import runs
from tests.training.small_net import SCHEDULE, build, gathered, save, train


def state(step: int) -> dict[str, Any]:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    return {"model": {"weights": weights}, "images_seen": 8 * step, "lr": 0.1 * step, "ema": None}


def test_the_latest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new" / "folder", keep_last=9)
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    for step in (9, 100, 20):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [9, 20, 100]
    latest = checkpoints.latest()
    assert latest == checkpoints.path(100)
    runs.assert_same(load_checkpoint(latest), state(100))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [7]), (2, 0, [6, 7]), (9, 0, [*range(8)]), (2, 3, [0, 3, 6, 7]), (3, 4, [0, 4, 5, 6, 7]), (1, 9, [0, 7])],
)
def test_the_newest_are_kept_and_every_so_many_for_good(
    keep_last: int, keep_every: int, kept: list[int], tmp_path: Path
) -> None:
    others = [tmp_path / name for name in ("notes.txt", "step_1.pt", "best.pt", "step_000000001.pt.bak")]
    for path in others:
        path.write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep_last, keep_every)
    for step in range(8):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == kept
    assert {*tmp_path.iterdir()} == {*others, *map(checkpoints.path, kept)}


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, unlink = Checkpoints(tmp_path, keep_last=1), Path.unlink
    first = checkpoints.save(0, state(0))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == first:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    for step in (1, 2):
        (tmp_path / f"step_{9 - step:09d}.tmp").write_bytes(b"of a run that was killed while writing")
        checkpoints.save(step, state(step))
        assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, f"step_{step:09d}.pt"]


class Killed(BaseException):
    """The end of the process, as far as nothing after it runs."""


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_crash_at_any_moment_of_writing_leaves_the_last_good_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    good = checkpoints.save(1, state(1))

    def die(*arguments: Any, **_: Any) -> None:
        if moment == "save":
            arguments[1].write(b"half a checkpoint")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch if moment == "save" else os, moment, die)
        with pytest.raises(Killed):
            checkpoints.save(2, state(2))
    assert checkpoints.latest() == good
    runs.assert_same(load_checkpoint(good), state(1))
    assert [*tmp_path.iterdir()] != [good]  # half of the second one, which goes with the next save
    assert [checkpoints.save(3, state(3))] == [*tmp_path.iterdir()]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a)))
    Checkpoints(tmp_path).save(1, state(1))
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_folder_that_cannot_be_replaced_is_the_earlier_one_still(tmp_path: Path) -> None:
    old, new = tmp_path / "step_000000000", tmp_path / "step_000000000.tmp"
    for path in (old, new, tmp_path / "step_000000000.old.tmp"):
        path.mkdir()
        (path / "file").write_text(path.name)
    _replace(new, old)
    assert (old / "file").read_text() == new.name
    with pytest.raises(FileNotFoundError):
        _replace(new, old)
    assert (old / "file").read_text() == new.name


class Full(io.FileIO):
    """A file on a disk with room for 1000 bytes more."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def full(*_: Any) -> None:
    """Fail as torch's writer does on a full disk."""
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0") from None


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("form", ["first", "file", "folder"])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_one(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(build(form == "folder"), 1)
    good = [] if form == "first" else [save(run, tmp_path)]
    run.images_seen += 4
    monkeypatch.setattr(Path, "open", lambda self, mode: Full(self, mode))
    monkeypatch.setattr(shard_files.filesystem.FileSystemWriter, "write_data", full)
    with pytest.raises(RunError) as caught:
        save(run, tmp_path)
    last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
    path = tmp_path / ("step_000000002" if form == "folder" else "step_000000002.pt")
    reason = os.strerror(errno.ENOSPC)
    todo = "make room and run the same command again"
    assert str(caught.value) == f"cannot write the checkpoint {path}: {reason}; {last}; {todo}"
    assert list(tmp_path.glob("step_*")) == good


def refused(path: Path, reason: str = "truncated or not a checkpoint") -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert reason in message
    assert "choose another run_dir" in message


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_in_one_line(share: float, tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, state(1))
    os.truncate(path, int(share * path.stat().st_size))
    refused(path)


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


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    description = pickle.loads((folder / ".metadata").read_bytes())
    change(description)
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def bytes_instead(folder: Path, proof: Path) -> None:
    """Mark a tensor as an object, which torch's own planner would unpickle from its file."""
    torch.save(Trap(proof), folder / "trap.distcp")

    def change(description: Any) -> None:
        name = next(iter(description.state_dict_metadata))
        description.state_dict_metadata[name] = shard_files.metadata.BytesStorageMetadata()
        size = (folder / "trap.distcp").stat().st_size
        info = shard_files.filesystem._StorageInfo("trap.distcp", 0, size)
        description.storage_data[shard_files.metadata.MetadataIndex(name)] = info

    edit(folder, change)


TRAPS: dict[str, Callable[[Path, Path], object]] = {
    "the description itself": lambda at, proof: (at / ".metadata").write_bytes(pickle.dumps(Trap(proof))),
    "inside the description": lambda at, proof: edit(at, lambda found: setattr(found, "planner_data", Trap(proof))),
    "an object for a tensor": bytes_instead,
    "the rest": lambda at, proof: torch.save(Trap(proof), at / "plain.pt"),
    "a shard": lambda at, proof: torch.save(Trap(proof), at / "__0_0.distcp"),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_code_in_a_folder_never_runs(trap: Callable[[Path, Path], object], tmp_path: Path) -> None:
    path, proof = save(train(build(True), 1), tmp_path), tmp_path / "it ran"
    trap(path, proof)
    refused(path)
    assert not proof.exists()


@pytest.mark.parametrize("form", ["pickle", "torch", "inside a checkpoint"])
def test_code_in_a_file_never_runs(form: str, tmp_path: Path) -> None:
    path, proof = tmp_path / "step_000000001.pt", tmp_path / "it ran"
    trap = Trap(proof)
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap if form == "torch" else {"format": "mpp checkpoint 1", "state": {"model": trap}}, path)
    refused(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # the trap works where it is not guarded against


def outside(folder: Path) -> None:
    def change(description: Any) -> None:
        for info in description.storage_data.values():
            info.relative_path = f"../{info.relative_path}"

    edit(folder, change)


SPOILT: dict[str, Callable[[Path], object]] = {
    "no description": lambda at: (at / ".metadata").unlink(),
    "no rest": lambda at: (at / "plain.pt").unlink(),
    "no shards": lambda at: (at / "__0_0.distcp").unlink(),
    "torn shards": lambda at: os.truncate(at / "__0_0.distcp", (at / "__0_0.distcp").stat().st_size // 2),
    "torn description": lambda at: os.truncate(at / ".metadata", 100),
    "empty": lambda at: (shutil.rmtree(at), at.mkdir()),
    "shards elsewhere": outside,
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_truncated_or_foreign_folder_is_refused_in_one_line(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    path = save(train(build(True), 1), tmp_path)
    spoil(path)
    refused(path)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("saved", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("loaded", [False, True], ids=["whole", "sharded"])
def test_any_checkpoint_loads_into_any_run(saved: bool, loaded: bool, tmp_path: Path) -> None:
    before = train(build(saved), 3)
    path = save(before, tmp_path)
    assert path.is_dir() == saved
    after = build(loaded)
    like = like_these(after.model, after.optimizer, after.ema) if loaded else None
    after.load_state_dict(load_checkpoint(path, like))
    loaded_state, saved_state = gathered(after.state_dict()), gathered(before.state_dict())
    for found in (loaded_state, saved_state):
        del found["optimizer"]["param_groups"]  # which are the config's
    runs.assert_same(loaded_state, saved_state)
    assert after.images_seen == 12
    ends = [gathered(train(one).state_dict())["model"] for one in (after, train(build(False)))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_folders_come_and_go_as_files_do(tmp_path: Path) -> None:
    checkpoints, run = Checkpoints(tmp_path / "run", keep_last=1, keep_every=2), train(build(True), 1)
    stale = checkpoints.folder / "step_000000004.tmp"
    stale.mkdir(parents=True)
    (stale / ".metadata").write_bytes(b"of a run that was killed")
    with Saving(SCHEDULE, checkpoints, lambda: None, None) as saving:
        for number in range(1, 6):
            run.images_seen = 4 * number
            saving(run)
    assert checkpoints.steps() == [2, 4, 5]
    assert {*checkpoints.folder.iterdir()} == {*map(checkpoints.path, (2, 4, 5))}


@pytest.mark.usefixtures("group")
def test_another_model_is_refused_by_its_shapes(tmp_path: Path) -> None:
    path = save(train(build(True), 1), tmp_path)
    other = build(False)
    other.model.register_parameter("position", nn.Parameter(torch.zeros(1, 5, 4)))
    with pytest.raises(RuntimeError, match="size mismatch for position"):
        other.load_state_dict(load_checkpoint(path))


def test_a_file_system_that_maps_no_files_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Checkpoints(tmp_path).save(1, state(1))
    real, modes = torch.load, []

    def load(*args: Any, mmap: bool = False, **kwargs: Any) -> Any:
        modes.append(mmap)
        if mmap:
            raise RuntimeError(f"unable to mmap 4096 bytes from file <{path}>: No such device (19)")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    runs.assert_same(load_checkpoint(path), state(1))
    assert modes == [True, False]
