"""Which process does which task of a study."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpp.study import scheduler
from mpp.study.scheduler import Task, run_tasks

_HOLD = """
import sys
from pathlib import Path
from mpp.system.files import claimed
with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Generator[subprocess.Popen[str]]:
    """Another process that works at the task `a`."""
    words = [sys.executable, "-c", _HOLD, str(tmp_path / "a")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_tasks_wait_for_what_they_need_and_a_stopped_one_stops_all(tmp_path: Path) -> None:
    done: list[str] = []
    tasks = [
        Task(tmp_path / name, lambda name=name: done.append(name) or 0, lambda name=name: name != "c" or "b" in done)
        for name in "cabd"
    ]
    assert run_tasks(tasks) == 0
    assert done == ["a", "b", "c", "d"]
    assert run_tasks([Task(tmp_path / "stopped", lambda: 75), *tasks]) == 75
    assert done == ["a", "b", "c", "d"]


def test_the_task_of_a_killed_process_is_taken_over(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    asked = 0

    def sleep(_: float) -> None:
        nonlocal asked
        asked += 1
        assert done == ["b"]  # nobody was at it
        if asked == 2:
            other.kill()
            other.wait()

    monkeypatch.setattr(scheduler, "time", SimpleNamespace(sleep=sleep))  # other threads may sleep, too
    assert run_tasks([Task(tmp_path / name, lambda name=name: done.append(name) or 0) for name in "ab"]) == 0
    assert done == ["b", "a"]
    assert asked == 2
    assert capsys.readouterr().out.count("waiting for other processes") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_process_that_waits_stops_when_asked(
    number: signal.Signals, status: int, tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(sleep=lambda _: os.kill(os.getpid(), number)))
    assert run_tasks([Task(tmp_path / "a", lambda: 0)]) == status
    assert other.poll() is None
