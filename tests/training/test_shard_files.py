"""Sharded checkpoints load everywhere, run no code, and are refused in one line."""

import enum
import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpp.errors import RunError, UserError
from mpp.training import shard_files
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.saving import Saving
from tests import runs
from tests.training.small_net import SCHEDULE, Silent, build, gathered, save, train


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("saved", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("loaded", [False, True], ids=["whole", "sharded"])
def test_any_checkpoint_loads_into_any_run(saved: bool, loaded: bool, tmp_path: Path) -> None:
    before = train(build(saved), 3)
    path = save(before, tmp_path)
    assert path.is_dir() == saved
    after = build(loaded)
    after.load_state_dict(load_checkpoint(path, after.like))
    loaded_state, saved_state = gathered(after.state_dict()), gathered(before.state_dict())
    for state in (loaded_state, saved_state):
        del state["optimizer"]["param_groups"]  # which are the config's
    runs.assert_same(loaded_state, saved_state)
    assert after.images_seen == 12
    ends = [gathered(train(state).state_dict())["model"] for state in (after, train(build(False)))]
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_folders_come_and_go_as_files_do(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path / "run", keep_last=1, keep_every=2), train(build(True), 1)
    stale = checkpoints.folder / "step_000000004.tmp"
    stale.mkdir(parents=True)
    (stale / ".metadata").write_bytes(b"of a run that was killed")

    with Saving(SCHEDULE, checkpoints, Silent(), None) as saving:
        for number in range(1, 6):
            state.images_seen = 4 * number
            saving(state)
    assert checkpoints.steps() == [2, 4, 5]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [checkpoints.path(n).name for n in (2, 4, 5)]


@pytest.mark.usefixtures("group")
def test_a_full_disk_is_one_line_and_leaves_the_last_good_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = train(build(True), 1)
    good = save(state, tmp_path)
    state.images_seen += 4

    def full(*_: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None

    monkeypatch.setattr(shard_files.filesystem.FileSystemWriter, "write_data", full)
    with pytest.raises(RunError) as caught:
        save(state, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"step_000000002: {os.strerror(errno.ENOSPC)}; the last good checkpoint is {good}" in message
    assert list(tmp_path.glob("step_*")) == [good]


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    with (folder / ".metadata").open("rb") as file:
        told = pickle.load(file)
    change(told)
    (folder / ".metadata").write_bytes(pickle.dumps(told))


def bytes_instead(folder: Path, proof: Path) -> None:
    """Marks a tensor as an object, which torch's own planner would unpickle from its file."""
    torch.save(Trap(proof), folder / "trap.distcp")

    def change(told: Any) -> None:
        name = next(iter(told.state_dict_metadata))
        told.state_dict_metadata[name] = shard_files.metadata.BytesStorageMetadata()
        size = (folder / "trap.distcp").stat().st_size
        info = shard_files.filesystem._StorageInfo("trap.distcp", 0, size)
        told.storage_data[shard_files.metadata.MetadataIndex(name)] = info

    edit(folder, change)


TRAPS: dict[str, Callable[[Path, Path], object]] = {
    "the description itself": lambda at, proof: (at / ".metadata").write_bytes(pickle.dumps(Trap(proof))),
    "inside the description": lambda at, proof: edit(at, lambda told: setattr(told, "planner_data", Trap(proof))),
    "an object for a tensor": bytes_instead,
    "the rest": lambda at, proof: torch.save(Trap(proof), at / "plain.pt"),
    "a shard": lambda at, proof: torch.save(Trap(proof), at / "__0_0.distcp"),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_code_in_a_folder_never_runs(trap: Callable[[Path, Path], object], tmp_path: Path) -> None:
    path, proof = save(train(build(True), 1), tmp_path), tmp_path / "it ran"
    trap(path, proof)
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)
    assert not proof.exists()


def by_getattr(folder: Path, member: Callable[[enum.Enum], tuple[Any, str]]) -> None:
    """Writes the description as Python 3.11.0 to 3.11.3 do: members of enumerations by getattr."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            return (getattr, member(obj)) if isinstance(obj, enum.Enum) else NotImplemented

    told = pickle.loads((folder / ".metadata").read_bytes())
    with (folder / ".metadata").open("wb") as file:
        Pickler(file).dump(told)


@pytest.mark.usefixtures("group")
def test_folders_of_other_pythons_are_read_and_no_attribute_else(tmp_path: Path) -> None:
    state = train(build(True), 1)
    path = save(state, tmp_path)
    by_getattr(path, lambda told: (type(told), told.name))
    runs.assert_same(gathered(load_checkpoint(path)["model"]), gathered(state.state_dict()["model"]))
    by_getattr(path, lambda told: (torch.Size, "numel"))
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def outside(folder: Path) -> None:
    def change(told: Any) -> None:
        for info in told.storage_data.values():
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
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"cannot read the checkpoint {path}: it is truncated or not a checkpoint; ")


@pytest.mark.usefixtures("group")
def test_another_model_is_told_by_its_shapes(tmp_path: Path) -> None:
    path = save(train(build(True), 1), tmp_path)
    other = build(False)
    other.model.register_parameter("position", nn.Parameter(torch.zeros(1, 5, 4)))
    with pytest.raises(RuntimeError, match="size mismatch for position"):
        other.load_state_dict(load_checkpoint(path, other.like))
