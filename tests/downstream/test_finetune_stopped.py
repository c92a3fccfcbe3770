"""Fine-tuning that is stopped anywhere, or shared by processes, ends as one that is not."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mpp.training.loop import EXIT_REQUEUE
from tests import runs
from tests.downstream.tuned import assert_same_run, read_csv, tune

SOFT = {"loss__mixup": "0.8", "loss__cutmix": "1", "loss__smoothing": "0.1"}
SOFT |= {"data__randaugment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture(scope="module")
def uninterrupted(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run with all that draws at random, from start to end, and the seconds that it took."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    began = time.monotonic()
    assert tune(source, run_dir, **SOFT) == 0
    return run_dir, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(0, "0"), (1, "2")])
def test_killed_at_a_random_moment(
    number: int, workers: str, source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    run_dir = tmp_path / "run"
    process = runs.start(runs.finetune_command(source, run_dir, data__workers=workers, **SOFT))
    runs.wait_for_checkpoint(process, run_dir)
    time.sleep(random.Random(number).uniform(0, seconds))
    runs.kill(process)
    assert tune(source, run_dir, **SOFT) == 0
    assert_same_run(run_dir, reference)


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_exits_with_the_requeue_code(
    source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = runs.start(runs.finetune_command(source, run_dir, data__workers="2", **SOFT), start_new_session=True)
    runs.wait_for_checkpoint(process, run_dir, step=5)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, err
    assert "the same command again goes on" in err
    assert "Traceback" not in err
    assert not (run_dir / "result.json").exists()
    assert tune(source, run_dir, **SOFT) == 0
    assert_same_run(run_dir, uninterrupted[0])


@pytest.mark.slow
def test_a_forced_run_that_was_stopped_has_no_result(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier config came to must not be taken for that of the new one."""
    few = {"optim__lr": "0.01,0.02", "train__length": "1 steps"}
    assert tune(source, tmp_path, **few) == 0
    results = [tmp_path / "sweep" / "lr_0.01" / "result.json", tmp_path / "result.json"]
    assert [path.exists() for path in results] == [True, True]

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> NoReturn:
        raise Killed

    monkeypatch.setattr("mpp.training.run_folder.fit", killed)
    with pytest.raises(Killed):
        tune(source, tmp_path, "--resume", "force", **few | {"train__length": "3 steps"})
    assert not results[0].exists()


@pytest.mark.slow
def test_two_processes_do_what_one_does(split: str, tmp_path: Path) -> None:
    settings = {"model__drop_path": "0", "train__precision": "fp32", "train__length": "12 steps"}
    out, _ = runs.finish(runs.finetune_command(split, tmp_path / "two", **settings), ranks=2)
    assert tune(split, tmp_path / "one", **settings) == 0
    assert out.count("Finished: 12 steps on 28 images") == 1
    one, two = (runs.final_state(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=0, atol=1e-5, msg=f"{part}.{name}")
    first, second = (read_csv(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert [row["path"] for row in first] == [row["path"] for row in second]
    for row, other in zip(first, second, strict=True):
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-4)
