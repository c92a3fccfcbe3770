"""Checkpoints, whole and sharded, through crashes, full disks and foreign files; they load everywhere, run no code."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mpp.errors import RunError, UserError
from mpp.training import checkpoint, shard_files
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.saving import Saving
from mpp.training.tensor_tree import like_these
from tests import runs
from tests.training.small_net import SCHEDULE, build, gathered, save, train


def state(step: int) -> dict[str, Any]:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    return {"model": {"weights": weights}, "images_seen": 8 * step, "lr": 0.1 * step, "ema": None}


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [77]), (2, 0, [66, 77]), (2, 33, [0, 33, 66, 77]), (3, 44, [0, 44, 55, 66, 77]), (1, 99, [0, 77])],
)
def test_the_newest_are_kept_and_every_so_many_for_good(
    keep_last: int, keep_every: int, kept: list[int], tmp_path: Path
) -> None:
    others = [tmp_path / name for name in ("notes.txt", "step_1.pt", "best.pt", "step_000000001.pt.bak")]
    for path in others:
        path.write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep_last, keep_every)
    assert checkpoints.latest() is None
    for step in range(0, 78, 11):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == kept
    assert {*tmp_path.iterdir()} == {*others, *map(checkpoints.path, kept)}
    latest = checkpoints.latest()
    assert latest == checkpoints.path(77)
    runs.assert_same(load_checkpoint(latest), state(77))


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, unlink = Checkpoints(tmp_path, keep_last=1), Path.unlink
    first = checkpoints.save(0, state(0))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == first:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    for step in (1, 2):
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


def full(*_: Any) -> None:
    """Fail as torch's writer does on a full disk."""
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0") from None


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_one(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(build(sharded), 1)
    good = save(run, tmp_path)
    run.images_seen += 4
    monkeypatch.setattr(checkpoint, "_write", full)
    monkeypatch.setattr(shard_files.filesystem.FileSystemWriter, "write_data", full)
    with pytest.raises(RunError) as caught:
        save(run, tmp_path)
    path, reason = tmp_path / ("step_000000002" if sharded else "step_000000002.pt"), os.strerror(errno.ENOSPC)
    todo = f"the last good checkpoint is {good}; make room and run the same command again"
    assert str(caught.value) == f"cannot write the checkpoint {path}: {reason}; {todo}"
    assert list(tmp_path.glob("step_*")) == [good]


class Trap:
    """An object whose unpickling makes the folder `it ran` beside the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint.with_name("it ran")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


class Attribute:
    """An object whose unpickling takes an attribute of what may be named, but is no enum."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (shard_files.metadata.Metadata, "__init__")


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    description = pickle.loads((folder / ".metadata").read_bytes())
    change(description)
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def object_instead(folder: Path) -> None:
    """Mark a tensor as an object, which torch's own planner would unpickle from its file."""
    torch.save(Trap(folder), folder / "trap.distcp")

    def change(description: Any) -> None:
        name = next(iter(description.state_dict_metadata))
        description.state_dict_metadata[name] = shard_files.metadata.BytesStorageMetadata()
        size = (folder / "trap.distcp").stat().st_size
        info = shard_files.filesystem._StorageInfo("trap.distcp", 0, size)
        description.storage_data[shard_files.metadata.MetadataIndex(name)] = info

    edit(folder, change)


def elsewhere(description: Any) -> None:
    for info in description.storage_data.values():
        info.relative_path = f"../{info.relative_path}"


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


FORMAT: dict[str, Any] = {"format": "mpp checkpoint 1"}
FILES: dict[str, Callable[[Path], object]] = {
    **{f"{share} of it": lambda at, share=share: cut(at, share) for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999)},
    "text": lambda at: at.write_text("epoch 3\n" * 100),
    "zeros": lambda at: at.write_bytes(bytes(5000)),
    "picture": lambda at: Image.new("RGB", (9, 9)).save(at, "PNG"),
    "missing": lambda at: at.unlink(),
    "folder": lambda at: (at.unlink(), at.mkdir()),
    "a model's weights": lambda at: torch.save(nn.Linear(2, 2).state_dict(), at),
    "a tensor": lambda at: torch.save(torch.zeros(3), at),
    "another format": lambda at: torch.save({"format": "other 1", "state": {}}, at),
    "no state": lambda at: torch.save(FORMAT, at),
    "pickled code": lambda at: at.write_bytes(pickle.dumps(Trap(at))),
    "saved code": lambda at: torch.save(Trap(at), at),
    "code in the state": lambda at: torch.save(FORMAT | {"state": {"model": Trap(at)}}, at),
}
FOLDERS: dict[str, Callable[[Path], object]] = {
    "no description": lambda at: (at / ".metadata").unlink(),
    "no rest": lambda at: (at / "plain.pt").unlink(),
    "no shards": lambda at: (at / "__0_0.distcp").unlink(),
    "torn shards": lambda at: cut(at / "__0_0.distcp", 0.5),
    "torn description": lambda at: os.truncate(at / ".metadata", 100),
    "empty": lambda at: (shutil.rmtree(at), at.mkdir()),
    "shards elsewhere": lambda at: edit(at, elsewhere),
    "code for a description": lambda at: (at / ".metadata").write_bytes(pickle.dumps(Trap(at))),
    "code in the description": lambda at: edit(at, lambda found: setattr(found, "planner_data", Trap(at))),
    "an attribute in the description": lambda at: edit(at, lambda found: setattr(found, "planner_data", Attribute())),
    "code for a tensor": object_instead,
    "code for the rest": lambda at: torch.save(Trap(at), at / "plain.pt"),
    "code for a shard": lambda at: torch.save(Trap(at), at / "__0_0.distcp"),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("spoil", "sharded"),
    [*((f, False) for f in FILES.values()), *((f, True) for f in FOLDERS.values())],
    ids=[*FILES, *FOLDERS],
)
def test_a_spoilt_or_foreign_checkpoint_is_refused_in_one_line_and_runs_no_code(
    spoil: Callable[[Path], object], sharded: bool, tmp_path: Path
) -> None:
    path = save(train(build(sharded), 1), tmp_path)
    spoil(path)
    with pytest.raises(UserError, match=r"not a checkpoint.*choose another run_dir$") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "it ran").exists()


