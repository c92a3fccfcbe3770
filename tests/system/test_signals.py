"""Signals are handled where Python has them; elsewhere everything works without."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mpp import cli
from mpp.study import scheduler
from mpp.system.process import handle
from tests import runs
from tests.study.commands import command as study_command

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


def test_earlier_handlers_are_put_back() -> None:
    before, heard = [signal.getsignal(number) for number in NUMBERS], []
    restore = handle(NUMBERS, lambda number, _: heard.append(number))
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    restore()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_handler_that_is_not_python_s_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("it could not be put back"))
    handle(NUMBERS, lambda *_: None)()


def in_a_thread(work: Callable[[], int]) -> int:
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(work()))
    thread.start()
    thread.join()
    return ended[0]


def packing(source: str, out: Path) -> list[str]:
    return ["tools/shard.py", "--data", source, "--out", str(out), "--workers", "2"]


def looking(source: str, out: Path) -> list[str]:
    return ["tools/check_data.py", "--data", source, "--out", str(out), "--workers", "2", "--img-size", "32"]


def pretraining(source: str, out: Path) -> list[str]:
    return runs.command(source, out, data__workers="2", train__length="3 steps")


def tuning(source: str, out: Path) -> list[str]:
    return runs.finetune_command(source, out, data__workers="2", train__length="3 steps")


def studying(source: str, out: Path) -> list[str]:
    one = {"pretrain_seeds": "0", "labels": "100%", "lengths": "2 steps", "seeds": "0", "layers": "-1"}
    return study_command(source, out, **one, arms="", longer="", tune_at="", pretrain__log__report="false")


@pytest.mark.parametrize(
    "words", [pretraining, tuning, packing, looking, pytest.param(studying, marks=pytest.mark.slow)]
)
def test_tools_work_in_any_thread(
    words: Callable[[str, Path], list[str]], source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tool, *rest = words(source, tmp_path / "out")
    assert in_a_thread(lambda: getattr(cli, Path(tool).stem)(rest)) == 0, capfd.readouterr().err


def test_one_that_waits_for_a_task_of_a_study_does_so_in_any_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_WAIT_SECONDS", 0)
    ready = iter([False, True])
    task = scheduler.Task(tmp_path / "a", lambda: 0, lambda: next(ready))
    assert in_a_thread(lambda: scheduler.run_tasks([task])) == 0
