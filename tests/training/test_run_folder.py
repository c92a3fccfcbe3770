"""What runs do with their folder: resume, refuse another config, explain what the machine lacks."""

import errno
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mpp import dist
from mpp.config import Auto, to_yaml
from mpp.data.sources.base import SourceAway
from mpp.data.sources.contents import Contents
from mpp.errors import RunError, TryLater, Unreachable, UserError
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.loop import EXIT_REQUEUE, State
from mpp.training.run_folder import explained, resume
from mpp.training.saving import Saving
from mpp.training.schedule import Schedule
from mpp.training.settings import TrainConfig


@dataclass(frozen=True)
class Config:
    run_dir: str = field(default="", metadata={"free": True})
    resume: str = field(default="auto", metadata={"free": True})
    train: TrainConfig = TrainConfig(batch_size=4)


SCHEDULE = Schedule(10, 4, 1, lambda step: 0.1)


def fresh() -> State:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return State(model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))


def start(config: Config, images: int = 0, steps: int = 10, main: bool = True) -> int:
    """Resume a run of so many steps, and so many images in an epoch (0: unknown)."""
    state, checkpoints = fresh(), Checkpoints(Path(config.run_dir) / "checkpoints")
    state.contents = Contents(images, "0") if images else None
    return resume(config, state, replace(SCHEDULE, total_steps=steps), checkpoints, main)


def save(checkpoints: Checkpoints, state: State, images: int) -> None:
    state.images_seen = images
    with Saving(SCHEDULE, checkpoints, lambda: None, None) as saving:
        saving(state)


def saved(folder: Path) -> tuple[Config, Checkpoints, State]:
    """A run of two steps."""
    config, checkpoints, state = Config(str(folder)), Checkpoints(folder / "checkpoints"), fresh()
    assert start(config) == 0
    save(checkpoints, state, 8)
    return config, checkpoints, state


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank_and_size", lambda: (1, 2))
    assert start(Config(str(tmp_path / "run")), main=False) == 0
    save(Checkpoints(tmp_path / "run" / "checkpoints"), fresh(), 8)
    assert not (tmp_path / "run").exists()


def test_changed_images_are_refused_but_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, state = Config(str(tmp_path), train=TrainConfig(batch_size=4, length="5 epochs")), fresh()
    assert start(config, 8, 10) == 0
    state.contents = Contents(8, "0")
    save(Checkpoints(tmp_path / "checkpoints"), state, 8)
    assert start(config, 8, 10) == 2
    written = (tmp_path / "config.yaml").stat().st_mtime_ns
    text = r"changed since the last checkpoint of \S+ \(8 images then, 12 now\).* by --resume force"
    with pytest.raises(UserError, match=text) as caught:
        start(config, 12, 15)
    assert caught.value.exit_code == 2
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == written
    assert not capsys.readouterr().err
    force = replace(config, resume="force")
    assert start(force, 12, 15) == 2
    assert capsys.readouterr().err.splitlines()[:2] == [
        "note: the images have changed (8 images then, 12 now)",
        "note: an epoch is 3.0 steps instead of 2.0; the run is 15 steps long instead of 10, and its learning rate "
        "goes by that: step 2 is 13% of it (it was 20%)",
    ]
    steps = replace(force, train=replace(config.train, length="10 steps"))
    (tmp_path / "config.yaml").write_text(to_yaml(steps))
    assert start(steps, 12, 10) == 2
    assert "the run stays 10 steps long: step 2 is 20% of it (it was 20%)" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_does_not_tell_its_images(tmp_path: Path) -> None:
    config, checkpoints, state = saved(tmp_path)
    assert load_checkpoint(checkpoints.path(2))["contents"] is None
    assert start(config, 12, 10) == 2
    checkpoints.save(2, {name: value for name, value in state.state_dict().items() if name != "contents"})
    assert start(config, 12, 10) == 2