def test_the_traps_work_where_they_are_not_guarded_against(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "checkpoint")))
    assert (tmp_path / "it ran").exists()


class OldPickler(pickle.Pickler):
    """Pickles the members of an enum as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, obj: object) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


@pytest.mark.usefixtures("group")
def test_a_folder_written_by_an_early_python_3_11(tmp_path: Path) -> None:
    run = train(build(True), 1)
    path = save(run, tmp_path)
    with (path / ".metadata").open("rb") as file:
        description = pickle.load(file)
    with (path / ".metadata").open("wb") as file:
        OldPickler(file, protocol=4).dump(description)
    assert b"getattr" in (path / ".metadata").read_bytes()
    after = build(False)
    after.load_state_dict(load_checkpoint(path))
    runs.assert_same(*(gathered(one.state_dict())["model"] for one in (after, run)))


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
    states = [gathered(one.state_dict()) for one in (after, before)]
    for found in states:
        del found["optimizer"]["param_groups"]  # which are the config's
    runs.assert_same(*states)
    assert after.images_seen == 12
    ends = [gathered(train(one).state_dict())["model"] for one in (after, train(build(False)))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_folders_come_and_go_as_files_do(tmp_path: Path) -> None:
    checkpoints, run = Checkpoints(tmp_path / "run", keep_last=1, keep_every=2), train(build(True), 1)
    for name in ("step_000000004.tmp", "step_000000005", "step_000000005.old.tmp"):  # of a killed and an earlier run
        (checkpoints.folder / name).mkdir(parents=True)
        (checkpoints.folder / name / ".metadata").write_bytes(b"whatever")
    with Saving(SCHEDULE, checkpoints, lambda: None, None) as saving:
        for number in range(1, 6):
            run.images_seen = 4 * number
            saving(run)
    assert checkpoints.steps() == [2, 4, 5]
    assert {*checkpoints.folder.iterdir()} == {*map(checkpoints.path, (2, 4, 5))}
    assert load_checkpoint(checkpoints.path(5))["images_seen"] == 20


def test_a_file_system_that_maps_no_files_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = Checkpoints(tmp_path).save(1, state(1)), torch.load

    def load(*args: Any, mmap: bool = False, **kwargs: Any) -> Any:
        if mmap:
            raise RuntimeError(f"unable to mmap 4096 bytes from file <{path}>: No such device (19)")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    runs.assert_same(load_checkpoint(path), state(1))
