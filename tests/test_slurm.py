"""tools/slurm.sh with stand-ins for srun and scontrol: real torchruns, real runs, real signals."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.cluster import launch

pytestmark = pytest.mark.slow


def job(settings: list[str], folder: Path, log: Path, starts: int = 0):
    """What Slurm does with the batch script: one process, on two "machines" of one rank each."""
    return launch.started(
        [str(runs.ROOT / "tools" / "slurm.sh"), *settings],
        log,
        PYTHON=sys.executable,
        PATH=f"{Path(__file__).parent / 'cluster'}:{os.environ['PATH']}",
        REQUEUED=str(folder / "requeued"),
        SLURM_JOB_ID=str(10_000 + os.getpid() % 5_000),
        SLURM_JOB_NODELIST="machine[1-2]",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_RESTART_COUNT=str(starts),
        SLURM_SUBMIT_DIR=str(runs.ROOT),
    )


def torchruns(pid: int) -> int:
    """How many torchruns there are below process `pid`."""
    words = [Path(f"/proc/{child}/cmdline").read_bytes() for child in launch.descendants(pid)]
    return sum(b"torch.distributed.run" in each and b"bash" not in each for each in words)


def test_a_job_out_of_time_saves_and_is_queued_again(source: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    requeued, log = tmp_path / "requeued", tmp_path / "log"
    with job(launch.command(source, whole)[1:], tmp_path, log) as process:
        launch.end(process, log)
    assert not requeued.exists()
    settings = launch.command(source, cut)[1:]
    moments: list[Callable[[Any], bool]] = [
        lambda job: torchruns(job.pid) == 2,  # torchrun has just been started
        lambda job: len(launch.ranks(job)) == 2,  # the ranks import torch
        lambda job: launch.newest(cut) >= 21,
    ]
    for number, moment in enumerate(moments):
        log = tmp_path / f"log{number}"
        with job(settings, tmp_path, log, number) as process:
            launch.wait(lambda: moment(process), log)  # noqa: B023
            process.send_signal(signal.SIGUSR1)
            assert process.wait(100) != 0
        assert len(requeued.read_text().splitlines()) == number + 1, log.read_text()[-3000:]
    assert log.read_text().count("stopped by SIGUSR1; saved as") == 1
    stopped = launch.newest(cut)
    assert 21 <= stopped < launch.STEPS
    log = tmp_path / "last"
    with job(settings, tmp_path, log, len(moments)) as process:
        assert f"at step {stopped} of {launch.STEPS}" in launch.end(process, log)
    assert len(requeued.read_text().splitlines()) == len(moments)
    runs.assert_same_run(whole, cut)


def test_a_run_that_fails_or_is_cancelled_is_not_queued_again(source: str, tmp_path: Path) -> None:
    with job(["--optim.lr", "fast"], tmp_path, tmp_path / "log") as process:
        assert process.wait(100) != 0
    assert "pretrain: error: --optim.lr: takes a number or auto, got 'fast'" in (tmp_path / "log").read_text()
    run_dir, log = tmp_path / "run", tmp_path / "cancelled"
    with job(launch.command(source, run_dir)[1:], tmp_path, log) as process:
        launch.wait(lambda: launch.newest(run_dir) >= 7, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) != 0
    assert "stopped by SIGTERM; saved as" in log.read_text()
    assert not (tmp_path / "requeued").exists()