def test_another_batch_size_is_refused_even_by_force(tmp_path: Path) -> None:
    config, _, _ = saved(tmp_path)
    larger = replace(config, train=replace(config.train, batch_size=8))
    with pytest.raises(UserError, match=r"train\.batch_size: 4 -> 8.*choose another --run-dir$") as caught:
        start(larger)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"train\.batch_size cannot change within a run \(4 -> 8\)"):
        start(replace(larger, resume="force"))


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    config, checkpoints, _ = saved(tmp_path)
    model = nn.Linear(5, 2)
    other = State(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(UserError, match=r"step_000000002\.pt does not fit this model and optimiser: .*size mismatch"):
        resume(config, other, SCHEDULE, checkpoints, True)


FULL = OSError(errno.ENOSPC, "No space left on device")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (FULL, RunError, "cannot write to RUN: No space left on device; the last good checkpoint is None"),
        (
            MEMORY,
            RunError,
            "out of memory on cpu: set --train.micro-batch to half of what auto chose, as the start says",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file"), FileNotFoundError, "No such file"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, kind: type[Exception], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the run folder"):
        start(Config(str(tmp_path / "file" / "run")))
    run = tmp_path / "run"
    with pytest.raises(kind, match=said.replace("RUN", str(run))), explained(Config(str(run)), torch.device("cpu")):
        raise error


@pytest.mark.parametrize(("given", "now"), [("auto", 16), (8, 8)])
def test_out_of_memory_names_the_micro_batch_of_this_start(given: int | Auto, now: int, tmp_path: Path) -> None:
    begun, _, _ = saved(tmp_path)
    start(replace(begun, train=replace(begun.train, micro_batch=16)))
    config = replace(begun, train=replace(begun.train, micro_batch=given))
    with pytest.raises(RunError, match=rf"\(now {now}\)"), explained(config, torch.device("cpu")):
        raise MEMORY


def unanswered(config: Config, error: OSError | None = None) -> UserError:
    with pytest.raises(UserError) as caught, explained(config, torch.device("cpu")):
        raise error or Unreachable("s3://b/a.tar: no answer within 30 s")
    return caught.value


def codes(config: Config, starts: int, error: OSError | None = None) -> list[int]:
    """The exit codes of so many starts that get no answer."""
    return [unanswered(config, error).exit_code for _ in range(starts)]


def test_a_run_that_gets_no_answer_is_queued_again_but_not_for_ever(tmp_path: Path) -> None:
    config, _, _ = saved(tmp_path)
    latest = r"no answer within 30 s; once it answers, the same command goes on from .*step_000000002\.pt"
    for _ in range(2):  # the row begins anew with whoever has read its last line
        for _ in range(2):
            again = unanswered(config)
            assert (type(again), again.exit_code) == (TryLater, EXIT_REQUEUE)
            assert re.search(latest, str(again))
        end = unanswered(config)
        assert (type(end), end.exit_code) == (RunError, 1)
        assert "3 starts in a row ended so at the same image; once it answers, the same command goes on" in str(end)
        assert not (tmp_path / "unanswered.json").exists()


def test_new_images_begin_the_row_anew_and_of_a_sweep_each_run_counts(tmp_path: Path) -> None:
    config, checkpoints, state = saved(tmp_path / "run")
    for images in (12, 16, 20, 24):
        assert codes(config, 2) == [EXIT_REQUEUE] * 2
        save(checkpoints, state, images)
    (tmp_path / "run" / "unanswered.json").write_text("torn {")
    assert codes(config, 3) == [EXIT_REQUEUE, EXIT_REQUEUE, 1]
    for number in range(4):
        saved(tmp_path / "sweep" / f"lr_{number}")
        assert codes(Config(str(tmp_path)), 1) == [EXIT_REQUEUE]


def test_a_source_that_does_not_open(tmp_path: Path) -> None:
    """At the first start its address may be misspelt; later it is away."""
    away = SourceAway("shards:s3://b/a.tar: cannot open it")
    config = Config(str(tmp_path / "run"))
    for _ in range(2):
        assert unanswered(config, away) is away
        (tmp_path / "run").mkdir(exist_ok=True)
    assert away.exit_code == 2
    saved(tmp_path / "run")
    assert codes(config, 3, away) == [EXIT_REQUEUE, EXIT_REQUEUE, 1]


def test_no_answer_without_a_run_folder_or_with_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry_run = Config(str(tmp_path))
    object.__setattr__(dry_run, "dry_run", True)
    for config in (Config(str(tmp_path / "none")), Config(""), dry_run):
        with pytest.raises(Unreachable), explained(config, torch.device("cpu")):
            raise Unreachable("x")
    assert not list(tmp_path.iterdir())
    config, _, _ = saved(tmp_path)
    monkeypatch.setattr(dist, "rank_and_size", lambda: (0, 2))
    assert codes(config, 1) == [1]
    assert not (tmp_path / "unanswered.json").exists()
