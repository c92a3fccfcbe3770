"""Sharded runs do what whole ones do, and their checkpoints load everywhere."""

import errno
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpp import dist
from mpp.dist import World
from mpp.errors import RunError, UserError
from mpp.train import shard_files
from mpp.train.checkpoint import Checkpoints, load_checkpoint
from mpp.train.config import OptimConfig
from mpp.train.loop import NonFinite, Schedule, State, fit
from mpp.train.optim import build_ema, build_optimizer, parameter_groups
from mpp.train.parallel import gradient_sync, prepare
from mpp.train.saving import Saving
from mpp.train.sharded import shard, whole
from tests import runs

CPU = torch.device("cpu")
SCHEDULE = Schedule(6, 4, 2, lambda step: 0.1, clip_norm=0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes.add(self.linear.weight.dtype)
        return x + self.linear(self.norm(x)).relu()


class Net(nn.Module):
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 1)
        self.register_buffer("offset", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.position)) + self.offset


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, over which a model can be sharded as over many."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.stop()


def build(sharded: bool, optimiser: str = "adamw", precision: str = "fp32", ema: float = 0.5) -> State:
    torch.manual_seed(0)
    model = Net()
    average = build_ema(model, ema)
    if sharded:
        shard(model, CPU, 1, precision)
        if average is not None:
            shard(average.module, CPU, 1, precision)
    config = OptimConfig(name=optimiser)
    return State(model, build_optimizer(parameter_groups(model, 0.1), config), average)


def batches(start: int) -> Iterator[Tensor]:
    for number in range(start // 2, 99):
        yield torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(number))


def step(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=getattr(model, "bf16", False)):
        loss = model(batch).float().square().mean()
    return loss, {"loss": torch.stack([loss.detach().double(), torch.ones((), dtype=torch.float64)])}


def train(state: State, until: int = 6) -> State:
    schedule = Schedule(until, *(SCHEDULE.batch_size, SCHEDULE.accumulate, SCHEDULE.rate, SCHEDULE.clip_norm))
    fit(state, state.model, batches(state.images_seen), step, schedule)
    return state


class Silent:
    def say(self, text: str) -> None: ...
    def flush(self) -> None: ...


def save(state: State, folder: Path) -> Path:
    with Saving(SCHEDULE, Checkpoints(folder), Silent(), None) as saving:
        saving(state)
    latest = saving.checkpoints.latest()
    assert latest is not None
    return latest


def gathered(state: Any) -> Any:
    """The state with whole tensors."""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return state.full_tensor() if isinstance(state, DTensor) else state


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_a_sharded_run_does_what_a_whole_one_does(optimiser: str) -> None:
    one, other = (train(build(sharded, optimiser)) for sharded in (False, True))
    assert all(isinstance(p, DTensor) for p in (*other.model.parameters(), *other.ema.module.parameters()))
    reference, found = gathered(one.state_dict()), gathered(other.state_dict())
    for part in ("model", "ema"):
        assert reference[part].keys() == found[part].keys()
        for name, value in reference[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(other.meter.read(), one.meter.read())


@pytest.mark.usefixtures("group")
def test_whoever_looks_at_a_sharded_model_gets_all_of_it() -> None:
    state = train(build(True))
    reference = train(build(False))
    images = next(batches(0))
    with whole(state.model) as model, torch.inference_mode():
        assert type(model) is Net
        torch.testing.assert_close(model(images), reference.model(images), rtol=0, atol=1e-6)
    assert all(value.is_meta for value in model.parameters())  # and it costs nothing afterwards
    train(state, 8)  # which goes on as ever
    train(reference, 8)
    with whole(state.model) as model, whole(reference.model) as same:
        assert same is reference.model
        torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_bf16_is_what_blocks_are_gathered_in_and_weights_stay_fp32() -> None:
    state = build(True, precision="bf16")
    state.model.bf16 = True
    train(state)
    blocks: Any = state.model.get_submodule("blocks")
    assert {dtype for block in blocks for dtype in block.dtypes} == {torch.bfloat16}
    tensors = [state.model.state_dict(), *state.optimizer.state_dict()["state"].values()]
    assert {value.dtype for part in tensors for value in part.values()} == {torch.float32}


@pytest.mark.usefixtures("group")
def test_bf16_gradients_are_summed_in_fp32() -> None:
    model = build(True, precision="bf16").model
    for number, batch in zip(range(2), batches(0), strict=False):
        with gradient_sync(model, on=number == 1), torch.autocast("cpu", torch.bfloat16):
            model(batch).float().square().mean().backward()
    gradient = model.get_parameter("blocks.0.linear.weight").grad
    assert isinstance(gradient, DTensor)
    total = gradient.full_tensor()
    assert total.dtype == torch.float32
    assert (total.bfloat16().float() != total).any()  # the sum of two numbers in bf16, which bf16 does not hold


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


def test_one_process_shares_nothing_out() -> None:
    model = nn.Linear(2, 2)
    assert prepare(model, CPU, World(), "off", "fsdp", "fp16") is model
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_fp16_is_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"fsdp has no loss scaling for fp16; take train\.precision bf16"):
        prepare(nn.Linear(2, 2), CPU, World(0, 2), "off", "fsdp", "fp16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_on_cuda_a_gradient_that_is_not_finite_changes_no_shard(optimiser: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = Net().cuda()
        shard(model, torch.device("cuda", 0), 1, "bf16", compiled=True)
        config = OptimConfig(name=optimiser)
        state = State(model, build_optimizer(parameter_groups(model, 0.0), config))

        def spoilt() -> Iterator[Tensor]:
            for number, batch in enumerate(batches(0)):
                yield batch.cuda() * (math.nan if number == 7 else 1.0)

        def on_cuda(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast("cuda", torch.bfloat16):
                return model(batch).float().square().mean(), {}

        path = save(state, tmp_path / "run")
        with pytest.raises(NonFinite, match="not finite at step 4"):
            fit(state, model, spoilt(), on_cuda, SCHEDULE)
        with whole(model) as found:
            assert all(value.isfinite().all() for value in found.parameters())
        state.load_state_dict(load_checkpoint(path, state.like))
    finally:
        dist.stop()
