"""A run that was stopped anywhere, by anything, and started again ends in the same bits as one that was not."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mpp.train.checkpoint import Checkpoints, load_checkpoint
from mpp.train.loop import EXIT_REQUEUE
from tests import runs


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def uninterrupted(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run from start to end, and the seconds between its first checkpoint and its end."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    process = runs.start(runs.command(source, run_dir))
    runs.wait_for_checkpoint(process, run_dir)
    began = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return run_dir, time.monotonic() - began


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the main process alone: its workers must notice by themselves."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def kill_and_restart(source: str, run_dir: Path, moment: float, first_workers: str, then_workers: str) -> None:
    process = runs.start(runs.command(source, run_dir, data__workers=first_workers))
    runs.wait_for_checkpoint(process, run_dir)
    time.sleep(moment)
    kill(process)
    runs.finish(runs.command(source, run_dir, data__workers=then_workers))


@pytest.mark.parametrize(("number", "workers"), [(0, ("0", "0")), (1, ("2", "2")), (2, ("2", "0"))])
def test_killed_at_a_random_moment(
    number: int, workers: tuple[str, str], source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    kill_and_restart(source, tmp_path / "run", random.Random(number).uniform(0, seconds), *workers)
    runs.assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_killed_at_many_random_moments(
    number: int, source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    draw = random.Random(100 + number)
    workers = draw.choice([("0", "0"), ("2", "2"), ("0", "2"), ("2", "0")])
    kill_and_restart(source, tmp_path / "run", draw.uniform(0, seconds), *workers)
    runs.assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_killed_again_and_again(source: str, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    reference, seconds = uninterrupted
    draw = random.Random(7)
    for _ in range(5):
        process = runs.start(runs.command(source, tmp_path / "run"))
        runs.wait_for_checkpoint(process, tmp_path / "run")
        time.sleep(draw.uniform(0, seconds / 3))
        kill(process)
    runs.finish(runs.command(source, tmp_path / "run"))
    runs.assert_same_run(tmp_path / "run", reference)


def test_workers_die_with_a_killed_run(source: str, tmp_path: Path) -> None:
    process = runs.start(runs.command(source, tmp_path / "run", data__workers="2"))
    runs.wait_for_checkpoint(process, tmp_path / "run", step=7)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    kill(process)
    deadline = time.monotonic() + 30
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(child) for child in children)


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_saves_and_exits_with_the_requeue_code(
    number: signal.Signals, source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = runs.start(runs.command(source, run_dir, data__workers="2"), start_new_session=True)
    runs.wait_for_checkpoint(process, run_dir, step=7)
    os.killpg(process.pid, number)  # as a scheduler does: to the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, err
    assert "the same command again goes on" in err
    assert "Traceback" not in err
    stopped = runs.final_state(run_dir)["images_seen"]
    assert 7 * 16 <= stopped < 60 * 16
    _, err = runs.finish(runs.command(source, run_dir))
    assert f"at step {stopped // 16} of 60" in err
    runs.assert_same_run(run_dir, uninterrupted[0])


def test_full_disk_leaves_the_last_good_checkpoint(
    source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # The first checkpoint has no optimiser state yet, so a limit between its size and a later one's lets it through.
    later = Checkpoints(uninterrupted[0] / "checkpoints").latest()
    assert later is not None
    limit = int(later.stat().st_size * 0.8)
    _, err = runs.finish(
        runs.command(source, run_dir),
        code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    assert "Traceback" not in err
    assert "File too large" in err.splitlines()[-1]
    assert "the last good checkpoint is" in err.splitlines()[-1]
    checkpoints = Checkpoints(run_dir / "checkpoints")
    assert checkpoints.steps() == [0]
    assert load_checkpoint(checkpoints.path(0))["images_seen"] == 0
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000000000.pt"]
    runs.finish(runs.command(source, run_dir))
    runs.assert_same_run(run_dir, uninterrupted[0])


def test_finished_run_is_left_as_it_is(source: str, uninterrupted: tuple[Path, float]) -> None:
    before = runs.figures(uninterrupted[0])
    _, err = runs.finish(runs.command(source, uninterrupted[0]))
    assert "is finished (60 steps)" in err
    assert runs.figures(uninterrupted[0]) == before


def test_changed_config_is_refused_with_the_difference(source: str, uninterrupted: tuple[Path, float]) -> None:
    _, err = runs.finish(runs.command(source, uninterrupted[0], optim__lr="2e-3"), code=2)
    assert "optim.lr: 0.001 -> 0.002" in err
    assert "--resume force" in err


def test_forced_resume_goes_on_with_the_changed_config(source: str, tmp_path: Path) -> None:
    runs.finish(runs.command(source, tmp_path / "run", train__length="10 steps"))
    _, err = runs.finish(runs.command(source, tmp_path / "run", "--resume", "force", train__length="14 steps"))
    assert "at step 10 of 14" in err
    assert runs.final_state(tmp_path / "run")["images_seen"] == 14 * 16


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "it is truncated or not a checkpoint"),
        (lambda path: path.write_text("hello"), "it is truncated or not a checkpoint"),
    ],
    ids=["truncated", "foreign"],
)
def test_spoilt_checkpoint_is_refused_in_one_line(spoil, said: str, source: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    runs.finish(runs.command(source, run_dir, train__length="8 steps"))
    latest = Checkpoints(run_dir / "checkpoints").latest()
    assert latest is not None
    spoil(latest)
    _, err = runs.finish(runs.command(source, run_dir, train__length="8 steps"), code=2)
    assert said in err.splitlines()[-1]
    assert str(latest) in err.splitlines()[-1]
    assert "Traceback" not in err
